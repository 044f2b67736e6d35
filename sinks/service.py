"""A sink process: one independent consumer for each table, batches in, transactions out."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import asyncpg
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from sinks import writer
from sinks.assignment import Assignment, member
from sinks.tables import ALL, Table
from tapedeck import database, kafka, metrics, topicids
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()

RETRY_S = 0.25  # and twice as long after each failure in turn
MOST_RETRY_S = 5.0
IDLE_MS = 100
GATHER_MS = 5  # how long a record may wait for others when the database is idle again
STEP = 100  # records to read before the writing goes on, whose every answer waits for them
MOST_BYTES = 16 * 1024**2  # of a batch, give or take what one read brings
SLOW_S = 5.0
FETCH_MS = 50
STOP_S = 0.5  # for leaving the group; a broker that is away or rebalances would take much longer
SHOW_S = 1.0
#: A batch took too long: for us, or for a limit of the server's.
TOO_LONG = (TimeoutError, asyncpg.QueryCanceledError)
STALL_S = 30.0  # aiokafka's fetching has ended in silence (its issue 983): look whether nothing came for nothing


#: A record, and the row it makes; None for a marker.
_Entry = tuple[Any, bytes | writer.Refused | None]


class Sink:
    """Reads the topics of one table into it, from the offsets that the table's database holds.

    While the database works at a batch the next one gathers: a lone record is written at once, a flood in large
    batches, and what gathers is bounded, so a database that is slow or away holds up the reading and nothing else.
    """

    def __init__(self, shell: Shell, table: Table) -> None:
        self._shell = shell
        self._settings: Settings = shell.settings
        self._table = table
        self._topics = [self._settings.topic_prefix + topic.name for topic in table.topics]
        self._assignment = Assignment()
        self._connection: asyncpg.Connection | None = None
        self._positioned: set[TopicPartition] | None = None  # the assignment that the positions are for
        self._positions: dict[TopicPartition, int] = {}
        self._gathered: list[_Entry] = []
        self._size = 0  # of what gathered, in characters
        self._writing: asyncio.Task[None] | None = None
        self._in_hand, self._since = 0, 0.0  # how many records the database works at, and since when
        self._most = self._settings.sink_batch_rows  # to a batch
        self._quick_s = SLOW_S  # after one that took less they may grow
        self._repeats = False  # in the batch before
        self._failures = 0
        self._shown: dict[TopicPartition, int] = {}
        self._show_at = 0.0
        self._showing: asyncio.Task[None] | None = None
        self._moved_at = 0.0

    async def run(self) -> None:
        """Until cancelled, which drops the batch in hand. Raises TapedeckError, UsageError, KafkaError."""
        self._shell.health[self._table.name] = "no partitions yet"
        largest = max(topic.max_message_bytes for topic in self._table.topics)
        consumer = member(self._settings, self._table.name, FETCH_MS, largest)
        try:
            await consumer.start()
            consumer.subscribe(self._topics, listener=self._assignment)
            while True:
                await self._turn(consumer)
        finally:
            for task in filter(None, (self._writing, self._showing)):
                task.cancel()
            if self._connection is not None:
                self._connection.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await consumer.stop()

    async def _turn(self, consumer: AIOKafkaConsumer) -> None:
        """Some records. What goes wrong with Kafka or the database drops what was not written, and reading goes on
        from the offsets in the database."""
        try:
            places = self._assignment.places
            if places is not None and places is not self._positioned:
                await self._written()
                await self._position(consumer, places)
            # Without partitions as well: who does not ask for records for five minutes is out of the group.
            step = min(STEP, self._most - len(self._gathered))
            batch = await consumer.getmany(timeout_ms=GATHER_MS if self._gathered else IDLE_MS, max_records=step)
            await asyncio.sleep(0)  # `getmany` does not wait while it holds records, and the writing needs its turns
            # Records that came with another assignment are not from our positions on, but from Kafka's.
            if self._positioned is None or self._positioned is not self._assignment.places:
                return
            records = [record for each in batch.values() for record in each]
            self._gather(records)
            await self._pass_on(more=len(records) == step)
            self._show(consumer)
            if batch:
                self._moved_at = time.monotonic()
            elif time.monotonic() - self._moved_at > STALL_S:
                await self._look_for_stall(consumer)
        except writer.Fenced as error:
            log.warning("another sink has taken over, reading positions anew", detail=str(error))
            metrics.SINK_ERRORS.labels(self._table.name).inc()
            self._forget()
        except (NoOffsetForPartitionError, OffsetOutOfRangeError):
            self._forget()  # of a new assignment, or the log was cut off: `_position` will see
        except (*database.AWAY, asyncpg.PostgresError) as error:
            await self._trouble("database", error)
        except KafkaError as error:
            if not kafka.passing(error) and not isinstance(error, KafkaTimeoutError):
                raise
            await self._trouble("Kafka", error)

    async def _position(self, consumer: AIOKafkaConsumer, places: set[TopicPartition]) -> None:
        """Seeks every assigned partition to where its table stands."""
        self._forget()
        if self._connection is None or self._connection.is_closed():
            self._connection = await database.open_connection(self._settings)
            await writer.stage(self._connection, self._table)
        positions = await writer.offsets(self._connection, self._table, places)
        ids = await topicids.ids_of(self._settings, self._topics)
        for place, at in (await writer.foreign(self._connection, self._table, ids)).items():
            raise UsageError(
                f"{self._table.name} stands at offset {at} of a {place.topic}[{place.partition}] that is no more: "
                "Kafka or the topic began anew, and this database belongs to the one before"
            )
        begins, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
        for place in places:
            at = positions[place]
            if at > ends[place]:
                raise UsageError(
                    f"{self._table.name} stands at offset {at} of {place.topic}[{place.partition}], which ends at "
                    f"{ends[place]}: this database belongs to another Kafka (or its log was lost)"
                )
            if at < begins[place]:
                await self._lose(place, at, begins[place])
                positions[place] = begins[place]
        if places is not self._assignment.places:
            return  # it changed meanwhile
        for place in places:
            consumer.seek(place, positions[place])
        self._positions, self._positioned = positions, places
        self._moved_at = time.monotonic()
        self._well()

    async def _lose(self, place: TopicPartition, at: int, begin: int) -> None:
        await writer.lose(self._connection, self._table, place, at, begin)
        metrics.SINK_LOST.labels(self._table.name).inc(begin - at)
        log.error(
            "the log was overtaken by retention: these records are not in the table; `tapedeck rebuild` makes them "
            "anew where the raw log or the archive still has them",
            table=self._table.name,
            place=f"{place.topic}[{place.partition}]",
            from_offset=at,
            to_offset=begin,
        )

    def _gather(self, records: Sequence[Any]) -> None:
        line = self._table.line
        for record in records:
            made: bytes | writer.Refused | None
            try:
                made = line(record.value or b"")  # b"" for a null, which is no event either
            except (ValueError, RecursionError) as error:
                made = writer.Refused(record, repr(error))
            self._gathered.append((record, made))
            self._size += len(record.value or b"")

    async def _pass_on(self, more: bool) -> None:
        """To the database, as soon as it is through with the batch before and no `more` are at hand; waits for it when
        enough has gathered."""
        full = len(self._gathered) >= self._most or self._size >= MOST_BYTES
        if full or (not more and (self._writing is None or self._writing.done())):
            await self._written()
            if self._gathered:
                self._in_hand, self._since = len(self._gathered), time.monotonic()
                self._writing = asyncio.create_task(self._store(self._gathered))
                self._gathered, self._size = [], 0

    async def _written(self) -> None:
        """Waits for the batch that the database has, and raises what went wrong with it. After one that took too long
        they are half as large, or it would be tried for ever; after quick ones they grow again."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            await asyncio.wait({writing}, timeout=SLOW_S)
            if not writing.done():
                self._shell.health[self._table.name] = f"database: slow, a batch takes more than {SLOW_S:g} s"
            await writing
        except TOO_LONG:
            self._most = max(1, self._in_hand // 2)
            self._quick_s = min(SLOW_S, (time.monotonic() - self._since) / 2)  # one twice as large is in time too
            raise
        finally:
            writing.cancel()
        if time.monotonic() - self._since < self._quick_s:
            self._most = max(self._most, min(2 * self._in_hand, self._settings.sink_batch_rows))
        self._well()

    def _forget(self) -> None:
        """What was read and not written will be read again."""
        self._positioned, self._gathered, self._size = None, [], 0

    def _well(self) -> None:
        self._failures = 0
        self._shell.health[self._table.name] = None

    async def _store(self, entries: Sequence[_Entry]) -> None:
        """Writes them; what the database refuses is found by halving, and kept beside with the reason."""
        # Place by place, in order: the last offset of each is the one that stays.
        ends = {(record.topic, record.partition): record.offset + 1 for record, _ in entries}
        moves = {(at := TopicPartition(*place)): (self._positions[at], end) for place, end in ends.items()}
        lines = [made for _, made in entries if isinstance(made, bytes)]
        refused = [made for _, made in entries if isinstance(made, writer.Refused)]
        started = time.perf_counter()
        try:
            changed = await writer.write(self._connection, self._table, lines, moves, refused, self._repeats)
        except asyncpg.PostgresError as error:
            if not lines or not writer.row_is_refused(error):
                raise
            if len(entries) > 1:
                middle = len(entries) // 2
                await self._store(entries[:middle])
                await self._store(entries[middle:])
            else:
                record, _ = entries[0]
                await self._store([(record, writer.Refused(record, f"{type(error).__name__}: {error}"))])
            return
        self._positions |= {place: new for place, (_, new) in moves.items()}
        self._repeats = changed < len(lines)
        name = self._table.name
        metrics.COMMIT_SECONDS.labels(name).observe(time.perf_counter() - started)
        metrics.ROWS.labels(name).inc(changed)
        metrics.ROW_DUPLICATES.labels(name).inc(len(lines) - changed)
        metrics.NEWEST_ROW.labels(name).set(max(record.timestamp for record, _ in entries) / 1000)
        for record, reason in refused:
            metrics.SINK_DEAD_LETTERS.labels(name).inc()
            log.error(
                "a record makes no row: it is kept in sink_dead_letters",
                place=f"{record.topic}[{record.partition}]@{record.offset}",
                error=reason[:200],
            )

    def _show(self, consumer: AIOKafkaConsumer) -> None:
        """Sets the metric, and now and then Kafka's own offsets: those are for display, so failing is fine, and nobody
        waits for it."""
        lag = 0
        for place in consumer.assignment():
            end = consumer.highwater(place)
            if end is not None:
                lag += max(0, end - self._positions.get(place, end))
        metrics.SINK_LAG.labels(self._table.name).set(lag)
        if self._positions and self._positions != self._shown and time.monotonic() >= self._show_at:
            self._show_at = time.monotonic() + SHOW_S
            self._showing = asyncio.create_task(self._commit(consumer, dict(self._positions)))

    async def _commit(self, consumer: AIOKafkaConsumer, shown: dict[TopicPartition, int]) -> None:
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(SHOW_S / 4):  # aiokafka would try again for ever
                await consumer.commit(shown)
            self._shown = shown

    async def _look_for_stall(self, consumer: AIOKafkaConsumer) -> None:
        self._moved_at = time.monotonic()
        ends = await consumer.end_offsets(self._positioned)
        if self._positioned is not self._assignment.places:
            return
        if late := [
            f"{place.topic}[{place.partition}]" for place, end in ends.items() if await consumer.position(place) < end
        ]:
            raise TapedeckError(f"{', '.join(sorted(late))}: records wait, none came for {STALL_S:g} s")

    async def _trouble(self, what: str, error: BaseException) -> None:
        """Something is away or said no: nothing was written, so go back and try again."""
        error = error.__context__ or error  # asyncpg's last word about a lost connection hides why it was lost
        if not (self._shell.health[self._table.name] or "").startswith(what):
            log.warning(f"trouble with {what}: the rows wait in Kafka", table=self._table.name, error=repr(error))
        self._shell.health[self._table.name] = f"{what}: {error!r}"
        metrics.SINK_ERRORS.labels(self._table.name).inc()
        self._forget()
        if what == "database" and self._connection is not None:
            self._connection.terminate()
            self._connection = None
        await asyncio.sleep(min(MOST_RETRY_S, RETRY_S * 2**self._failures))
        self._failures += 1


def tables_of(name: str) -> Sequence[Table]:
    """The tables that `tapedeck sink NAME` writes."""
    return [table for table in ALL if name in ("all", table.sink)]


async def run(shell: Shell, name: str) -> None:
    """`tapedeck sink`. Raises UsageError, TapedeckError."""
    work = asyncio.create_task(_work(shell, name))
    try:
        await shell.until_stopped(work)
    finally:
        work.cancel()
        await asyncio.wait({work}, timeout=2 * STOP_S)  # a frozen database does not even roll back
    log.info("stopped")


async def _work(shell: Shell, name: str) -> None:
    tables = tables_of(name)
    works = [Sink(shell, table).run for table in tables]
    if name == "archive" or (name == "all" and shell.settings.archive_url):
        from sinks.archive import ArchiveSink  # pyarrow takes its time to load, and only this needs it

        works.append(ArchiveSink(shell).run)
    if tables:
        await database.prepare(shell.settings)
    await kafka.prepare(shell.settings)
    sinks = [asyncio.create_task(work()) for work in works]
    try:
        await asyncio.gather(*sinks)
    except KafkaError as error:
        raise TapedeckError(f"Kafka at {shell.settings.kafka_bootstrap_servers}: {error}") from error
    finally:
        for sink in sinks:
            sink.cancel()
        await asyncio.wait(sinks)
