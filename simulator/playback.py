"""A frames file as a source: every frame as it was received, its events' bytes untouched."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from schemas import wire
from schemas.frames import read_frames
from simulator.frame import Event, Frame

_NO_HEAD = wire.Head(ev="")


def play_file(path: Path) -> Iterator[Frame]:
    """The file's frames, due by the differences of their recv_ns; the clock is the highest event time so far.

    Raises schemas.frames.NotAFramesFile for a line that is no frame, and OSError.
    """
    first_ns: int | None = None
    clock_ms = 0
    for recv_ns, data in read_frames(path):
        first_ns = recv_ns if first_ns is None else first_ns
        events, time_ms = split(data)
        clock_ms = max(clock_ms, time_ms)
        yield Frame(recv_ns - first_ns, clock_ms * 1_000_000, data, events)


def split(data: bytes) -> tuple[Sequence[Event], int]:
    """The events of a JSON array, none for other bytes, and the highest time among them (ms, 0 for none)."""
    try:
        raws = [bytes(raw) for raw in wire.split_array(data)]
    except wire.DECODE_ERRORS:
        return (), 0
    try:
        heads = wire.decode_heads(data)
    except wire.DECODE_ERRORS:
        heads = [_head(raw) for raw in raws]
    events = [
        Event((head.ev, head.pair) if head.ev and head.pair else None, raw)
        for head, raw in zip(heads, raws, strict=True)
    ]
    return events, max((head.time_ms or 0 for head in heads), default=0)


def _head(data: bytes) -> wire.Head:
    """The head of one event, empty if it has none: such bytes are played, to whoever listens."""
    try:
        return wire.decode_head(data)
    except wire.DECODE_ERRORS:
        return _NO_HEAD
