"""A WebSocket frame cut into its events, each with its own untouched bytes. Pure."""

import re

import msgspec

from schemas import wire


class Item(msgspec.Struct, frozen=True, gc=False):
    """One event of a frame; `head` is None for bytes that are not JSON, or nested too deep."""

    data: bytes
    head: wire.Head | None


class _Route(msgspec.Struct, frozen=True):
    """What still decides where an event belongs when its head has an odd shape."""

    ev: str = ""
    pair: str = ""


_NOTHING = wire.Head(ev="")
_decode_route = msgspec.json.Decoder(_Route).decode
_tokens = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},]', re.DOTALL).finditer
_SPACE = b" \t\r\n"


def split_frame(data: bytes) -> list[Item]:
    """The events of a frame in order. A frame that is no JSON array is one bad item, whole; an element
    that is not valid JSON (NaN, say) or nested too deep is one bad item and its neighbours are saved."""
    try:
        parts = wire.split_array(data)
    except wire.DECODE_ERRORS:
        return _salvage(data)
    if _openings(data) > len(parts) + wire.MAX_DEPTH and any(_openings(bytes(p)) > wire.MAX_DEPTH for p in parts):
        return _salvage(data)
    try:
        return list(map(Item, map(bytes, parts), wire.decode_heads(data)))
    except wire.DECODE_ERRORS:
        return [Item(bytes(part), _head(part)) for part in parts]


def _openings(data: bytes) -> int:
    """At least as many as the data are deep."""
    return data.count(b"[") + data.count(b"{")


def _head(part: msgspec.Raw | bytes) -> wire.Head:
    """The head of valid JSON. Where its shape is wrong, the pipeline will judge; what it may still
    understand must lie in the partition of its pair."""
    try:
        return wire.decode_head(part)
    except wire.DECODE_ERRORS:
        pass
    try:
        route = _decode_route(part)
    except wire.DECODE_ERRORS:
        return _NOTHING
    return wire.Head(ev=route.ev, pair=route.pair)


def _salvage(data: bytes) -> list[Item]:
    """Cut by brackets, commas and strings alone, whatever else is wrong inside the elements."""
    frame = data.strip(_SPACE)
    if frame[:1] != b"[":
        return [Item(data, None)]
    items: list[Item] = []
    depth = deepest = 0
    begin, end = 1, -1
    for token in _tokens(frame):
        match token[0]:
            case b"[" | b"{":
                depth += 1
                deepest = max(deepest, depth - 1)
            case b"]" | b"}":
                depth -= 1
                if depth == 0:
                    end = token.end()
                    break
            case b"," if depth == 1:
                items.append(_judge(frame[begin : token.start()].strip(_SPACE), deepest))
                begin, deepest = token.end(), 0
    if end != len(frame) or frame[-1:] != b"]":
        return [Item(data, None)]
    return [*items, _judge(frame[begin:-1].strip(_SPACE), deepest)]


def _judge(part: bytes, depth: int) -> Item:
    if depth > wire.MAX_DEPTH:
        return Item(part, None)
    try:
        msgspec.json.decode(part, type=msgspec.Raw)
    except wire.DECODE_ERRORS:
        return Item(part, None)
    return Item(part, _head(part))
