"""Sinks on a real Kafka and a real PostgreSQL: each event once, whatever dies."""

import asyncio
import contextlib
import gc
import itertools
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from conftest import Process, Publish, Servers, Spawn, until
from prometheus_client import REGISTRY
from pydantic import SecretStr

from schemas import events, topics
from schemas.events import MINUTE_NS, NS_PER_MS
from sinks import assignment, service, tables, writer
from tapedeck import database, kafka
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

START_NS = 1_723_161_240_000_000_000  # a whole minute
D = Decimal
SYMBOLS = ["BTC-USD", "ETH-USD"]


def trade(n: int, partition: int = 0, **changes: Any) -> events.Trade:
    made = events.Trade(
        symbol="BTC-USD",
        ts_event=START_NS + n * NS_PER_MS,
        ts_recv=START_NS + n * NS_PER_MS + 1,
        ts_vendor=None,
        price=D("61000.1"),
        size=D(1),
        side="buy",
        exchange=1,
        trade_id=f"{partition}-{n}",
        conditions=[],
        flags=[],
        epoch=1,
        partition=partition,
        n=n,
    )
    return msgspec.structs.replace(made, **changes)


def quote(n: int, partition: int = 0, **changes: Any) -> events.Quote:
    made = events.Quote(
        symbol="BTC-USD",
        ts_event=START_NS + n * NS_PER_MS,
        ts_recv=START_NS + n * NS_PER_MS + 1,
        bid_price=D("61000"),
        bid_size=D(1),
        ask_price=D("61000.1"),
        ask_size=D(2),
        exchange=1,
        epoch=1,
        partition=partition,
        n=n,
    )
    return msgspec.structs.replace(made, **changes)


def vendor_bar(n: int, **changes: Any) -> events.VendorBar:
    made = events.VendorBar(
        symbol="BTC-USD",
        interval="1m",
        start=START_NS,
        end=START_NS + MINUTE_NS,
        ts_recv=START_NS + MINUTE_NS + 1,
        open=D(1),
        high=D(3),
        low=D(1),
        close=D(2),
        volume=D(4),
        vwap=None,
        epoch=1,
        partition=0,
        n=n,
    )
    return msgspec.structs.replace(made, **changes)


def bar(repair: int = 0, revision: int = 0, **changes: Any) -> events.Bar:
    made = events.Bar(
        symbol="BTC-USD",
        interval="1m",
        start=START_NS,
        end=START_NS + MINUTE_NS,
        open=D(1),
        high=D(3),
        low=D(1),
        close=D(2),
        volume=D(4),
        vwap=D("1.5"),
        notional=D("1.5"),
        trade_count=4,
        buy_volume=D(3),
        sell_volume=D(1),
        status="final",
        repair=repair,
        revision=revision,
        flags=[],
        missing_ns=0,
        quality=D(1),
        source="trades",
        fingerprint="f",
    )
    return msgspec.structs.replace(made, **changes)


ANOMALY = events.Anomaly(
    id="a",
    kind="price_spike",
    severity="warning",
    symbol="BTC-USD",
    ts_event=START_NS,
    detected=START_NS + 10**9,
    value=1.5,
    expected=1e-7,
    score=9.25,
    threshold=5.0,
    detail="far",
    epoch=1,
    partition=0,
    n=7,
    interval=None,
    start=None,
    repair=None,
    revision=None,
    fingerprint="f",
)
GAP = events.Gap(START_NS, START_NS + 10**9, ["XT", "XQ"], ["*"], "reconnect", 1, 3, 0)
MARKER = events.MinuteClosed(partition=0, end=START_NS + MINUTE_NS, missed=[], fingerprint="f")


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's migrated database."""
    await database.prepare(settings)
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def sinking(settings: Settings, name: str = "all", **others: Any) -> AsyncIterator[Shell]:
    """`tapedeck sink NAME` in this process, stopped in order at the end; an error of its own comes out here."""
    shell = Shell(settings.model_copy(update=others), f"sink {name}")
    task = asyncio.create_task(service.run(shell, name))
    try:
        yield shell
    finally:
        shell.stopping.set()
        await task


