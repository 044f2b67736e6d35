"""The raw topics into Parquet files, each record once: where a partition stands is what its files' names say.

There is nothing else to keep in step with the files, so there is nothing that a crash could leave half done. The
consumer group only shares the partitions out.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from schemas import topics
from sinks.assignment import Assignment, member
from sinks.merging import Hour, merge, mergeable
from tapedeck import kafka, metrics
from tapedeck.archive import Archive, Damaged, tables_of
from tapedeck.errors import UsageError
from tapedeck.history import Entry, entry_of
from tapedeck.shell import Shell
from tapedeck.spans import HOUR_MS, Part, Span, hour_of

log = structlog.get_logger()

NAME = "archive"
STORAGE = "the archive's storage"
READ_MS = 200
READ_RECORDS = 5_000
FETCH_BYTES = 2 * 1024**2  # of a partition at a time, beside what is held; a single record may be larger
STOP_S = 0.5
SHOW_S = 1.0
RETRY_S, MAX_RETRY_S = 1.0, 30.0  # full disks and lost buckets take somebody's hand

T = TypeVar("T")


class Taken(Exception):
    """Another sink has written what this one was about to write: it has the partition now."""


class StorageAway(Exception):
    """The archive cannot be read or written."""


def cut(place: TopicPartition, position: int, entries: Sequence[Entry]) -> Iterator[tuple[Span, list[Entry]]]:
    """Consecutive records, from `position` on, as files: a new one wherever the hour changes."""
    for hour, group in groupby(entries, lambda entry: hour_of(entry.timestamp_ms)):
        held = list(group)
        span = Span(position, held[-1].offset + 1, hour, place.topic, place.partition)
        position = span.end
        yield span, held


class ArchiveSink:
    """Holds records until there are enough of them for a file, or the oldest has waited long enough."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._settings = shell.settings
        self._archive = Archive(shell.settings)
        self._assignment = Assignment()
        self._positioned: set[TopicPartition] | None = None  # the assignment that all below is for
        self._positions: dict[TopicPartition, int] = {}
        self._hours: dict[TopicPartition, int] = {}  # the newest that has a file
        self._known: set[TopicPartition] = set()  # to hold Kafka's own records
        self._lost: dict[TopicPartition, int] = {}  # up to where that is said
        self._held: dict[TopicPartition, list[Entry]] = {}
        self._bytes = 0
        self._due = 0.0  # when what is held has waited long enough
        self._mergeable: set[Hour] = set()
        self._retry_s = RETRY_S
        self._show_at = 0.0

    async def run(self) -> None:
        """Until cancelled, when it writes what it holds. Raises UsageError, KafkaError."""
        self._shell.health[NAME] = "no partitions yet"
        consumer = member(self._settings, NAME, READ_MS, FETCH_BYTES)
        try:
            with contextlib.suppress(StorageAway):
                await self._store(self._archive.sweep, time.time())
            await consumer.start()
            consumer.subscribe(
                [self._settings.topic_prefix + topic.name for topic in topics.ARCHIVED], listener=self._assignment
            )
            while True:
                await self._turn(consumer)
        finally:
            with contextlib.suppress(Taken, StorageAway):
                await self._write()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await consumer.stop()

    async def _turn(self, consumer: AIOKafkaConsumer) -> None:
        """Some records. What goes wrong drops what is held, and reading goes on from where the files end."""
        try:
            places = self._assignment.places
            if places is not None and places is not self._positioned:
                await self._position(consumer, places)
            batch = await consumer.getmany(timeout_ms=READ_MS, max_records=READ_RECORDS)
            # Records that came with another assignment are not from our positions on, but from Kafka's.
            if self._positioned is None or self._positioned is not self._assignment.places:
                return
            for place, records in batch.items():
                self._hold(place, records)
            if self._bytes >= self._settings.archive_bytes or (self._held and time.monotonic() >= self._due):
                await self._write()
            if self._mergeable:
                await self._merge(self._mergeable.pop())
            await self._show(consumer)
        except Taken as error:
            log.warning("another sink has taken over, reading positions anew", detail=str(error))
            metrics.SINK_ERRORS.labels(NAME).inc()
            self._positioned = None
        except (NoOffsetForPartitionError, OffsetOutOfRangeError):
            self._positioned = None  # of a new assignment, or the log was cut off: `_position` will see
        except StorageAway as error:
            await self._trouble(STORAGE, error.__cause__ or error)
        except KafkaError as error:
            if not kafka.passing(error):
                raise
            await self._trouble("Kafka", error)

    async def _position(self, consumer: AIOKafkaConsumer, places: set[TopicPartition]) -> None:
        """Seeks every assigned partition to where its files end."""
        self._held, self._bytes = {}, 0
        listed = [await self._store(self._archive.spans, topic) for topic in {place.topic for place in places}]
        spans = [span for found in listed for span in found if TopicPartition(span.topic, span.partition) in places]
        begins, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
        positions = dict.fromkeys(places, 0)
        hours: dict[TopicPartition, int] = {}
        last: dict[TopicPartition, Span] = {}
        for span in sorted(spans, key=lambda span: span.end):
            place = TopicPartition(span.topic, span.partition)
            positions[place], last[place] = span.end, span
            hours[place] = max(hours.get(place, span.hour), span.hour)
        for place, at in positions.items():
            if at > ends[place]:
                raise UsageError(
                    f"the archive holds {place.topic}[{place.partition}] up to offset {at}, and Kafka's ends at "
                    f"{ends[place]}: it belongs to another Kafka (or its log was lost). Set another ARCHIVE_URL"
                )
        await self._compare(last, begins, ends)
        for place, at in positions.items():
            if at < begins[place]:
                self._lose(place, at, begins[place])
                positions[place] = begins[place]
        if places is not self._assignment.places:
            return  # it changed meanwhile
        for place in places:
            consumer.seek(place, positions[place])
        self._positions, self._positioned, self._hours = positions, places, hours
        self._mergeable = {
            (topic, partition, hour)
            for topic, partition, hour in mergeable(spans)
            if hour < hours[TopicPartition(topic, partition)]
        }
        if not (self._shell.health[NAME] or "").startswith(STORAGE):  # that is over when something was written
            self._shell.health[NAME] = None

    async def _compare(
        self, last: dict[TopicPartition, Span], begins: dict[TopicPartition, int], ends: dict[TopicPartition, int]
    ) -> None:
        """Raises UsageError where the archive's last record is not the one that Kafka has under its offset: a log that
        began anew and has grown past the archive would go on from the middle. Where retention took that record, the
        next that there is must not be older than the skew that both topics allow. Once for each place."""
        offsets = {place: max(span.end - 1, begins[place]) for place, span in last.items()}
        asked = {place: at for place, at in offsets.items() if place not in self._known and at < ends[place]}
        if not asked:
            return
        for place, record in (await kafka.records_at(self._settings, asked)).items():
            try:
                ours, theirs = await self._store(self._last, last[place]), entry_of(record)
            except Damaged as error:
                log.error("the archive cannot be compared with Kafka", error=str(error))
                continue
            if theirs != ours if theirs.offset == ours.offset else theirs.timestamp_ms < ours.timestamp_ms - HOUR_MS:
                raise UsageError(
                    f"{place.topic}[{place.partition}] has another record at offset {theirs.offset} than the archive: "
                    "Kafka or the topic began anew, and the archive holds the log before. Set another ARCHIVE_URL"
                )
        self._known |= asked.keys()

    def _last(self, span: Span) -> Entry:
        (entry,) = next(self._archive.entries(Part(span, span.end - 1, span.end)))
        return entry

    def _lose(self, place: TopicPartition, at: int, begin: int) -> None:
        """Tells of it once, though it is met at each assignment until a file lies behind it."""
        since, self._lost[place] = max(at, self._lost.get(place, 0)), begin
        if since < begin:
            metrics.SINK_LOST.labels(NAME).inc(begin - since)
            log.error(
                "the log was overtaken by retention: the archive has a hole",
                place=f"{place.topic}[{place.partition}]",
                lost=[since, begin],
            )

    def _hold(self, place: TopicPartition, records: Sequence[Any]) -> None:
        if not self._held:
            self._due = time.monotonic() + self._settings.archive_seconds
        self._held.setdefault(place, []).extend(map(entry_of, records))
        self._bytes += sum(len(record.value or b"") + 200 for record in records)

    async def _write(self) -> None:
        """All that is held, in the order of offsets, so that what is cut off leaves no hole."""
        while self._held:
            place, entries = next(iter(self._held.items()))
            for span, part in list(cut(place, self._positions[place], entries)):
                started = time.perf_counter()
                size = await self._store(self._put, span, part)
                self._positions[place] = span.end
                del entries[: len(part)]
                metrics.COMMIT_SECONDS.labels(NAME).observe(time.perf_counter() - started)
                metrics.ROWS.labels(NAME).inc(len(part))
                metrics.NEWEST_ROW.labels(NAME).set(part[-1].timestamp_ms / 1000)
                metrics.ARCHIVE_BYTES.inc(size)
                newest = self._hours.setdefault(place, span.hour)
                if span.hour != newest:
                    self._mergeable.add((*place, min(span.hour, newest)))
                    self._hours[place] = max(span.hour, newest)
            del self._held[place]
        self._bytes = 0
        self._retry_s = RETRY_S
        self._shell.health[NAME] = None

    def _put(self, span: Span, entries: Sequence[Entry]) -> int:
        """Raises Taken. Who else had the partition meanwhile began at the same record, so in the same folder. Should
        he write between this look and our file, both are there for a while, and each record is read from one."""
        for other in self._archive.hour(span.topic, span.hour, span.partition):
            if other.overlaps(span):
                raise Taken(f"{span.path}: there is {other.path}")
        return self._archive.put(span, tables_of(entries))

    async def _merge(self, hour: Hour) -> None:
        """Or not: a damaged file, or a disk with no room for a large one, is no reason to archive nothing any more."""
        try:
            await self._store(merge, self._archive, hour)
        except (Damaged, StorageAway) as error:
            log.error("small files are left as they are", error=str(error.__cause__ or error))

    async def _store(self, work: Callable[..., T], *arguments: Any) -> T:
        """Raises StorageAway."""
        try:
            return await asyncio.to_thread(work, *arguments)
        except OSError as error:
            raise StorageAway from error

    async def _show(self, consumer: AIOKafkaConsumer) -> None:
        """Sets the metric, and now and then Kafka's own offsets: those are for display, so failing is fine."""
        if time.monotonic() < self._show_at:
            return
        self._show_at = time.monotonic() + SHOW_S
        ends = {place: consumer.highwater(place) for place in self._positions}
        lag = sum(max(0, end - self._positions[place]) for place, end in ends.items() if end is not None)
        metrics.SINK_LAG.labels(NAME).set(lag)
        if not self._positions:
            return  # to commit none is an error to aiokafka
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(STOP_S):
                await consumer.commit(self._positions)

    async def _trouble(self, what: str, error: BaseException) -> None:
        """Nothing of what is held was written, or some whole files of it were: the names will tell."""
        if not (self._shell.health[NAME] or "").startswith(what):
            log.warning(f"trouble with {what}: the records wait in Kafka", table=NAME, error=str(error))
        self._shell.health[NAME] = f"{what}: {error}"
        metrics.SINK_ERRORS.labels(NAME).inc()
        self._positioned = None
        self._held, self._bytes = {}, 0
        await asyncio.sleep(self._retry_s)
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
