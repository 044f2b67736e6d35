"""What a record of history becomes when it is played again: the same, but for its `src`, and for events left out."""

from functools import lru_cache

from schemas import rest, wire

Headers = list[tuple[str, bytes]]


def replayed(
    headers: Headers, value: bytes | None, symbols: frozenset[str], src: bytes
) -> tuple[Headers, bytes | None]:
    """Of a raw record. With `symbols`, events of other pairs are left out of slices, each for a mark that takes its
    number; what names no pair stays."""
    if symbols and value and ("kind", b"slice") in headers:
        value = _filtered(value, symbols)
    ours = ("src", src)
    return [ours if header[0] == "src" else header for header in headers], value


def wanted(headers: Headers, symbols: frozenset[str]) -> bool:
    """Whether a record of REST's is of these pairs (none: of all); what names no pair is."""
    try:
        return not symbols or _is_of(rest.repair_of(headers)[0].pair, symbols)
    except rest.NotARepair:
        return True


def _filtered(value: bytes, symbols: frozenset[str]) -> bytes:
    try:
        parts = wire.split_array(value)
    except wire.DECODE_ERRORS:
        return value
    kept = [bytes(part) if _part_is_of(part, symbols) else wire.LEFT_OUT for part in parts]
    return b"[" + b",".join(kept) + b"]" if wire.LEFT_OUT in kept else value


def _part_is_of(part: bytes, symbols: frozenset[str]) -> bool:
    try:
        return _is_of(wire.decode_head(part).pair, symbols)
    except wire.DECODE_ERRORS:
        return True


@lru_cache(maxsize=65536)
def _is_of(pair: str, symbols: frozenset[str]) -> bool:
    try:
        return wire.symbol_of(pair) in symbols
    except ValueError:
        return True