async def says(shell: Shell, complaint: str | None) -> bool:
    """Whether that is what the sink's health begins with."""
    (part,) = shell.health.values() or [""]
    return part is complaint is None or bool(part and complaint and part.startswith(complaint))


async def offsets(db: asyncpg.Connection, table: tables.Table) -> dict[int, int]:
    """By partition, over all of the table's topics."""
    found = await db.fetch(
        "SELECT partition, sum(next_offset)::bigint AS moved FROM sink_offsets WHERE sink = $1 GROUP BY 1", table.name
    )
    return {row["partition"]: row["moved"] for row in found}


async def reaches(db: asyncpg.Connection, table: tables.Table, records: int, timeout_s: float = 60) -> None:
    """Waits until the sink has taken so many records."""

    async def taken() -> bool:
        return sum((await offsets(db, table)).values()) >= records

    await until(taken, timeout_s)


async def stored(db: asyncpg.Connection, table: tables.Table) -> list[dict[str, Any]]:
    return [dict(row) for row in await db.fetch(f"SELECT * FROM {table.name}")]


async def places(db: asyncpg.Connection, table: tables.Table) -> set[tuple[int, int]]:
    """(partition, n) of every row."""
    return {tuple(row) for row in await db.fetch(f"SELECT partition, n FROM {table.name}")}


def counted(name: str, table: tables.Table) -> float:
    return REGISTRY.get_sample_value(f"tapedeck_sink_{name}_total", {"table": table.name}) or 0.0


def row_of(event: Any) -> dict[str, Any]:
    """What the table must hold; decimals as text, so that 1.50 is not 1.5."""
    match event:
        case events.Trade() | events.Quote() | events.Anomaly():
            ns = event.ts_event
        case events.Gap():
            ns = event.to
        case events.DeadLetter() | events.Quarantined():
            ns = event.ts_recv
        case _:
            ns = event.start
    time = datetime.fromtimestamp(ns // 10**9, UTC) + timedelta(microseconds=ns % 10**9 // 1000)
    values = {field.encode_name: getattr(event, field.name) for field in msgspec.structs.fields(event)}
    return texts({"time": time, **values})


def texts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: format(value, "f") if isinstance(value, Decimal) else value for name, value in row.items()}


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


# -- whatever dies --------------------------------------------------------------------------------


class Load:
    """Publishes quotes over all partitions, a few at a time, until it is told to stop."""

    def __init__(self, publish: Publish) -> None:
        self.sent: set[tuple[int, int]] = set()
        self._publish = publish
        self._numbers = itertools.count()

    async def burst(self, each: int = 25) -> None:
        for partition in range(topics.PARTITIONS):
            made = [quote(n, partition) for n in itertools.islice(self._numbers, each)]
            await self._publish(topics.QUOTES, partition, made)
            self.sent |= {(partition, q.n) for q in made}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        enough = asyncio.Event()

        async def run() -> None:
            while not enough.is_set():
                await self.burst()
                await asyncio.sleep(0.05)

        task = asyncio.create_task(run())
        try:
            yield
        finally:
            enough.set()
            await task


@pytest.fixture
def load(publish: Publish) -> Load:
    return Load(publish)


async def all_once(db: asyncpg.Connection, load: Load, timeout_s: float = 20) -> None:
    """Every quote is, or soon will be, in the table, and nothing else: its key allows each only once."""

    async def complete() -> bool:
        return int(await db.fetchval("SELECT count(*) FROM crypto_quotes")) >= len(load.sent)

    await until(complete, timeout_s)
    assert await places(db, tables.QUOTES) == load.sent
    assert sum((await offsets(db, tables.QUOTES)).values()) == len(load.sent)


async def rows_taken(process: Process) -> float:
    """How many rows a sink process has written, as its metrics say."""
    found = re.search(r'"address": "(http[^"]+)"', process.log.read_text())
    if not found:
        return 0
    body = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{found[1]}/metrics", timeout=5).read().decode())
    counts = re.findall(r"^tapedeck_sink_rows_total{.*} (.*)$", body, re.MULTILINE)
    return sum(map(float, counts))


