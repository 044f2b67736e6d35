"""Raw records from a frames file, made by the producer's own slicer and feed clock. Pure but for reading."""

from collections.abc import Iterable, Iterator

from producers.protocol import market_items
from producers.slicer import Slicer, SlicerSettings
from producers.split import split_frame
from schemas.frames import Frame
from schemas.raw import RawRecord


def records_of(
    frames: Iterable[Frame], settings: SlicerSettings, streams: list[str], pairs: list[str]
) -> Iterator[RawRecord]:
    """What a producer that received these frames at these times would have published, in order."""
    slicer = Slicer(settings, streams, pairs)
    now = 0
    for frame in frames:
        if not now:
            slicer.connected(frame.recv_ns)
        now = max(now, frame.recv_ns)
        while (due := slicer.deadline()) is not None and due < now:
            slicer.advance(due)
            yield from slicer.take()
        items = market_items(split_frame(frame.data))
        if items:
            slicer.frame(items, now)
        yield from slicer.take()
    slicer.flush(now)
    yield from slicer.take()
