"""Which streams were silent when a log ended. Pure."""

from collections import Counter
from collections.abc import Iterable

from producers.slicer import OTHERS
from producers.split import split_frame
from schemas.events import NOTHING_MISSED, NS_PER_MS
from schemas.raw import RawRecord, decode_gap_value, decode_tick_value


def still_silent(records: Iterable[RawRecord]) -> dict[str, int]:
    """The streams that may have been missed for longer than the log's end tells, and since when (ns), as ticks have
    it. `records`: those since a tick or gap that each partition has, in the order of each; of the last round that a
    killed producer sent, each may have another part."""
    heard: dict[tuple[str, int], int] = {}  # when a stream was, after how many gaps of it
    gaps: Counter[tuple[int, str]] = Counter()  # of a partition and a stream, so far
    records = sorted(records, key=lambda record: (record.epoch, record.timestamp_ms))
    for record in records:
        partition, now = record.partition, record.timestamp_ms * NS_PER_MS
        if record.kind == "tick":
            silent = decode_tick_value(record.value).silent
            for stream, after in [*heard]:
                if stream not in silent and after == gaps[partition, stream]:
                    del heard[stream, after]
            for stream, at in silent.items():
                place = stream, gaps[partition, stream]
                heard[place] = max(at, heard.get(place, at))
        elif record.kind == "slice":
            for stream in {OTHERS, *(item.head.ev for item in split_frame(record.value) if item.head)}:
                place = stream, gaps[partition, stream]
                if place in heard:
                    heard[place] = max(now, heard[place])
        elif record.kind == "gap" and (gap := decode_gap_value(record.value)).reason != NOTHING_MISSED:
            for stream in [*gap.streams, OTHERS]:
                before = heard.get((stream, gaps[partition, stream]))
                gaps[partition, stream] += 1
                since = before if gap.to is None else gap.to  # a stop ends no silence
                if since is not None and stream != OTHERS and (gap.reason == "stall" or before is not None):
                    heard[stream, gaps[partition, stream]] = since
    partitions = {record.partition for record in records}
    return {stream: at for (stream, after), at in heard.items() if after == min(gaps[p, stream] for p in partitions)}
