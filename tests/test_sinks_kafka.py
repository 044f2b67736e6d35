"""Sinks and the log: made again, cut short by retention, silent."""

import asyncio
import contextlib
import gc
from functools import partial
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from conftest import Publish, until
from sinking import counted, places, reaches, says, sinking, trade, unmake

from schemas import topics
from sinks import assignment, service, tables
from tapedeck import kafka
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell


async def test_a_database_ahead_of_the_log_is_refused(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    await publish(topics.TRADES, 2, [trade(0)])
    topic = settings.topic_prefix + topics.TRADES.name
    await db.execute("INSERT INTO sink_offsets VALUES ('crypto_trades', $1, 2, 7)", topic)
    with pytest.raises(UsageError, match=rf"crypto_trades stands at offset 7 of {topic}\[2\], which ends at 1.*Kafka"):
        await asyncio.wait_for(service.run(Shell(settings, "sink"), "trades"), 10)


async def test_a_topic_made_again_is_refused_though_it_is_longer_than_the_one_before(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    await publish(topics.TRADES, 2, [trade(0)])
    for _ in range(2):  # the second finds what the first has noted
        async with sinking(settings, "trades"):
            await reaches(db, tables.TRADES, 1)
    topic = settings.topic_prefix + topics.TRADES.name
    await unmake(settings, topics.TRADES)
    await kafka.prepare(settings)
    await publish(topics.TRADES, 2, [trade(n) for n in range(5, 9)])
    with pytest.raises(UsageError, match=rf"stands at offset 1 of a {topic}\[2\] that is no more"):
        await asyncio.wait_for(service.run(Shell(settings, "sink"), "trades"), 60)
    assert await places(db, tables.TRADES) == {(0, 0)}


async def test_an_empty_topic_made_again_under_a_running_sink_is_read(
    settings: Settings, publish: Publish, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the sink has no partitions, which is no reason to complain each second."""
    monkeypatch.setattr(assignment, "METADATA_MS", 500)
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with sinking(settings, "trades") as shell:
        await until(lambda: says(shell, None), 60)
        await asyncio.sleep(2 * service.SHOW_S)
        await unmake(settings, topics.TRADES)
        await asyncio.sleep(3)
        await kafka.prepare(settings)
        await publish(topics.TRADES, 2, [trade(0)])
        await reaches(db, tables.TRADES, 1)
    gc.collect()  # an error that nobody asked for is told of when its task goes
    assert not complaints


async def test_what_retention_took_is_passed_over_and_noted(
    settings: Settings, publish: Publish, db: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    before = counted("lost_records", tables.TRADES)
    await publish(topics.TRADES, 2, [trade(n) for n in range(5)])
    admin = AIOKafkaAdminClient(**settings.kafka_options())
    await admin.start()
    place = TopicPartition(settings.topic_prefix + topics.TRADES.name, 2)
    await admin.delete_records({place: RecordsToDelete(before_offset=3)})
    await admin.close()
    async with sinking(settings, "trades"):
        await reaches(db, tables.TRADES, 5)
    assert await places(db, tables.TRADES) == {(0, 3), (0, 4)}
    assert "overtaken by retention" in capsys.readouterr().out
    lost = await db.fetch("SELECT sink, topic, partition, from_offset, to_offset FROM sink_losses")
    assert [tuple(row) for row in lost] == [("crypto_trades", *place, 0, 3)]
    assert counted("lost_records", tables.TRADES) - before == 3


class Watched(AIOKafkaConsumer):  # type: ignore[misc]
    """The last one made, for a test that must break it."""

    last: "Watched"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        Watched.last = self


async def test_a_consumer_that_died_in_silence_is_noticed(
    settings: Settings, publish: Publish, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "AIOKafkaConsumer", Watched)
    monkeypatch.setattr(service, "STALL_S", 0.5)
    task = asyncio.create_task(service.run(Shell(settings, "sink"), "trades"))
    await publish(topics.TRADES, 4, [trade(0)])
    await reaches(db, tables.TRADES, 1)
    await asyncio.sleep(1)
    assert not task.done()  # idle, for nothing waits
    Watched.last._fetcher._fetch_task.cancel()  # as aiokafka's issue 983 has it
    await asyncio.sleep(0.1)
    await publish(topics.TRADES, 4, [trade(1)])
    with pytest.raises(TapedeckError, match=r"trades.v1\[4\]: records wait, none came for 0.5 s"):
        await asyncio.wait_for(task, 10)


async def test_a_sink_with_no_partitions_to_read_stays_ready(
    settings: Settings, publish: Publish, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka puts out of the group who has not asked for records for five minutes: here, for half a second."""
    monkeypatch.setattr(assignment, "AIOKafkaConsumer", partial(AIOKafkaConsumer, max_poll_interval_ms=500))
    async with contextlib.AsyncExitStack() as others:
        await asyncio.gather(
            *(others.enter_async_context(sinking(settings, "trades")) for _ in range(topics.PARTITIONS))
        )
        async with sinking(settings, "trades"):
            await asyncio.sleep(2)
            await others.aclose()
            for partition in range(topics.PARTITIONS):
                await publish(topics.TRADES, partition, [trade(0, partition)])
            await reaches(db, tables.TRADES, topics.PARTITIONS)
