"""Recovery is replay: the state at any offset, from the log alone.

Take the timestamp of the record before the offset, step back by the pipeline's memory, start at the first
record at or after that time, and run from there through the same pipeline, silently. The run-in begins some
records earlier still, for only what stands before a record tells whether it is the next one. When it turns
out that the last record *taken* is older than the record before the offset, which overtook a failed one
after a silence, it all begins again from the time of that one.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from processors.pipeline import RUN_IN_RECORDS, Pipeline
from processors.settings import PipelineSettings
from schemas.events import NS_PER_MS
from schemas.raw import NotARawRecord, RawRecord, from_kafka
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings


class Log(Protocol):
    """A partition of the raw topic, as a rebuild reads it; `begin` is the first offset there is."""

    begin: int

    async def timestamp_ms(self, offset: int) -> int:
        """The timestamp of the record at an offset."""

    async def first_since(self, timestamp_ms: int) -> int | None:
        """The first record, in the order of offsets, that is not older; None: there is none."""

    def records(self, first: int, end: int) -> AsyncIterator[RawRecord]:
        """The raw records from `first` to before `end`; what is no raw record is left out."""


async def replay(
    log: Log, partition: int, settings: PipelineSettings, offset: int, run_in: int = RUN_IN_RECORDS
) -> Pipeline:
    """The pipeline as it stands before `offset`. Pure but for what the log does."""
    newest_ms = await log.timestamp_ms(offset - 1) if offset > log.begin else 0
    while True:
        memory_ms = -(-Pipeline(partition, settings).memory_ns // NS_PER_MS)
        found = await log.first_since(max(0, newest_ms - memory_ms))
        first = max(log.begin, min(offset, offset if found is None else found) - run_in)
        state = Pipeline(partition, settings, run_in if first else 0)
        async for record in log.records(first, offset):
            state.process(record)
        taken_ms = state.taken_ms or 0
        if first == log.begin or taken_ms >= newest_ms:
            state.counts.clear()
            return state
        newest_ms = taken_ms


async def rebuild(settings: Settings, pipeline: PipelineSettings, place: TopicPartition, offset: int) -> Pipeline:
    """The pipeline as it stands before `offset`. Gives way between fetches. Raises TapedeckError."""
    reader = await kafka.consumer(settings, place)
    try:
        begin = (await reader.beginning_offsets([place]))[place]
        return await replay(_KafkaLog(reader, place, begin), place.partition, pipeline, offset)
    except KafkaError as error:
        raise TapedeckError(f"the state of {place} cannot be rebuilt: {error}") from error
    finally:
        await reader.stop()


class _KafkaLog:
    def __init__(self, reader: AIOKafkaConsumer, place: TopicPartition, begin: int) -> None:
        self._reader = reader
        self._place = place
        self.begin = begin

    async def timestamp_ms(self, offset: int) -> int:
        self._reader.seek(self._place, offset)
        timestamp: int = (await self._reader.getone(self._place)).timestamp
        return timestamp

    async def first_since(self, timestamp_ms: int) -> int | None:
        found = (await self._reader.offsets_for_times({self._place: timestamp_ms}))[self._place]
        return found.offset if found else None

    async def records(self, first: int, end: int) -> AsyncIterator[RawRecord]:
        self._reader.seek(self._place, first)
        position = first
        while position < end:
            batches = await self._reader.getmany(self._place, timeout_ms=1000, max_records=500)
            for record in batches.get(self._place, ()):
                if record.offset >= end:
                    break
                try:
                    yield from_kafka(record.partition, record.timestamp, record.headers, record.value)
                except NotARawRecord:
                    continue
            position = await self._reader.position(self._place)
            await asyncio.sleep(0)
