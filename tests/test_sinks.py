"""Sinks on a real Kafka and a real PostgreSQL: what they store, and who may."""

import itertools
import os
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import asyncpg
import msgspec
import pytest
from aiokafka import TopicPartition
from conftest import Publish, until
from sinking import (
    ANOMALY,
    GAP,
    MARKER,
    START_NS,
    D,
    bar,
    counted,
    offsets,
    places,
    quote,
    reaches,
    row_of,
    sinking,
    stored,
    texts,
    trade,
    vendor_bar,
)

from schemas import events, topics
from schemas.events import MINUTE_NS
from sinks import tables, writer
from tapedeck import database
from tapedeck.settings import Settings

# -- what is stored -------------------------------------------------------------------------------


async def test_rows_are_the_events_value_by_value(settings: Settings, publish: Publish, db: asyncpg.Connection) -> None:
    sent: dict[tables.Table, list[Any]] = {
        tables.TRADES: [
            trade(0, price=D("1000000000"), size=D("0.000000000000000001")),
            trade(1, price=D("0.0000000001"), size=D("100000000000000000000"), side="unknown", exchange=0),
            trade(2**53 + 1, ts_event=START_NS + 999, ts_vendor=START_NS + 1, ts_recv=2**62),
            trade(3, trade_id='🚀 "\\\t\n\\N', conditions=[1, 2], flags=["late", 'a "b\\c', ""], symbol="ETH-USD"),
        ],
        tables.QUOTES: [quote(0), quote(1, bid_size=None, ask_size=None, exchange=None, bid_price=D("1E-18"))],
        tables.VENDOR_BARS: [vendor_bar(0), vendor_bar(1, vwap=D("1.23456789012"))],
        tables.ANOMALIES: [ANOMALY, msgspec.structs.replace(ANOMALY, id="b", symbol=None, value=None, start=START_NS)],
        tables.GAPS: [GAP, msgspec.structs.replace(GAP, from_=None, reason="hole", pairs=["BTC-USD"])],
        tables.DEAD_LETTERS: [events.DeadLetter("no", START_NS, "base64", "/w==", -(2**62), 3, 2**40)],
        tables.QUARANTINE: [events.Quarantined("BTC-USD", 2**62, START_NS, 2**60, "utf-8", "{}", 1, 3, 0)],
        tables.BARS: [bar(), bar(2, 3, symbol="ETH-USD", flags=["partial", "late"], quality=D("0.9833"))],
    }
    for table, made in sent.items():
        await publish(table.topics[0], 3, made)
    async with sinking(settings):
        for table, made in sent.items():
            await reaches(db, table, len(made))
    for table, made in sent.items():
        rows = sorted(map(texts, await stored(db, table)), key=repr)
        assert rows == sorted(map(row_of, made), key=repr)


