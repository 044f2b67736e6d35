"""The sink beside the two ways that come to mind first, in one run; latency; bytes a trade, by column type too.

A writer on one core, Kafka and PostgreSQL on the other. (a) is executemany with ON CONFLICT, (b) is COPY straight into
the table; both commit nothing but rows, so a crash loses or doubles some. `--database URL` measures another server,
such as one with TimescaleDB, wherever it runs.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
from aiokafka import AIOKafkaProducer
from msgspec.structs import replace
from pydantic import SecretStr
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.line import span
from bench.market import PAIRS
from bench.producer import broker, pinned
from bench.stand import Stand, on_core
from schemas import events, topics
from schemas.partition import partition_of
from sinks import tables
from sinks.writer import source
from tapedeck import database, kafka
from tapedeck.embedded import prepare_postgres
from tapedeck.settings import Settings

PARTS = ("speed", "latency", "size")
MODES = {"tapedeck": "tapedeck sink", "executemany": "(a) executemany ON CONFLICT", "copy": "(b) COPY, no guarantee"}
PREFIX = "bench."
TYPES = ("numeric", "numeric(40,20)", "double precision", "text")


def trades(total: int) -> Iterator[events.Trade]:
    """Pairs weighted by 1/rank, 1,000 a second, prices and sizes with as many digits as exchanges send."""
    rng = random.Random(total)
    weights = [1 / (rank + 1) for rank in range(len(PAIRS))]
    ranks = rng.choices(range(len(PAIRS)), weights, k=total)
    for number, rank in enumerate(ranks):
        at = 1_723_161_240_000_000_000 + number * 1_000_000
        yield events.Trade(
            symbol=PAIRS[rank],
            ts_event=at,
            ts_recv=at + 20_000_000 + number % 1_000_000,
            ts_vendor=None,
            price=Decimal(rng.randrange(60_000_00, 61_000_00)).scaleb(-2 - rank % 3).normalize(),
            size=Decimal(rng.randrange(1, 10 ** rng.randrange(3, 9))).scaleb(-8).normalize(),
            side=rng.choice(("buy", "sell")),
            exchange=rng.choice((1, 2, 6, 23)),
            trade_id=str(812_345_678 + number),
            conditions=[rng.choice((1, 2))],
            flags=[],
            epoch=1,
            partition=partition_of(PAIRS[rank]),
            n=number,
        )


def message(trade: events.Trade) -> kafka.Message:
    ms = trade.ts_event // 1_000_000
    return kafka.Message(
        PREFIX + topics.TRADES.name, trade.partition, trade.symbol.encode(), events.encode(trade), ms, []
    )


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """URL of a PostgreSQL, ours on the first core if none is given."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        service = prepare_postgres(Path(folder))
        options = {**service.options, **pinned(0)}
        process = subprocess.Popen(service.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        try:
            if not service.ready(60):
                raise SystemExit(f"PostgreSQL does not start:\n{service.log_tail()}")
            yield service.addresses["DATABASE_URL"]
        finally:
            process.send_signal(service.stop_signal)
            process.wait()


@contextlib.asynccontextmanager
async def fresh(stand: Stand, url: str) -> AsyncIterator[tuple[Settings, asyncpg.Connection]]:
    """Settings with a new, migrated database, and a connection to it."""
    admin = await asyncpg.connect(url)
    await admin.execute("DROP DATABASE IF EXISTS bench WITH (FORCE)")
    await admin.execute("CREATE DATABASE bench")
    settings = stand.settings(PREFIX, database_url=SecretStr(urlsplit(url)._replace(path="/bench").geturl()))
    await database.prepare(settings)
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    await connection.execute("CHECKPOINT")
    try:
        yield settings, connection
    finally:
        await connection.close()
        await admin.execute("DROP DATABASE bench WITH (FORCE)")
        await admin.close()


@contextlib.contextmanager
def writer(settings: Settings, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A child with these settings on the other core."""
    given = {
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "TOPIC_PREFIX": settings.topic_prefix,
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "HTTP_PORT": "0",
        "LOG_LEVEL": "WARNING",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | given,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=pinned(-1)["preexec_fn"],  # type: ignore[arg-type]
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


async def speed(stand: Stand, url: str, console: Console, total: int, runs: int) -> Table:
    found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for mode in track([*MODES] * runs, "writers", console=console, transient=True):
        async with fresh(stand, url) as (settings, connection):
            with writer(settings, "bench.sink_writers", mode, total) as child:
                said, _ = await asyncio.to_thread(child.communicate)
            stored = await connection.fetchval("SELECT count(*) FROM crypto_trades")
            if child.returncode or stored != total:
                raise SystemExit(f"{mode}: {stored} of {total} rows")
            found[mode].append(json.loads(said.splitlines()[-1]))
    table = Table(title=f"{total:,} trades from topic to table, {runs} runs each (min - max)")
    table.add_column("writer")
    for name in ("rows/s", "CPU µs/row", "tapedeck is"):
        table.add_column(name, justify="right")
    rates = {mode: [total / run["seconds"] for run in each] for mode, each in found.items()}
    for mode, name in MODES.items():
        times = [ours / theirs for ours, theirs in zip(rates["tapedeck"], rates[mode], strict=True)]
        cpu = span([run["cpu_s"] / total * 1e6 for run in found[mode]], 1)
        table.add_row(name, span(rates[mode]), cpu, "" if mode == "tapedeck" else f"{span(times, 2)} x")
    return table


async def latency(stand: Stand, url: str, rate: int, seconds: int) -> Table:
    """From handing a trade to Kafka to finding its row, with a look every few ms."""
    waits: list[float] = []
    async with fresh(stand, url) as (settings, connection):
        await stand.drop(PREFIX)
        await kafka.prepare(settings)
        producer = AIOKafkaProducer(**settings.kafka_options())
        await producer.start()
        (pattern,) = trades(1)
        newest = pattern.ts_event

        async def send(numbers: range) -> None:
            began = time.perf_counter()
            for number in numbers:
                ahead = began + number / rate - time.perf_counter()
                if ahead > 0.001:
                    await asyncio.sleep(ahead)
                now = time.time_ns()
                made = message(replace(pattern, ts_event=now, ts_recv=now, trade_id=str(now), n=number))
                await producer.send(made.topic, made.value, made.key, made.partition, made.timestamp_ms)

        async def look(until: int) -> None:
            nonlocal newest
            done = 0
            while done < until:
                found = await connection.fetch(_NEWER, pattern.symbol, newest)
                now = time.time_ns()
                waits.extend((now - row[0]) / 1e6 for row in found)
                newest = found[-1][0] if found else newest
                done += len(found)
                await asyncio.sleep(0.002)

        with writer(settings, "tapedeck", "sink", "trades"):
            await asyncio.wait_for(asyncio.gather(send(range(1)), look(1)), 60)  # it has its partitions
            waits.clear()
            await asyncio.wait_for(asyncio.gather(send(range(rate * seconds)), look(rate * seconds)), seconds + 60)
        await producer.stop()
    cuts = statistics.quantiles(waits, n=100)
    table = Table(title=f"event handed to Kafka to row in the table, {rate:,}/s for {seconds} s, ms")
    for name in ("events", "p50", "p99", "most"):
        table.add_column(name, justify="right")
    table.add_row(f"{len(waits):,}", f"{cuts[49]:.1f}", f"{cuts[98]:.1f}", f"{max(waits):.1f}")
    return table


_NEWER = """
    SELECT ts_event FROM crypto_trades
    WHERE symbol = $1 AND ts_event > $2::bigint
        AND time >= 'epoch'::timestamptz + $2::bigint / 1000 * INTERVAL '1 microsecond'
    ORDER BY time, ts_event
"""


async def size(stand: Stand, url: str, total: int) -> tuple[Table, Table]:
    """Bytes a trade, and what the type of its two decimals changes."""
    whole = Table(title=f"bytes a trade, {total:,} trades")
    types = Table(title="the same by type of price and size, as rows without indexes")
    for name in ("row", "indexes", "columnstore"):
        whole.add_column(name, justify="right")
    for name in ("type", "COPY, µs/row", "bytes", "columnstore bytes", "values that changed"):
        types.add_column(name, justify="left" if name == "type" else "right")
    lines = [tables.TRADES.line(events.encode(trade)) or b"" for trade in trades(total)]
    hard = ("0.0000000001", "1000000000", "0.000000000000000001", "123456.789012345678")
    async with fresh(stand, url) as (_, connection):
        chunked = await connection.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'")
        for kind in TYPES:
            await connection.execute("CREATE TABLE tried (LIKE crypto_trades)")
            for column in ("price", "size"):
                await connection.execute(f"ALTER TABLE tried ALTER {column} TYPE {kind}")
            await connection.execute("ALTER TABLE tried ALTER time SET DEFAULT '2026-11-01Z'")
            if chunked:
                await connection.execute(
                    "SELECT create_hypertable('tried', by_range('time'), create_default_indexes => false)"
                )
            took = []
            for _ in range(3):
                await connection.execute("TRUNCATE tried")
                began = time.perf_counter()
                await _copy(connection, "tried", lines)
                took.append((time.perf_counter() - began) / total * 1e6)
            row = await _bytes(connection, "tried", total)
            columnar = await _columnar(connection, "tried", total, "n") if chunked else None
            differs = f"SELECT $1::numeric::{kind}::numeric <> $1::numeric"
            changed = sum([await connection.fetchval(differs, Decimal(number)) for number in hard])
            shown = "-" if columnar is None else f"{columnar:.0f}"
            types.add_row(kind, span(took, 1), f"{row:.0f}", shown, f"{changed} of {len(hard)}")
            await connection.execute("DROP TABLE tried")
        await connection.execute("CREATE TEMP TABLE staged AS SELECT * FROM crypto_trades WITH NO DATA")
        await connection.execute("ALTER TABLE staged DROP COLUMN time")
        await _copy(connection, "staged", lines)
        await connection.execute(tables.TRADES.insert)
        row = await _bytes(connection, "crypto_trades", total)
        everything = await _bytes(connection, "crypto_trades", total, indexes=True)
        columnar = await _columnar(connection, "crypto_trades", total) if chunked else None
        shown = "- (no TimescaleDB)" if columnar is None else f"{columnar:.0f}"
        whole.add_row(f"{row:.0f}", f"{everything - row:.0f}", shown)
    return whole, types


async def _copy(connection: asyncpg.Connection, name: str, lines: list[bytes]) -> None:
    await connection.copy_to_table(name, source=source(lines), columns=list(tables.TRADES.columns))


async def _bytes(connection: asyncpg.Connection, name: str, total: int, indexes: bool = False) -> float:
    """A row's share of the table, its chunks included."""
    how = "pg_total_relation_size" if indexes else "pg_table_size"
    chunks = f"SELECT sum({how}(inhrelid)) FROM pg_inherits WHERE inhparent = '{name}'::regclass"
    found: int = await connection.fetchval(f"SELECT {how}('{name}') + coalesce(({chunks}), 0)")
    return found / total


async def _columnar(connection: asyncpg.Connection, name: str, total: int, order: str = "time") -> float:
    """The same when all of it is in the columnstore, indexes included."""
    await connection.execute(
        f"ALTER TABLE {name} SET (timescaledb.enable_columnstore, timescaledb.segmentby = 'symbol', "
        f"timescaledb.orderby = '{order}')"
    )
    for (chunk,) in await connection.fetch(f"SELECT show_chunks('{name}')::text"):
        await connection.execute(f"CALL convert_to_columnstore('{chunk}')", timeout=600)
    after: int = await connection.fetchval(
        f"SELECT sum(after_compression_total_bytes)::bigint FROM chunk_columnstore_stats('{name}')"
    )
    return after / total


async def main_async(options: argparse.Namespace, address: str, url: str) -> None:
    console = Console(width=110)
    parts = options.only.split(",")
    stand = Stand(address)
    await stand.start()
    try:
        if "latency" in parts:
            console.print(await latency(stand, url, 1_000, options.seconds))
        if "speed" in parts:
            await stand.drop(PREFIX)
            await kafka.prepare(stand.settings(PREFIX))
            console.log(f"putting {options.trades:,} trades on the topic")
            await stand.load(map(message, trades(options.trades)))
            console.print(await speed(stand, url, console, options.trades, options.runs))
        if "size" in parts:
            for table in await size(stand, url, options.trades):
                console.print(table)
        console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    finally:
        await stand.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each writer")
    parser.add_argument("--trades", type=int, default=400_000)
    parser.add_argument("--seconds", type=int, default=30, help="of the latency run")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma separated")
    parser.add_argument("--database", help="URL of another server's superuser; default: the embedded one")
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics come and go here
    with broker() as address, server(options.database) as url, on_core(0):
        asyncio.run(main_async(options, address, url))


if __name__ == "__main__":
    main()
