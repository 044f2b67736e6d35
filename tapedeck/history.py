"""Where history is read from: a partition of a topic as Kafka has it, or as the archive has it.

Both give the same records under the same offsets, so whoever reads need not know which it is.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, NamedTuple, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from schemas.topics import Topic
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

Source = Literal["kafka", "archive"]
BATCH_RECORDS = 500


class Entry(NamedTuple):
    """A record as the log has it."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    headers: list[tuple[str, bytes]]
    value: bytes | None


class History(Protocol):
    """A partition of a topic. `begin` is the first offset there is, `end` the one past the last when it was opened."""

    begin: int
    end: int

    async def timestamp_ms(self, offset: int) -> int:
        """The timestamp of the record at an offset."""

    async def first_since(self, timestamp_ms: int) -> int:
        """The offset of the first record, in the order of offsets, that is not older; `end` where there is none."""

    def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        """The records from `first` to before `end`, in order. Gives way between batches."""


def open_history(
    settings: Settings, source: Source, topic: Topic, partition: int
) -> AbstractAsyncContextManager[History]:
    """A partition of a topic, under the prefix of `settings`. Inside it TapedeckError is raised when the source cannot
    be read; UsageError where there is no such source."""
    assert source == "kafka"
    return _open_kafka(settings, TopicPartition(settings.topic_prefix + topic.name, partition))


@asynccontextmanager
async def _open_kafka(settings: Settings, place: TopicPartition) -> AsyncIterator[History]:
    try:
        reader = await kafka.consumer(settings, place)
        try:
            begins, ends = await reader.beginning_offsets([place]), await reader.end_offsets([place])
            yield _Kafka(reader, place, begins[place], ends[place])
        finally:
            await reader.stop()
    except KafkaError as error:
        raise TapedeckError(
            f"{place.topic}[{place.partition}] cannot be read from {settings.kafka_bootstrap_servers}: {error}"
        ) from error


class _Kafka:
    def __init__(self, reader: AIOKafkaConsumer, place: TopicPartition, begin: int, end: int) -> None:
        self._reader = reader
        self._place = place
        self.begin, self.end = begin, end

    async def timestamp_ms(self, offset: int) -> int:
        self._reader.seek(self._place, offset)
        timestamp: int = (await self._reader.getone(self._place)).timestamp
        return timestamp

    async def first_since(self, timestamp_ms: int) -> int:
        found = (await self._reader.offsets_for_times({self._place: timestamp_ms}))[self._place]
        return found.offset if found else self.end

    async def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        self._reader.seek(self._place, first)
        position = first
        while position < end:
            batches = await self._reader.getmany(self._place, timeout_ms=1000, max_records=BATCH_RECORDS)
            entries = [
                Entry(r.partition, r.offset, r.timestamp, r.key, list(r.headers), r.value)
                for r in batches.get(self._place, ())
                if r.offset < end
            ]
            if entries:
                yield entries
            position = await self._reader.position(self._place)
            await asyncio.sleep(0)
