"""Which of history is of the pairs that are played again, and what a record becomes without the events of others."""

from functools import lru_cache

import msgspec

from schemas import rest, wire

Headers = list[tuple[str, bytes]]


def filtered(headers: Headers, value: bytes | None, symbols: frozenset[str]) -> bytes | None:
    """The value of a raw record without the events of other pairs: each leaves a mark, which takes its number. What
    names no pair stays."""
    return _filtered(value, symbols) if value and ("kind", b"slice") in headers else value


def has_event(value: bytes | None, symbols: frozenset[str]) -> bool:
    """Whether a raw record has an event of these pairs."""
    try:
        return any(_symbol_of(part) in symbols for part in wire.split_array(value or b""))
    except wire.DECODE_ERRORS:  # a tick, a gap, bad bytes
        return False


def symbol_of(headers: Headers) -> str | None:
    """Of a record of REST's; None where it names no pair."""
    try:
        return _symbol(rest.repair_of(headers)[0].pair)
    except rest.NotARepair:
        return None


def _filtered(value: bytes, symbols: frozenset[str]) -> bytes:
    try:
        parts = wire.split_array(value)
    except wire.DECODE_ERRORS:
        return value
    right = {None, *symbols}
    kept = [bytes(part) if _symbol_of(part) in right else wire.LEFT_OUT for part in parts]
    return b"[" + b",".join(kept) + b"]" if wire.LEFT_OUT in kept else value


def _symbol_of(part: msgspec.Raw) -> str | None:
    """Of an event; None where it names no pair."""
    try:
        return _symbol(wire.decode_head(part).pair)
    except wire.DECODE_ERRORS:
        return None


@lru_cache(maxsize=65536)
def _symbol(pair: str) -> str | None:
    try:
        return wire.symbol_of(pair)
    except ValueError:
        return None
