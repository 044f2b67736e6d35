"""Which streams were silent when a log ended. Pure."""

from collections.abc import Iterable

from producers.split import split_frame
from schemas.events import NOTHING_MISSED
from schemas.raw import RawRecord, decode_gap_value, decode_tick_value


def still_silent(records: Iterable[RawRecord]) -> dict[str, int]:
    """The streams that may have been missed for longer than the log's end tells, and since when (ns). `records`: those
    since the last tick, that tick included, in the order of each partition."""
    silent: dict[int, dict[str, int]] = {}
    for record in records:
        if record.kind == "tick":
            silent[record.partition] = dict(decode_tick_value(record.value).silent)
        elif found := silent.get(record.partition):
            for stream in _ended(record):
                found.pop(stream, None)
    first, *others = [*silent.values()] or [{}]
    return {stream: at for stream, at in first.items() if all(stream in other for other in others)}


def _ended(record: RawRecord) -> list[str]:
    """The streams that were silent no longer: they came again, or a gap has said what there is to say."""
    if record.kind == "gap":
        gap = decode_gap_value(record.value)
        return [] if gap.reason == NOTHING_MISSED else gap.streams
    if record.kind == "slice":
        return [item.head.ev for item in split_frame(record.value) if item.head]
    return []
