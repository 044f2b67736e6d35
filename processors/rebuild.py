"""Recovery is replay: the state at any offset, from the log alone.

Take the timestamp of the record before the offset, step back by the pipeline's memory, start at the first
record at or after that time, and run from there through the same pipeline, silently. The run-in begins some
records earlier still: a record that overtook a failed send may be the first after a long silence, and only
what stands before it tells that it is not the next one.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from processors.pipeline import RUN_IN_RECORDS, Pipeline
from processors.settings import PipelineSettings
from schemas.events import NS_PER_MS
from schemas.raw import NotARawRecord, from_kafka
from schemas.raw import RawRecord
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings


class Log(Protocol):
    """A partition of the raw topic, as a rebuild reads it; `begin` is its first offset."""

    begin: int

    async def timestamp_ms(self, offset: int) -> int:
        """Of the record at an offset."""

    async def first_since(self, timestamp_ms: int) -> int | None:
        """The first offset, in the order of offsets, whose timestamp is not before; None: there is none."""

    def records(self, first: int, end: int) -> AsyncIterator[RawRecord]:
        """The raw records from `first` to before `end`."""


async def replay(log: Log, partition: int, settings: PipelineSettings, offset: int, run_in: int = RUN_IN_RECORDS) -> Pipeline:
    state = Pipeline(partition, settings, lenient=log.begin > 0)
    if offset <= log.begin:
        return state
    since_ms = max(0, await log.timestamp_ms(offset - 1) - state.memory_ns // NS_PER_MS)
    found = await log.first_since(since_ms)
    start = min(offset, found if found is not None else offset)
    first = max(log.begin, start - run_in)
    at = first
    async for record in log.records(first, offset):
        state.lenient = first > 0 and (at < start or at == first)
        state.process(record)
        at += 1
    state.lenient = False
    return state
