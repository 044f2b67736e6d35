"""Recovery is replay: the state at any offset, from the log alone.

Take the timestamp of the record before the offset, step back by the pipeline's memory, start at the first
record at or after that time, and run from there through the same pipeline, silently. The run-in begins some
records earlier still, for only what stands before a record tells whether it is the next one. When it turns
out that the last record *taken* is older than the record before the offset, which overtook a failed one
after a silence, it all begins again from the time of that one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from processors.settings import PipelineSettings
from processors.stages import RAW, Machine, Stage
from schemas import topics
from schemas.events import NS_PER_MS, MinuteClosed, decode_bar, decode_gap
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings


class Log(Protocol):
    """A partition of a stage's topic, as a rebuild reads it; `begin` is the first offset there is."""

    begin: int

    async def timestamp_ms(self, offset: int) -> int:
        """The timestamp of the record at an offset."""

    async def first_since(self, timestamp_ms: int) -> int | None:
        """The first record, in the order of offsets, that is not older; None: there is none."""

    def records(self, first: int, end: int) -> AsyncIterator[Any]:
        """The records from `first` to before `end`."""


async def replay(
    log: Log,
    stage: Stage,
    partition: int,
    settings: PipelineSettings,
    offset: int,
    lost_since: Callable[[], Awaitable[int | None]] | None = None,
) -> Machine:
    """The stage as it stands before `offset`. Pure but for what the log does. `lost_since` is asked for what Pipeline
    calls so, where the log begins too late."""
    newest_ms = await log.timestamp_ms(offset - 1) if offset > log.begin else 0
    memory_ms = -(-stage.make(partition, settings, 0, False, None).memory_ns // NS_PER_MS)
    while True:
        found = await log.first_since(max(0, newest_ms - memory_ms))
        first = max(log.begin, min(offset, offset if found is None else found) - stage.run_in)
        lost = 0 < first == log.begin
        since = await lost_since() if lost and lost_since else None
        state = stage.make(partition, settings, stage.run_in if first else 0, lost, since)
        async for record in log.records(first, offset):
            state.process(record)
        taken_ms = state.taken_ms or 0
        if first == log.begin or taken_ms >= newest_ms:
            state.counts.clear()
            return state
        newest_ms = taken_ms


async def rebuild(
    settings: Settings,
    pipeline: PipelineSettings,
    stage: Stage,
    place: TopicPartition,
    offset: int,
    moved: Callable[[], None],
) -> Machine:
    """The stage as it stands before `offset`. Gives way between fetches, and says each time that it `moved`. Raises
    TapedeckError."""
    try:
        reader = await kafka.consumer(settings, place)
        try:
            begin = (await reader.beginning_offsets([place]))[place]
            log = _KafkaLog(reader, stage, place, begin, moved)

            async def lost_since() -> int | None:
                first_ms = await log.timestamp_ms(begin)
                return await _worked_through(settings, place.partition, first_ms) if stage is RAW else None

            return await replay(log, stage, place.partition, pipeline, offset, lost_since)
        finally:
            await reader.stop()
    except KafkaError as error:
        raise TapedeckError(f"the state of {place} cannot be rebuilt: {error}") from error


async def _worked_through(settings: Settings, partition: int, first_ms: int) -> int | None:
    """Until when the raw log had been worked through before what came next was deleted, ms; `first_ms` is the time
    of the first record left. What the gap says, once it is told; else the newest marker; None where there is none."""
    ending: int | None = None
    async for record in _newest(settings, topics.GAPS, partition, 1_000):
        gap = decode_gap(record.value)
        if gap.reason == "log" and gap.to == first_ms * NS_PER_MS:
            return None if gap.from_ is None else gap.from_ // NS_PER_MS
    async for record in _newest(settings, topics.BARS_1M, partition, 10_000):
        if record.timestamp <= first_ms and isinstance(decode_bar(record.value), MinuteClosed):
            ending = record.timestamp
    return ending


async def _newest(settings: Settings, topic: topics.Topic, partition: int, count: int) -> AsyncIterator[Any]:
    """The last records of a partition, in order."""
    place = TopicPartition(settings.topic_prefix + topic.name, partition)
    reader = await kafka.consumer(settings, place)
    try:
        begin, end = (await reader.beginning_offsets([place]))[place], (await reader.end_offsets([place]))[place]
        reader.seek(place, max(begin, end - count))
        while await reader.position(place) < end:
            for record in (await reader.getmany(place, timeout_ms=1000)).get(place, ()):
                yield record
    finally:
        await reader.stop()


class _KafkaLog:
    def __init__(
        self, reader: AIOKafkaConsumer, stage: Stage, place: TopicPartition, begin: int, moved: Callable[[], None]
    ) -> None:
        self._reader = reader
        self._stage = stage
        self._place = place
        self._moved = moved
        self.begin = begin

    async def timestamp_ms(self, offset: int) -> int:
        self._reader.seek(self._place, offset)
        timestamp: int = (await self._reader.getone(self._place)).timestamp
        return timestamp

    async def first_since(self, timestamp_ms: int) -> int | None:
        found = (await self._reader.offsets_for_times({self._place: timestamp_ms}))[self._place]
        return found.offset if found else None

    async def records(self, first: int, end: int) -> AsyncIterator[Any]:
        self._reader.seek(self._place, first)
        position = first
        while position < end:
            batches = await self._reader.getmany(self._place, timeout_ms=1000, max_records=500)
            for record in batches.get(self._place, ()):
                if record.offset >= end:
                    break
                yield self._stage.read(record.partition, record.timestamp, record.headers, record.value, record.offset)
                self._moved()
            position = await self._reader.position(self._place)
            await asyncio.sleep(0)
