"""`tapedeck status` on a real Kafka and a real PostgreSQL, and with either away."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
from conftest import Publish, Spawn
from pydantic import SecretStr
from sinking import ANOMALY, GAP, bar, quote, reaches, sinking, trade

from schemas import topics
from sinks import tables
from tapedeck import database
from tapedeck.embedded.ports import free_ports
from tapedeck.settings import Settings

AWAY_URL = SecretStr("postgresql://someone:secret@127.0.0.1:1/tape")


async def status(spawn: Spawn, *options: str, code: int, **others: Any) -> str:
    """What it said."""
    process = spawn("status", *options, **others)
    ended = await asyncio.to_thread(process.ended, 60)
    said = process.log.read_text()
    assert ended == code, said
    assert "Traceback" not in said
    assert "secret" not in said
    return said


async def test_it_tells_of_topics_tables_and_archive(
    settings: Settings, publish: Publish, spawn: Spawn, tmp_path: Path
) -> None:
    await database.prepare(settings)
    await publish(topics.TRADES, 0, [trade(n) for n in range(5)] + [trade(9, symbol="ETH-USD"), b"no trade"])
    await publish(topics.QUOTES, 0, [quote(3)])
    await publish(topics.BARS_1M, 0, [bar(flags=["gap", "partial"])])
    await publish(topics.GAPS, 0, [GAP, msgspec.structs.replace(GAP, partition=4, n=9)])  # its number is each one's own
    await publish(topics.ANOMALIES, 0, [ANOMALY])
    async with sinking(settings):
        db = await database.open_connection(settings)
        for table, records in {tables.TRADES: 7, tables.QUOTES: 1, tables.BARS: 1, tables.GAPS: 2}.items():
            await reaches(db, table, records)
        await reaches(db, tables.ANOMALIES, 1)
        await asyncio.sleep(1.5)  # the offsets that Kafka knows are shown once a second
        db.terminate()
    await publish(topics.TRADES, 1, [trade(n, 1) for n in range(3)])
    said = await status(spawn, code=0)
    for text in ("trades.v1", "sink-crypto_trades 3", "BTC-USD", "reconnect", "price_spike 1", "sink_dead_letters 1"):
        assert text in said
    found = json.loads(await status(spawn, "--json", code=0, archive_url=SecretStr(str(tmp_path / "archive"))))
    (topic,) = (entry for entry in found["topics"] if entry["name"].endswith("trades.v1"))
    assert (topic["records"], topic["lag"]) == (10, {"sink-crypto_trades": 3})
    assert topic["bytes"] > 0
    newest = {(row["table"], row["symbol"]): row["time_ns"] for row in found["tables"]["newest"]}
    assert newest["crypto_trades", "BTC-USD"] == trade(4).ts_event
    assert newest["crypto_trades", "ETH-USD"] == trade(9).ts_event
    assert newest["crypto_aggregates", "BTC-USD"] == bar().start
    assert found["tables"]["minutes_with_gap"] == 1
    assert found["tables"]["gaps"] == {"reconnect": 1}
    assert all(size["bytes"] > 0 for size in found["tables"]["sizes"])
    assert [archived["files"] for archived in found["archive"]] == [0, 0]


async def test_nothing_yet_is_no_failure_and_who_is_away_is_named_while_the_other_is_shown(
    settings: Settings, publish: Publish, spawn: Spawn
) -> None:
    nothing = {"topic_prefix": "nobody."}
    said, no_kafka, no_database, wrong = await asyncio.gather(
        status(spawn, code=0, **nothing),
        status(spawn, code=1, kafka_bootstrap_servers=f"127.0.0.1:{free_ports(1)[0]}"),
        status(spawn, code=1, database_url=AWAY_URL),
        status(
            spawn,
            code=1,
            database_url=SecretStr("postgresql://someone:secret/@127.0.0.1/tape"),
            archive_url=SecretStr("ftp://someone:secret@127.0.0.1/tape"),
        ),
    )
    assert "no topics yet" in said
    assert "no tables yet" in said
    assert "Kafka at 127.0.0.1" in no_kafka
    assert "no tables yet" in no_kafka
    assert "PostgreSQL at 127.0.0.1:1/tape cannot be asked" in no_database
    assert "raw.crypto.v1" in no_database
    assert "raw.crypto.v1" in wrong
    assert {"DATABASE_URL", "ARCHIVE_URL"} <= set(wrong.split())
