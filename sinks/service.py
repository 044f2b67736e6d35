"""A sink process: one independent consumer for each table, batches in, transactions out."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import asyncpg
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from sinks import writer
from sinks.tables import ALL, Table
from tapedeck import database, kafka, metrics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()

RETRY_S = 0.25


class _Rebalanced(ConsumerRebalanceListener):  # type: ignore[misc]
    """Marks that the assignment is new: positions are then read from the database before anything else."""

    def __init__(self) -> None:
        self.changed = False

    async def on_partitions_revoked(self, revoked: Any) -> None:
        self.changed = True

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self.changed = True


class Sink:
    """Reads one topic into one table, from the offsets that the table's database holds."""

    def __init__(self, shell: Shell, table: Table) -> None:
        self._shell = shell
        self._settings: Settings = shell.settings
        self._table = table
        self._topic = self._settings.topic_prefix + table.topic.name
        self._listener = _Rebalanced()
        self._connection: asyncpg.Connection | None = None
        self._positions: dict[int, int] = {}

    async def run(self) -> None:
        """Until cancelled or stopped. Raises TapedeckError, UsageError, KafkaError."""
        consumer = AIOKafkaConsumer(
            **self._settings.kafka_options(),
            group_id=f"{self._settings.topic_prefix}tapedeck-sink-{self._table.name}",
            enable_auto_commit=False,
            auto_offset_reset="none",
            session_timeout_ms=10_000,
            heartbeat_interval_ms=2_000,
            fetch_max_wait_ms=50,
            max_partition_fetch_bytes=max(self._table.topic.max_message_bytes, 1024**2),
        )
        await consumer.start()
        try:
            consumer.subscribe([self._topic], listener=self._listener)
            while not self._shell.stopping.is_set():
                await self._turn(consumer)
        finally:
            await consumer.stop()
            if self._connection is not None:
                await self._connection.close(timeout=2)

    async def _turn(self, consumer: AIOKafkaConsumer) -> None:
        """One batch. A rebalance or a database error drops it, and reading goes on from the database."""
        try:
            if self._listener.changed or self._connection is None:
                await self._position(consumer)
            if not self._positions:
                await asyncio.sleep(0.05)
                if consumer.assignment():
                    self._listener.changed = True
                return
            batch = await consumer.getmany(
                timeout_ms=int(self._settings.sink_batch_ms), max_records=self._settings.sink_batch_rows
            )
            if batch and not self._listener.changed:
                await self._write(consumer, batch)
            self._lag(consumer)
        except writer.Fenced as error:
            log.warning("another sink has taken over, reading positions anew", detail=str(error))
            metrics.SINK_ERRORS.labels(self._table.name).inc()
            self._listener.changed = True
        except (*database.AWAY, asyncpg.PostgresError) as error:
            await self._trouble(error)

    async def _position(self, consumer: AIOKafkaConsumer) -> None:
        """Seeks every assigned partition to where its table stands."""
        self._listener.changed = False
        if self._connection is None or self._connection.is_closed():
            self._connection = await database.open_connection(self._settings)
            await writer.stage(self._connection, self._table)
        partitions = [place.partition for place in consumer.assignment()]
        self._positions = await writer.offsets(self._connection, self._table, self._topic, partitions)
        places = [TopicPartition(self._topic, partition) for partition in partitions]
        begins, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
        for place in places:
            at = self._positions[place.partition]
            if at > ends[place]:
                raise UsageError(
                    f"{self._table.name} stands at offset {at} of {place.topic}[{place.partition}], which ends at "
                    f"{ends[place]}: this database belongs to another Kafka (or its log was lost)"
                )
            if at < begins[place]:
                log.error("the log was overtaken by retention", place=str(place), lost=[at, begins[place]])
                await writer.write(
                    self._connection, self._table, self._topic, [], {place.partition: (at, begins[place])}
                )
                self._positions[place.partition] = begins[place]
            if place in consumer.assignment():
                consumer.seek(place, self._positions[place.partition])
        self._shell.health[self._table.name] = None

    async def _write(self, consumer: AIOKafkaConsumer, batch: dict[TopicPartition, list[Any]]) -> None:
        connection = self._connection
        assert connection is not None
        moves = {
            place.partition: (self._positions[place.partition], records[-1].offset + 1)
            for place, records in batch.items()
        }
        rows = self._table.rows([record.value for records in batch.values() for record in records])
        started = time.perf_counter()
        changed = await writer.write(connection, self._table, self._topic, rows, moves)
        metrics.COMMIT_SECONDS.labels(self._table.name).observe(time.perf_counter() - started)
        metrics.ROWS.labels(self._table.name).inc(changed)
        metrics.ROW_DUPLICATES.labels(self._table.name).inc(len(rows) - changed)
        self._positions |= {partition: new for partition, (_, new) in moves.items()}
        try:
            await consumer.commit({TopicPartition(self._topic, p): new for p, (_, new) in moves.items()})
        except KafkaError as error:  # for display only: the database's offsets are the ones that count
            log.debug("offsets not shown to Kafka", error=str(error))

    def _lag(self, consumer: AIOKafkaConsumer) -> None:
        lag = 0
        for place in consumer.assignment():
            end = consumer.highwater(place)
            if end is not None:
                lag += max(0, end - self._positions.get(place.partition, end))
        metrics.SINK_LAG.labels(self._table.name).set(lag)

    async def _trouble(self, error: BaseException) -> None:
        """The database is away or said no: nothing was written, so go back and try again."""
        if self._shell.health.get(self._table.name) is None:
            log.warning("the database does not take the rows, they wait in Kafka", error=str(error))
        self._shell.health[self._table.name] = f"database: {error}"
        metrics.SINK_ERRORS.labels(self._table.name).inc()
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
        await asyncio.sleep(RETRY_S)


def tables_of(name: str) -> Sequence[Table]:
    """The tables that `tapedeck sink NAME` writes."""
    return [table for table in ALL if name in ("all", table.sink)]


async def run(shell: Shell, name: str) -> None:
    """`tapedeck sink`. Raises UsageError, TapedeckError."""
    await database.prepare(shell.settings)
    await kafka.prepare(shell.settings)
    tasks = [asyncio.create_task(Sink(shell, table).run()) for table in tables_of(name)]
    try:
        await shell.until_stopped(*tasks)
        await asyncio.gather(*tasks)
    except KafkaError as error:
        raise TapedeckError(f"Kafka at {shell.settings.kafka_bootstrap_servers}: {error}") from error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    log.info("stopped")
