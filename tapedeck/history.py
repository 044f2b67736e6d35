"""Where history is read from: a partition of a topic as Kafka has it, or as the archive has it.

Both give the same records under the same offsets, so whoever reads need not know which it is.
"""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord

from schemas.topics import Topic
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings
from tapedeck.spans import HOUR_MS, Part, parts_of

if TYPE_CHECKING:
    from tapedeck.archive import Archive

T = TypeVar("T")
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


def entry_of(record: ConsumerRecord[bytes, bytes]) -> Entry:
    """A record as Kafka's client gives it."""
    return Entry(record.partition, record.offset, record.timestamp, record.key, list(record.headers), record.value)


class History(Protocol):
    """A partition of a topic. `begin` is the first offset there is, `end` the one past the last when it was opened."""

    begin: int
    end: int

    async def first_since(self, timestamp_ms: int) -> int:
        """The offset of the first record, in the order of offsets, that is not older; `end` where there is none."""

    def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        """The records from `first` to before `end`, in order. Gives way between batches."""


async def timestamp_at(log: History, offset: int) -> int:
    """The timestamp (ms) of the record at an offset. Where none has it, for what ends a transaction takes an offset
    too, of the one before, or else of the next. There must be one; raises TapedeckError."""
    for at in chain(range(offset, log.begin - 1, -1), range(offset + 1, log.end)):
        async for entries in log.batches(at, at + 1):
            return entries[0].timestamp_ms
    raise TapedeckError(f"the log has no record at offset {offset}, none before it and none behind it")


def open_history(
    settings: Settings, source: Source, topic: Topic, partition: int
) -> AbstractAsyncContextManager[History]:
    """A partition of a topic, under the prefix of `settings`. Inside it TapedeckError is raised when the source cannot
    be read; UsageError where there is no such source."""
    name = settings.topic_prefix + topic.name
    if source == "archive":
        return _open_archive(settings, name, partition)
    return _open_kafka(settings, TopicPartition(name, partition))


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

    async def first_since(self, timestamp_ms: int) -> int:
        found = (await self._reader.offsets_for_times({self._place: timestamp_ms}))[self._place]
        return found.offset if found else self.end

    async def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        """Raises TapedeckError where retention is faster than the reader."""
        self._reader.seek(self._place, first)
        position = first
        while position < end:
            batches = await self._reader.getmany(self._place, timeout_ms=1000, max_records=BATCH_RECORDS)
            records = batches.get(self._place, ())
            found = records[0].offset if records else await self._reader.position(self._place)
            if found != position:  # at what is now the beginning, or behind what ends a transaction: that has an offset
                begin = (await self._reader.beginning_offsets([self._place]))[self._place]
                if begin > position:
                    raise TapedeckError(
                        f"{self._place.topic}[{self._place.partition}] lost records {position} to {begin - 1} to "
                        "retention while it was being read: run it again, or choose a later time"
                    )
            if entries := [entry_of(record) for record in records if record.offset < end]:
                yield entries
            position = records[-1].offset + 1 if records else found
            await asyncio.sleep(0)


@asynccontextmanager
async def _open_archive(settings: Settings, topic: str, partition: int) -> AsyncIterator[History]:
    from tapedeck.archive import Archive  # pyarrow takes its time to load, and few processes need it

    try:
        archive = Archive(settings)
        log = _Archive(archive, topic, partition)
        await log.look()
        yield log
    except OSError as error:
        raise TapedeckError(f"the archive of {topic}[{partition}] cannot be read: {error}") from error


class _Archive:
    def __init__(self, archive: "Archive", topic: str, partition: int) -> None:
        self._archive = archive
        self._topic = topic
        self._partition = partition
        self._parts: list[Part] = []
        self.begin = self.end = 0

    async def look(self) -> None:
        """Which files there are."""
        spans = await asyncio.to_thread(self._archive.spans, self._topic)
        self._parts = parts_of(span for span in spans if span.partition == self._partition)
        if self._parts:
            self.begin, self.end = self._parts[0].first, self._parts[-1].end

    async def first_since(self, timestamp_ms: int) -> int:
        for part in list(self._parts):
            if timestamp_ms >= (part.span.hour + 1) * HOUR_MS:
                continue
            if timestamp_ms <= part.span.hour * HOUR_MS:
                return part.first
            async for entries in self.batches(part.first, part.end):
                for entry in entries:
                    if entry.timestamp_ms >= timestamp_ms:
                        return entry.offset
        return self.end

    async def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        """Raises TapedeckError where the archive has a hole."""
        position = first
        vanished: Part | None = None
        while position < end:
            part = self._part(position, end)
            try:
                async for entries in _in_thread(self._archive.entries(part)):
                    position = entries[-1].offset + 1
                    yield entries
            except FileNotFoundError:
                if part == vanished:
                    raise
                vanished = part
                await self.look()  # a merge took it: what it had is in another file now
            else:
                position = part.end

    def _part(self, position: int, end: int) -> Part:
        place = bisect_right(self._parts, position, key=lambda part: part.end)
        part = self._parts[place] if place < len(self._parts) else None
        if part is None or part.first > position:
            until = min(end, part.first) if part else end
            raise TapedeckError(
                f"the archive has no records {position} to {until - 1} of {self._topic}[{self._partition}]: Kafka had "
                "deleted them before they were archived. Choose a time before or after them, or --source kafka"
            )
        return Part(part.span, position, min(part.end, end))


async def _in_thread(iterator: Iterator[T]) -> AsyncIterator[T]:
    """What a blocking iterator gives."""
    while (item := await asyncio.to_thread(next, iterator, None)) is not None:
        yield item
