"""What the tests of the sinks have in common: events, a sink in this process, and what it has stored."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import msgspec
from conftest import Publish, until
from prometheus_client import REGISTRY

from schemas import events, topics
from schemas.events import MINUTE_NS, NS_PER_MS
from sinks import service, tables
from tapedeck import kafka
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


async def all_once(db: asyncpg.Connection, load: Load, timeout_s: float = 20) -> None:
    """Every quote is, or soon will be, in the table, and nothing else: its key allows each only once."""

    async def complete() -> bool:
        return int(await db.fetchval("SELECT count(*) FROM crypto_quotes")) >= len(load.sent)

    await until(complete, timeout_s)
    assert await places(db, tables.QUOTES) == load.sent
    assert sum((await offsets(db, tables.QUOTES)).values()) == len(load.sent)


async def unmake(settings: Settings, *unwanted: topics.Topic) -> None:
    """Deletes them, and waits until they are gone."""
    names = {settings.topic_prefix + topic.name for topic in unwanted}

    async def gone() -> bool:
        return not names.intersection(await admin.list_topics())

    async with kafka.admin_client(settings) as admin:
        await admin.delete_topics(list(names))
        await until(gone, 60)
