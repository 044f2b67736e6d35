"""A WebSocket frame cut into its events, each with its own untouched bytes. Pure."""

import json
from typing import NamedTuple

import msgspec

from schemas import wire


class Item(NamedTuple):
    """One event of a frame; `head` is None for bytes that are not JSON."""

    data: bytes
    head: wire.Head | None


_NOTHING = wire.Head(ev="")
_lenient = json.JSONDecoder(strict=False)


def split_frame(data: bytes) -> list[Item]:
    """The events of a frame in order. A frame that is no JSON array is one bad item, whole; an element
    that is not valid JSON (NaN, say) is one bad item and its neighbours are saved."""
    try:
        parts = wire.split_array(data)
    except wire.DECODE_ERRORS:
        return _salvage(data)
    try:
        return [Item(bytes(part), head) for part, head in zip(parts, wire.decode_heads(data), strict=True)]
    except wire.DECODE_ERRORS:
        return [Item(bytes(part), _head(part)) for part in parts]


def _head(part: msgspec.Raw | bytes) -> wire.Head:
    """The head of valid JSON; an empty one where its shape is wrong, which the pipeline will judge."""
    try:
        return wire.decode_head(part)
    except wire.DECODE_ERRORS:
        return _NOTHING


def _salvage(data: bytes) -> list[Item]:
    """Element by element with the standard library's lenient parser, which reads NaN and Infinity.

    latin-1 maps every byte to one character, so positions in the text are positions in the bytes.
    """
    text = data.decode("latin-1")
    items = []
    try:
        at = _skip(text, 0)
        if text[at] != "[":
            raise ValueError("not an array")
        at = _skip(text, at + 1)
        while text[at] != "]":
            _, end = _lenient.raw_decode(text, at)
            items.append(_judge(data[at:end]))
            at = _skip(text, end)
            if text[at] == ",":
                at = _skip(text, at + 1)
            elif text[at] != "]":
                raise ValueError("no comma")
        if _skip(text, at + 1) != len(text):
            raise ValueError("something follows the array")
    except (ValueError, IndexError, RecursionError):
        return [Item(data, None)]
    return items


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _judge(part: bytes) -> Item:
    try:
        msgspec.json.decode(part, type=msgspec.Raw)
    except wire.DECODE_ERRORS:
        return Item(part, None)
    return Item(part, _head(part))