async def test_a_repeated_record_changes_nothing_and_is_counted(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    made = {
        tables.TRADES: trade(0),
        tables.QUOTES: quote(0),
        tables.VENDOR_BARS: vendor_bar(0),
        tables.BARS: bar(),
    }
    before = {table: (counted("rows", table), counted("duplicates", table)) for table in made}
    async with sinking(settings):
        for table, event in made.items():
            await publish(table.topics[0], 0, [event] * 3)
            await reaches(db, table, 3)
            await publish(table.topics[0], 0, [event])  # in a batch of its own
            await reaches(db, table, 4)
    for table, event in made.items():
        assert list(map(texts, await stored(db, table))) == [row_of(event)]
        rows, duplicates = before[table]
        assert (counted("rows", table) - rows, counted("duplicates", table) - duplicates) == (1, 3)


@pytest.mark.parametrize("batch_rows", [1, 7, 5000])
async def test_a_bar_is_replaced_only_by_a_higher_order(
    settings: Settings, publish: Publish, db: asyncpg.Connection, batch_rows: int
) -> None:
    orders = [(0, 0), (0, 2), (1, 0), (1, 1)]
    arrivals = list(itertools.permutations(orders))
    records: list[Any] = []
    for number, arrival in enumerate(arrivals):
        made = [bar(*order, symbol=f"{number}-USD", volume=D(10 * order[0] + order[1] + 1)) for order in arrival]
        records += [*made, MARKER]
    await publish(topics.BARS_1M, 0, records)
    async with sinking(settings, "bars", sink_batch_rows=batch_rows):
        await reaches(db, tables.BARS, len(records))
    rows = await stored(db, tables.BARS)
    assert len(rows) == len(arrivals)  # and so no marker
    assert {(row["repair"], row["revision"], row["volume"]) for row in rows} == {(1, 1, D(12))}


async def test_every_order_of_a_bar_is_kept_in_the_history_and_longer_bars_stand_beside_them(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    await publish(topics.BARS_1M, 0, [bar(0, 1), bar(0, 0), bar(1, 0), bar(0, 1)])
    hour = bar(1, 60, interval="1h", end=START_NS + 60 * MINUTE_NS)
    await publish(topics.ROLLUPS["1h"], 0, [hour])
    async with sinking(settings, "bars"):
        await reaches(db, tables.BARS, 5)
    found = await db.fetch("SELECT interval, repair, revision FROM crypto_aggregates_history ORDER BY 1, 2, 3")
    assert [tuple(row) for row in found] == [("1h", 1, 60), ("1m", 0, 0), ("1m", 0, 1), ("1m", 1, 0)]
    found = await db.fetch("SELECT timeframe, close FROM ohlcv ORDER BY 1")
    assert [tuple(row) for row in found] == [("1h", D(2)), ("1m", D(2))]


async def test_what_people_ask_for_most_is_a_function(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    await publish(topics.TRADES, 0, [trade(5, price=D(7)), trade(9, price=D(8)), trade(2, price=D(9))])
    bars = [bar(start=START_NS + n * MINUTE_NS, close=D(close)) for n, close in enumerate((100, 110, 99))]
    await publish(topics.BARS_1M, 0, bars)
    async with sinking(settings):
        await reaches(db, tables.TRADES, 3)
        await reaches(db, tables.BARS, 3)
    (latest,) = await db.fetch("SELECT price, exchange FROM get_latest_price('BTC-USD')")
    assert tuple(latest) == (D(8), 1)
    assert await db.fetch("SELECT * FROM get_latest_price('NO-USD')") == []
    since = datetime.fromtimestamp(START_NS // 10**9, UTC)
    query = "SELECT close, simple_return FROM calculate_returns('BTC-USD', '1m', $1, $2)"
    found = await db.fetch(query, since, since + timedelta(minutes=3))
    assert [(row["close"], row["simple_return"] and round(row["simple_return"], 9)) for row in found] == [
        (D(100), None),
        (D(110), 0.1),
        (D(99), -0.1),
    ]


GOOD = events.encode(trade(0))
BAD: dict[str, bytes | None] = {
    "null": None,
    "not JSON": b"{",
    "not UTF-8": GOOD.replace(b"0-0", b"\xff"),
    "not a trade": b'{"kind":"minute_closed"}',
    "NUL in a text": GOOD.replace(b"0-0", b"\\u0000"),
    "a number too large": GOOD.replace(b'"n":0', b'"n":9223372036854775808'),
    "an exchange too large": GOOD.replace(b'"exchange":1', b'"exchange":2147483648'),
    "a time no calendar has": GOOD.replace(b'"ts_event":', b'"ts_event":9999'),
    "a decimal too small": GOOD.replace(b'"size":1', b'"size":1e-99999'),
    "a key too long": GOOD.replace(b"0-0", os.urandom(9000).hex().encode()),
    "a nesting bomb": GOOD.replace(b'"n":0', b'"n":0,"new":' + b"[" * 100_000 + b"]" * 100_000),
}


async def test_a_record_that_makes_no_row_is_kept_whole_with_the_reason_and_the_rest_goes_in(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    before = counted("dead_letters", tables.TRADES)
    values = [value for n, bad in enumerate(BAD.values()) for value in (trade(2 * n), bad, trade(2 * n + 1))]
    await publish(topics.TRADES, 5, values)
    async with sinking(settings, "trades"):
        await reaches(db, tables.TRADES, len(values))
    assert {n for _, n in await places(db, tables.TRADES)} == set(range(2 * len(BAD)))
    assert counted("dead_letters", tables.TRADES) - before == len(BAD)
    dead = await db.fetch('SELECT sink, topic, partition, "offset", value, reason FROM sink_dead_letters ORDER BY 4')
    topic = settings.topic_prefix + topics.TRADES.name
    assert [tuple(row)[:5] for row in dead] == [
        ("crypto_trades", topic, 5, 3 * n + 1, value) for n, value in enumerate(BAD.values())
    ]
    assert all(re.match(r"\w+Error\W", row["reason"]) for row in dead), [row["reason"] for row in dead]


async def test_a_row_that_the_database_refuses_is_found_by_halving(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    """However late it says so: here after the offsets were moved."""
    await db.execute("ALTER TABLE crypto_trades ADD CHECK (n <> 77)")
    value = events.encode(trade(77))
    await publish(topics.TRADES, 1, [trade(n) for n in range(77)])
    await publish(topics.TRADES, 1, [value, *(trade(n) for n in range(78, 200))])
    async with sinking(settings, "trades"):
        await reaches(db, tables.TRADES, 200)
    assert {n for _, n in await places(db, tables.TRADES)} == set(range(200)) - {77}
    (dead,) = await db.fetch('SELECT "offset", value, reason FROM sink_dead_letters')
    assert (dead["offset"], dead["value"]) == (77, value)
    assert dead["reason"].startswith("CheckViolationError: ")


async def test_listeners_hear_of_what_was_committed_and_of_a_flood_only_its_size(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    heard: list[tuple[str, Any]] = []
    listener = await asyncpg.connect(settings.database_url.get_secret_value())
    for channel in ("tapedeck_bars", "tapedeck_anomalies"):
        await listener.add_listener(
            channel, lambda _, __, where, told: heard.append((where, msgspec.json.decode(told)))
        )
    async with sinking(settings):
        await publish(topics.BARS_1M, 0, [bar(0, 1)])
        await reaches(db, tables.BARS, 1)
        await publish(topics.BARS_1M, 0, [bar(0, 0), bar(0, 1), MARKER])  # nothing new
        await reaches(db, tables.BARS, 4)
        await publish(topics.ANOMALIES, 0, [ANOMALY])
        await reaches(db, tables.ANOMALIES, 1)
        history = [bar(start=START_NS + n * MINUTE_NS) for n in range(1, 3 * writer.TOLD_ROWS)]
        await publish(topics.BARS_1M, 1, history)
        await reaches(db, tables.BARS, 4 + len(history))

    async def last() -> bool:
        return bool(heard and "many" in heard[-1][1])

    await until(last)
    await listener.close()
    new = {"symbol": "BTC-USD", "interval": "1m", "start": START_NS, "repair": 0, "revision": 1}
    found = {"id": "a", "kind": "price_spike", "severity": "warning", "symbol": "BTC-USD", "ts_event": START_NS}
    assert heard[:2] == [("tapedeck_bars", new), ("tapedeck_anomalies", found)]
    assert sum(told.get("many", 1) for _, told in heard[2:]) == len(history)
    assert len(heard) < writer.TOLD_ROWS


# -- zombies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zombie_is_at", "zombie_brings"),
    [(0, [0, 1]), (5, [5])],
    ids=["behind", "ahead, for the database was set back to a backup"],
)
async def test_a_zombie_writes_nothing_and_without_the_guard_it_would(
    settings: Settings,
    db: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    zombie_is_at: int,
    zombie_brings: list[int],
) -> None:
    """What must hold: the rows are those of the records before the offset, no more and no less."""
    place = TopicPartition(settings.topic_prefix + topics.QUOTES.name, 0)
    owner, zombie = [await database.open_connection(settings) for _ in range(2)]
    for connection in (owner, zombie):
        await writer.stage(connection, tables.QUOTES)
    assert await writer.offsets(owner, tables.QUOTES, [place]) == {place: 0}

    async def write(connection: asyncpg.Connection, at: int, numbers: list[int]) -> None:
        lines = [tables.QUOTES.line(events.encode(quote(n))) or b"" for n in numbers]
        await writer.write(connection, tables.QUOTES, lines, {place: (at, at + len(numbers))})

    async def sound() -> bool:
        (at,) = (await offsets(db, tables.QUOTES)).values()
        return {n for _, n in await places(db, tables.QUOTES)} == set(range(at))

    await write(owner, 0, [0, 1, 2])
    with pytest.raises(writer.Fenced, match=r"quotes\.v1\[0\] are not ours"):
        await write(zombie, zombie_is_at, zombie_brings)
    assert await sound()
    await write(owner, 3, [3])
    assert await sound()

    guard = " AND o.next_offset = m.expected"
    assert guard in writer._MOVE
    monkeypatch.setattr(writer, "_MOVE", writer._MOVE.replace(guard, ""))
    await write(zombie, zombie_is_at, zombie_brings)
    assert not await sound()
    for connection in (owner, zombie):
        await connection.close()


async def test_a_sink_that_was_overtaken_goes_on_from_the_databases_offsets(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    async with sinking(settings, "quotes"):
        await publish(topics.QUOTES, 0, [quote(n) for n in range(3)])
        await reaches(db, tables.QUOTES, 3)
        async with db.transaction():  # as if from a backup
            await db.execute("DELETE FROM crypto_quotes WHERE n > 0")
            await db.execute("UPDATE sink_offsets SET next_offset = 1 WHERE partition = 0")
        await publish(topics.QUOTES, 0, [quote(3)])
        await reaches(db, tables.QUOTES, 4)
    assert {n for _, n in await places(db, tables.QUOTES)} == {0, 1, 2, 3}


async def test_a_record_that_makes_no_row_may_come_again_after_the_offsets_were_set_back(
    settings: Settings, db: asyncpg.Connection
) -> None:
    place = TopicPartition("any", 0)
    record = SimpleNamespace(topic="any", partition=0, offset=0, key=None, value=b"{")
    await writer.offsets(db, tables.QUOTES, [place])
    for _ in range(2):
        await writer.write(db, tables.QUOTES, [], {place: (0, 1)}, [writer.Refused(record, "why")])
        await db.execute("UPDATE sink_offsets SET next_offset = 0")
    assert await db.fetchval("SELECT count(*) FROM sink_dead_letters") == 1