async def test_two_sinks_share_the_partitions_and_either_may_freeze_or_die(
    load: Load, db: asyncpg.Connection, spawn: Spawn
) -> None:
    first, second = spawn("sink", "quotes"), spawn("sink", "quotes")

    async def both_write() -> bool:
        return bool(await rows_taken(first) and await rows_taken(second))

    async with load.running():
        await until(both_write)
        first.popen.send_signal(signal.SIGSTOP)
    await load.burst()
    await all_once(db, load)  # the other has taken over
    first.popen.send_signal(signal.SIGCONT)
    before = await rows_taken(first)

    async def first_writes() -> bool:
        return await rows_taken(first) > before

    async with load.running():
        await until(first_writes)
        second.popen.kill()
    await load.burst()
    await all_once(db, load)


async def test_sinks_may_come_and_go_under_load(
    settings: Settings, load: Load, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka may fetch for a new assignment, from Kafka's offsets, before it tells of it: here it does."""

    async def tell_late(self: Any, assigned: set[TopicPartition]) -> None:
        await asyncio.sleep(0.3)
        self.places = set(assigned)

    monkeypatch.setattr(assignment.Assignment, "on_partitions_assigned", tell_late)
    async with load.running(), sinking(settings, "quotes") as shell:
        for _ in range(2):
            await until(partial(says, shell, None))
            async with sinking(settings, "quotes") as other:
                await until(partial(says, other, None))
            await asyncio.sleep(1.5)
    async with sinking(settings, "quotes"):
        await all_once(db, load)


async def rows_and_offsets(db: asyncpg.Connection) -> tuple[int, int]:
    """Both as one moment has them."""
    row = await db.fetchrow(
        "SELECT (SELECT count(*) FROM crypto_quotes), (SELECT coalesce(sum(next_offset), 0) FROM sink_offsets)"
    )
    assert row is not None
    return int(row[0]), int(row[1])


@pytest.mark.parametrize("held", ["sink_offsets", "crypto_quotes"])
async def test_rows_and_offsets_move_together_though_the_server_ends_connections(
    settings: Settings, load: Load, db: asyncpg.Connection, held: str
) -> None:
    """A lock on one table holds the sink up in its transaction, before or after the offsets moved."""
    before = counted("errors", tables.QUOTES)
    async with sinking(settings, "quotes"):
        for _ in range(3):
            await load.burst()
            await all_once(db, load)
            assert await rows_and_offsets(db) == (len(load.sent), len(load.sent))
            async with db.transaction():
                await db.execute(f"LOCK TABLE {held} IN SHARE MODE")
                await load.burst()
                await until(partial(db.fetchval, _ENDED_WAITING))
                rows, moved = await rows_and_offsets(db)
                assert rows == moved < len(load.sent)
        await all_once(db, load)
    assert counted("errors", tables.QUOTES) - before >= 3


_ENDED_WAITING = """
    SELECT bool_or(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'tapedeck' AND wait_event_type = 'Lock'
"""


async def test_nothing_is_lost_when_the_database_is_killed_under_load(
    settings: Settings, load: Load, db: asyncpg.Connection, servers: Servers
) -> None:
    if servers.database is None:
        pytest.skip("the database is not ours to kill")
    async with sinking(settings, "quotes") as shell:
        async with load.running():
            await reaches(db, tables.QUOTES, 1)
            await asyncio.to_thread(servers.database.kill)
            try:
                await until(lambda: says(shell, "database: "))
            finally:
                await asyncio.to_thread(servers.database.restart)
        again = await asyncpg.connect(settings.database_url.get_secret_value())
        await all_once(again, load)
        await again.close()
        assert shell.health["crypto_quotes"] is None


@pytest.fixture
def small_disk(servers: Servers) -> Iterator[Path]:
    """A file system of 24 MB that the database's server may write to."""
    if servers.database is None:
        pytest.skip("the database is not ours: it would not see the file system")
    folder = Path(tempfile.mkdtemp(prefix="tapedeck-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "tapedeck-test", folder], check=False)
    try:
        if mounted.returncode:
            pytest.skip("this user may not mount a file system")
        yield folder
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


@pytest.fixture
async def on_small_disk(settings: Settings, servers: Servers, small_disk: Path) -> AsyncIterator[Path]:
    """The same, with the test's database on it."""
    server = await asyncpg.connect(servers.postgres)
    name, space = settings.database_url.get_secret_value().rpartition("/")[2], small_disk.name.replace("-", "_")
    tables = os.stat(await server.fetchval("SHOW data_directory"))
    os.chown(small_disk, tables.st_uid, tables.st_gid)
    await server.execute(f"CREATE TABLESPACE {space} LOCATION '{small_disk}'")
    await server.execute(f"ALTER DATABASE {name} SET TABLESPACE {space}")
    yield small_disk
    await server.execute(f"ALTER DATABASE {name} SET TABLESPACE pg_default")
    await server.execute(f"DROP TABLESPACE {space}")
    await server.close()


async def test_a_full_disk_holds_the_rows_up_and_loses_none(
    settings: Settings, on_small_disk: Path, load: Load
) -> None:
    await database.prepare(settings)
    db = await asyncpg.connect(settings.database_url.get_secret_value())
    async with sinking(settings, "quotes") as shell:
        await load.burst()
        await all_once(db, load)
        with contextlib.suppress(OSError), (on_small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        await load.burst(1000)
        await until(partial(says, shell, "database: DiskFullError"))
        (on_small_disk / "filler").unlink()
        await all_once(db, load)
        assert shell.health["crypto_quotes"] is None
    await db.close()


async def test_a_slow_database_holds_up_the_reading_and_nothing_else(
    settings: Settings, load: Load, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks: list[service.Sink] = []

    class Noted(service.Sink):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            sinks.append(self)

    monkeypatch.setattr(service, "Sink", Noted)
    monkeypatch.setattr(service, "SLOW_S", 0.5)
    async with sinking(settings, "quotes", sink_batch_rows=100) as shell:
        await load.burst()
        await all_once(db, load)
        async with db.transaction():
            await db.execute("LOCK TABLE crypto_quotes IN SHARE MODE")
            for _ in range(5):
                await load.burst(100)
            await until(partial(says, shell, "database: slow"))
            assert len(sinks[0]._gathered) == 100  # the reading went on, and no further
        await all_once(db, load)
        await until(partial(says, shell, None))


async def test_the_writing_has_its_turns_while_thousands_of_records_are_at_hand(
    settings: Settings, publish: Publish, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer of the database's waits for the loop that reads."""
    runs = [0]  # records read between two turns of the loop
    turns = asyncio.get_running_loop().call_soon

    def line(value: bytes) -> bytes | None:
        if not runs[-1]:
            turns(runs.append, 0)
        runs[-1] += 1
        return tables.QUOTES.line(value)

    monkeypatch.setattr(service, "ALL", [tables.QUOTES._replace(line=line)])
    await publish(topics.QUOTES, 0, [quote(n) for n in range(3_000)])
    async with sinking(settings, "quotes"):
        await reaches(db, tables.QUOTES, 3_000)
    assert sum(runs) == 3_000
    assert max(runs) <= 300


SLEEPY = """
    CREATE FUNCTION sleepy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.55); RETURN NEW; END $$;
    CREATE TRIGGER sleepy BEFORE INSERT ON crypto_quotes FOR EACH ROW EXECUTE FUNCTION sleepy()
"""


async def test_a_batch_that_takes_too_long_is_halved_down_to_a_record_and_grows_again(
    settings: Settings, load: Load, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = writer.write

    async def noted(connection: Any, table: tables.Table, lines: list[bytes], *others: Any) -> int:
        sizes.append(len(lines))
        return await write(connection, table, lines, *others)

    monkeypatch.setattr(writer, "write", noted)
    monkeypatch.setattr(service, "SLOW_S", 0.3)
    await db.execute(SLEEPY)
    await load.burst(1)
    async with sinking(settings, "quotes"):
        monkeypatch.setattr(database, "COMMAND_S", 1.0)  # after the migrations
        await all_once(db, load, 120)
        assert max(sizes) > 2
        assert sizes[-7:] == [1] * 7
        await db.execute("DROP TRIGGER sleepy ON crypto_quotes")
        monkeypatch.undo()  # connections live on with what they began with
        monkeypatch.setattr(writer, "write", noted)
        await load.burst(100)
        await all_once(db, load, 60)
        assert max(sizes) > 8


async def test_batches_do_not_grow_where_twice_as_large_would_take_too_long(
    settings: Settings, load: Load, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every third batch would be for nothing."""
    failed: list[int] = []
    write = writer.write

    async def slowly(connection: Any, table: tables.Table, lines: list[bytes], *others: Any) -> int:
        """By rows, as with a slow trigger, and as the server does that is to cancel it after half a second."""
        await asyncio.sleep(min(0.02 * len(lines), 0.5))
        if len(lines) > 25:
            failed.append(len(lines))
            raise asyncpg.QueryCanceledError
        return await write(connection, table, lines, *others)

    await load.burst(40)
    monkeypatch.setattr(writer, "write", slowly)
    async with sinking(settings, "quotes"):
        await all_once(db, load, 120)
    assert failed
    assert len(failed) <= 7


async def test_a_writer_that_freezes_inside_its_transaction_holds_nobody_up_for_long(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    async with sinking(settings, "quotes"):
        await publish(topics.QUOTES, 0, [quote(0)])
        await reaches(db, tables.QUOTES, 1)
        frozen = await database.open_connection(settings)
        await frozen.execute("BEGIN; UPDATE sink_offsets SET next_offset = next_offset")
        await publish(topics.QUOTES, 0, [quote(1)])
        await reaches(db, tables.QUOTES, 2)
    frozen.terminate()


async def test_where_one_batch_had_a_repeat_the_next_is_written_as_if_it_had_one(
    settings: Settings, publish: Publish, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[bool] = []
    write = writer.write

    async def noted(*arguments: Any) -> int:
        expected.append(arguments[-1])
        return await write(*arguments)

    monkeypatch.setattr(writer, "write", noted)
    async with sinking(settings, "quotes"):
        for done, number in enumerate((0, 0, 0, 1, 2), 1):
            await publish(topics.QUOTES, 0, [quote(number)])
            await reaches(db, tables.QUOTES, done)
    assert expected == [False, False, True, True, False]
    assert sorted(n for _, n in await places(db, tables.QUOTES)) == [0, 1, 2]


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


# -- Kafka's side ---------------------------------------------------------------------------------


async def test_a_database_ahead_of_the_log_is_refused(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    await publish(topics.TRADES, 2, [trade(0)])
    topic = settings.topic_prefix + topics.TRADES.name
    await db.execute("INSERT INTO sink_offsets VALUES ('crypto_trades', $1, 2, 7)", topic)
    with pytest.raises(UsageError, match=rf"crypto_trades stands at offset 7 of {topic}\[2\], which ends at 1.*Kafka"):
        await asyncio.wait_for(service.run(Shell(settings, "sink"), "trades"), 10)


async def unmake(settings: Settings, *unwanted: topics.Topic) -> None:
    """Deletes them, and waits until they are gone."""
    names = {settings.topic_prefix + topic.name for topic in unwanted}

    async def gone() -> bool:
        return not names.intersection(await admin.list_topics())

    async with kafka.admin_client(settings) as admin:
        await admin.delete_topics(list(names))
        await until(gone, 60)


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


# -- starting and stopping ------------------------------------------------------------------------


async def ended(process: Process, timeout_s: float) -> int:
    return await asyncio.to_thread(process.ended, timeout_s)


async def test_sigterm_ends_it_soon_under_load(load: Load, db: asyncpg.Connection, spawn: Spawn) -> None:
    for _ in range(4):
        await load.burst(1000)
    process = spawn("sink", "all")
    async with load.running():
        await reaches(db, tables.QUOTES, 2000)
        process.popen.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert await ended(process, 10) == 0
    print(f"ended after {time.monotonic() - started:.2f} s")
    assert time.monotonic() - started < 5


class Slow(ConsumerRebalanceListener):  # type: ignore[misc]
    """Gives up its partitions never."""

    async def on_partitions_revoked(self, revoked: Any) -> None:
        await asyncio.sleep(60 if revoked else 0)

    async def on_partitions_assigned(self, assigned: Any) -> None:
        pass


async def test_it_ends_soon_in_a_rebalance_that_does_not(
    settings: Settings, publish: Publish, db: asyncpg.Connection
) -> None:
    group = f"{settings.topic_prefix}tapedeck-sink-crypto_trades"
    slow = AIOKafkaConsumer(**settings.kafka_options(), group_id=group, rebalance_timeout_ms=30_000)
    await slow.start()
    slow.subscribe([settings.topic_prefix + topics.TRADES.name], listener=Slow())
    while not slow.assignment():
        await slow.getmany(timeout_ms=50)
    async with sinking(settings, "trades") as shell:
        await until(partial(says, shell, "no partitions"))
        await asyncio.sleep(0.5)
        assert shell.health["crypto_trades"] == "no partitions yet"
        started = time.monotonic()
    assert time.monotonic() - started < 5
    slow._coordinator._coordination_task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await slow.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def with_password(url: str, password: str) -> SecretStr:
    return SecretStr(re.sub(r"//([^:@]*)(:[^@]*)?@", rf"//\1:{password}@", url))


async def refuses_wrong_passwords(url: str) -> bool:
    try:
        connection = await asyncpg.connect(with_password(url, "wrong").get_secret_value())
    except asyncpg.InvalidPasswordError:
        return True
    await connection.close()
    return False


async def test_who_cannot_be_reached_or_refuses_is_named_in_one_line(settings: Settings, spawn: Spawn) -> None:
    url = settings.database_url.get_secret_value()
    port = free_port()
    cases = [
        (
            {"database_url": SecretStr(f"postgresql://someone:secret@127.0.0.1:{port}/tape")},
            1,
            rf"PostgreSQL at 127.0.0.1:{port}/tape cannot be reached after 1 s \(DATABASE_URL\)",
        ),
        (
            {"database_url": SecretStr(re.sub(r"/\w+$", "/nowhere", url))},
            2,
            r'PostgreSQL at .*/nowhere refuses us \(DATABASE_URL\): database \\"nowhere\\" does not exist',
        ),
        ({"database_url": SecretStr("mysql://u:secret@db/tape")}, 2, "DATABASE_URL is not an address like"),
        (
            {"kafka_bootstrap_servers": f"127.0.0.1:{port}"},
            1,
            rf"Kafka at 127.0.0.1:{port} cannot be reached after 1 s .*refused",
        ),
    ]
    if await refuses_wrong_passwords(url):
        cases.append(({"database_url": with_password(url, "secret")}, 2, r"refuses us \(DATABASE_URL\): password auth"))
    processes = [spawn("sink", "trades", connect_timeout_s=1, **changes) for changes, _, _ in cases]
    for process, (_, code, text) in zip(processes, cases, strict=True):
        assert await ended(process, 60) == code
        *before, last = process.log.read_text().splitlines()
        assert re.search(text, last)
        assert '"level": "error"' in last
        # aiokafka has lines of its own about each attempt
        assert not any('"level": "error"' in line and "Unable connect" not in line for line in before)
        assert not any("Traceback" in line or "secret" in line for line in [*before, last])


async def test_sigterm_ends_it_though_the_database_is_away(settings: Settings) -> None:
    async def stop_soon(shell: Shell) -> None:
        await asyncio.sleep(0.5)
        started = time.monotonic()
        shell.stopping.set()
        while not task.done():
            await asyncio.sleep(0.01)
        assert time.monotonic() - started < 5

    away = SecretStr(f"postgresql://someone@127.0.0.1:{free_port()}/tape")
    shell = Shell(settings.model_copy(update={"database_url": away, "connect_timeout_s": 30}), "sink")
    task = asyncio.create_task(service.run(shell, "all"))
    await stop_soon(shell)
    await task
