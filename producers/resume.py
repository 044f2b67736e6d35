"""Where the raw log stands: what a starting producer goes on from, and what of a journal is in it already."""

import contextlib
from collections.abc import AsyncGenerator, Iterable
from math import inf

from aiokafka import TopicPartition

from producers.silences import still_silent
from producers.slicer import Resume
from schemas import topics
from schemas.raw import NotARawRecord, RawRecord, from_kafka, record_of
from tapedeck import kafka
from tapedeck.errors import UsageError
from tapedeck.settings import Settings

MOST_FOREIGN = 100  # records at a partition's end that nobody of ours wrote


class LogEnd:
    """The last record of each partition, of those that have one. `claims`: epochs that were claimed."""

    def __init__(self, last: dict[int, RawRecord], claims: int) -> None:
        self._last = last
        self.claims = claims
        self.epoch = max((record.epoch for record in last.values()), default=0)

    def has(self, record: RawRecord) -> bool:
        """Whether a record of the same or an earlier epoch is in the log already."""
        last = self._last.get(record.partition)
        return last is not None and (record.epoch, record.n) <= (last.epoch, last.n)

    @property
    def clock_ms(self) -> int:
        return max((record.timestamp_ms for record in self._last.values()), default=0)

    @property
    def common_ms(self) -> int:
        """Where the partition that ends first ends: a killed producer's last round may stand in some of them only."""
        return min((record.timestamp_ms for record in self._last.values()), default=0)

    def resume(self, silent: dict[str, int]) -> Resume | None:
        """None where the log is empty."""
        if not self._last:
            return None
        newest = max(self._last.values(), key=lambda record: (record.epoch, record.timestamp_ms))
        last_ms = [self._last[p].timestamp_ms if p in self._last else None for p in range(topics.PARTITIONS)]
        return Resume(self.epoch, self.clock_ms, newest.recv[-1][0], last_ms, silent=silent)


async def read_silences(settings: Settings, end: LogEnd) -> dict[str, int]:
    """The streams that may have been missed for longer than the log's end tells, and since when (ns). Raises
    KafkaError."""
    second_ms = end.common_ms - end.common_ms % 1000
    async with contextlib.aclosing(records_since(settings, range(topics.PARTITIONS), second_ms)) as records:
        return still_silent([record async for record in records])


async def records_since(
    settings: Settings, numbers: Iterable[int], since_ms: int, until_ms: float = inf
) -> AsyncGenerator[RawRecord]:
    """What stands in these partitions now from a time on, in the order of each, and not much of what came after
    `until_ms`. Raises KafkaError."""
    topic = settings.topic_prefix + topics.RAW.name
    places = [TopicPartition(topic, number) for number in numbers]
    reader = await kafka.consumer(settings, *places)
    reader.pause(*places)
    try:
        ends = await reader.end_offsets(places)
        found = await reader.offsets_for_times(dict.fromkeys(places, since_ms))
        waiting = {place for place, first in found.items() if first is not None and first.offset < ends[place]}
        for place in waiting:
            reader.seek(place, found[place].offset)
        reader.resume(*waiting)
        while waiting:
            for place, records in (await reader.getmany(*waiting, timeout_ms=500)).items():
                for record in records:
                    with contextlib.suppress(NotARawRecord):
                        yield from_kafka(record.partition, record.timestamp, record.headers, record.value)
                if records[-1].timestamp > until_ms:
                    waiting.discard(place)
            # Not by the last record: what ends a foreign transaction takes an offset and is none.
            waiting = {place for place in waiting if await reader.position(place) < ends[place]}
    finally:
        await reader.stop()


async def read_log_end(settings: Settings) -> LogEnd:
    """Raises UsageError when the topic holds something else, KafkaError."""
    topic = settings.topic_prefix + topics.RAW.name
    partitions = [TopicPartition(topic, number) for number in range(topics.PARTITIONS)]
    lease = TopicPartition(settings.topic_prefix + topics.LEASE.name, 0)
    reader = await kafka.consumer(settings, *partitions)
    reader.pause(*partitions)  # or it fetches tens of megabytes from the log's beginning meanwhile
    try:
        begins, ends = await reader.beginning_offsets(partitions), await reader.end_offsets([*partitions, lease])
        claims = ends.pop(lease)
        waiting = {place: ends[place] - 1 for place in partitions if ends[place] > begins[place]}
        for place, offset in waiting.items():
            reader.seek(place, offset)
        reader.resume(*waiting)
        last: dict[int, RawRecord] = {}
        while waiting:
            found = await reader.getmany(*waiting, timeout_ms=500)
            for place, offset in [*waiting.items()]:
                if place in found:
                    r = found[place][0]
                    record = record_of(r.partition, r.timestamp, r.headers, r.value, r.offset)
                    if isinstance(record, RawRecord):
                        last[place.partition] = record
                        del waiting[place]
                        continue
                    reason = record.reason  # a dead letter of the processor's
                elif await reader.position(place) <= offset:
                    continue  # it is on its way
                else:
                    reason = "what ends a transaction"
                if offset <= max(begins[place], ends[place] - MOST_FOREIGN):
                    raise UsageError(f"{topic} has records that tapedeck did not write: {reason}")
                waiting[place] = offset - 1  # ours stands before it
                reader.seek(place, offset - 1)
    finally:
        await reader.stop()
    return LogEnd(last, claims)
