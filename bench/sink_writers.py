"""One writer of trades, as a process of its own: `tapedeck`'s sink, or one of the two ways that come to mind first.

All read the same topic from its beginning with the same client and loop, decode every trade and write batches of at
most 5,000 over one connection; clock: first records fetched until the last are committed. Prints {"seconds", "cpu_s"}.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition

from schemas import events, topics
from sinks import assignment, service, tables
from tapedeck import database, settings
from tapedeck.garbage import collect_seldom
from tapedeck.shell import Shell

BATCH = 5_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Write = Callable[[asyncpg.Connection, Sequence[tuple[Any, ...]]], Awaitable[Any]]


class Timed(AIOKafkaConsumer):  # type: ignore[misc]
    """Notes when the first records came, by wall and by CPU."""

    first, cpu = 0.0, 0.0

    async def getmany(self, *places: TopicPartition, **options: Any) -> dict[TopicPartition, list[Any]]:
        batch: dict[TopicPartition, list[Any]] = await super().getmany(*places, **options)
        if batch and not Timed.first:
            Timed.first, Timed.cpu = time.perf_counter(), time.process_time()
        return batch


async def tapedeck(total: int) -> None:
    collect_seldom()  # as the process of a sink does
    assignment.AIOKafkaConsumer = Timed  # type: ignore[misc]
    sink = service.Sink(Shell(settings.load(), "sink"), tables.TRADES)
    running = asyncio.create_task(sink.run())
    while sum(sink._positions.values()) < total:
        await asyncio.wait({running}, timeout=0.01)
        if running.done():
            running.result()
    running.cancel()


def rows(values: Sequence[bytes]) -> list[tuple[Any, ...]]:
    return [
        (EPOCH + timedelta(microseconds=trade.ts_event // 1000), *msgspec.structs.astuple(trade))
        for trade in map(events.decode_trade, values)
    ]


COLUMNS = ["time", *(field.name for field in msgspec.structs.fields(events.Trade))]


async def executemany(connection: asyncpg.Connection, made: Sequence[tuple[Any, ...]]) -> None:
    places = ", ".join(f"${number + 1}" for number in range(len(COLUMNS)))
    names = ", ".join(COLUMNS)
    await connection.executemany(f"INSERT INTO crypto_trades ({names}) VALUES ({places}) ON CONFLICT DO NOTHING", made)


async def copy(connection: asyncpg.Connection, made: Sequence[tuple[Any, ...]]) -> None:
    await connection.copy_records_to_table("crypto_trades", records=made, columns=COLUMNS)


async def plainly(total: int, write: Write) -> None:
    """Read, write, read: offsets are committed to Kafka now and then, as is usual."""
    values = settings.load()
    connection = await database.open_connection(values)
    consumer = Timed(
        **values.kafka_options(),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=topics.TRADES.max_message_bytes,
    )
    await consumer.start()
    name = values.topic_prefix + topics.TRADES.name
    consumer.assign([TopicPartition(name, number) for number in range(topics.PARTITIONS)])
    done = 0
    while done < total:
        batch = await consumer.getmany(timeout_ms=100, max_records=BATCH)
        made = rows([record.value for records in batch.values() for record in records])
        if made:
            await write(connection, made)
            done += len(made)
    await consumer.stop()


async def main(mode: str, total: int) -> None:
    if mode == "tapedeck":
        await tapedeck(total)
    else:
        await plainly(total, {"executemany": executemany, "copy": copy}[mode])
    print(json.dumps({"seconds": time.perf_counter() - Timed.first, "cpu_s": time.process_time() - Timed.cpu}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
