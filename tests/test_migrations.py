"""Migrations: from nothing to the newest schema, whoever comes first and whatever dies."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from unittest.mock import AsyncMock
from urllib.parse import urlsplit

import asyncpg
import pytest
from conftest import until
from pydantic import SecretStr

from schemas.events import MINUTE_NS
from sinks import mend
from tapedeck import database, status, storage
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings

PLAIN = {
    "sink_offsets",
    "sink_dead_letters",
    "sink_losses",
    "gaps",
    "dead_letters",
    "quarantine",
    "exchanges",
    "tickers",
}
TABLES = PLAIN | {
    "crypto_trades",
    "crypto_quotes",
    "crypto_aggregates",
    "crypto_aggregates_history",
    "vendor_bars",
    "anomalies",
}
MIGRATE = "import asyncio; from tapedeck import database, settings; asyncio.run(database.prepare(settings.load()))"


def migrating(settings: Settings, code: str = MIGRATE) -> subprocess.Popen[bytes]:
    """A process that migrates the test's database."""
    url = settings.database_url.get_secret_value()
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"DATABASE_URL": url})


async def connected(settings: Settings) -> asyncpg.Connection:
    return await asyncpg.connect(settings.database_url.get_secret_value())


async def schema(settings: Settings) -> dict[str, list[str]]:
    """Table or view to its columns, the migration library's own apart."""
    connection = await connected(settings)
    found = await connection.fetch(
        "SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) AS columns "
        "FROM information_schema.columns WHERE table_schema = 'public' AND table_name NOT LIKE '%yoyo%' GROUP BY table_name"
    )
    await connection.close()
    return {row["table_name"]: row["columns"] for row in found}


async def test_an_empty_database_gets_every_table_and_a_second_run_changes_nothing(settings: Settings) -> None:
    await database.prepare(settings)
    made = await schema(settings)
    assert made.keys() >= TABLES
    connection = await connected(settings)
    applied = await connection.fetch("SELECT * FROM _yoyo_migration ORDER BY migration_id")
    assert [row["migration_id"] for row in applied] == sorted(file.stem for file in database.MIGRATIONS.glob("*.sql"))
    await connection.execute("INSERT INTO sink_offsets VALUES ('a', 'b', 0, 1)")
    await database.prepare(settings)
    assert await schema(settings) == made
    assert await connection.fetch("SELECT * FROM _yoyo_migration ORDER BY migration_id") == applied
    assert await connection.fetchval("SELECT count(*) FROM sink_offsets") == 1
    await connection.close()


async def test_a_gap_is_open_until_it_is_said_to_have_been_empty(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    insert = "INSERT INTO gaps VALUES (to_timestamp($2 / 1e9), $1, $2, $3, '{BTC-USD}', $4, 1, $5, $6)"
    gaps = [
        (None, 10**9, ["XT"], "start", 0, 0),
        (2 * 10**9, 3 * 10**9, ["XT"], "silence", 0, 1),
        (2 * 10**9, 3 * 10**9, ["XQ"], "silence", 0, 2),
        (2 * 10**9, 3 * 10**9, ["XT"], "silence", 1, 1),
        (2 * 10**9, 3 * 10**9, ["XT"], "empty", 0, 3),
    ]
    await connection.executemany(insert, gaps)
    found = await connection.fetch("SELECT partition, n FROM open_gaps ORDER BY partition, n")
    assert [tuple(row) for row in found] == [(0, 0), (0, 2), (1, 1)]
    await connection.close()


async def test_every_table_and_column_says_what_it_is(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    silent = await connection.fetch(
        "SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "WHERE c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE '%yoyo%' AND c.relkind IN ('r', 'v') "
        "AND (c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped AND col_description(c.oid, a.attnum) IS NULL "
        "OR obj_description(c.oid) IS NULL)"
    )
    assert silent == []
    await connection.close()


async def insert_trade(connection: asyncpg.Connection, time: str, trade_id: str) -> None:
    await connection.execute(
        "INSERT INTO crypto_trades SELECT $1::text::timestamptz, 'BTC-USD', ns, ns, NULL, 61000.1, 0.5, 'buy', 1, $2, "
        "'{}', '{}', 1, 0, 7 FROM (SELECT (extract(epoch FROM $1::text::timestamptz) * 1000000000)::bigint AS ns)",
        time,
        trade_id,
    )


async def insert_bar(connection: asyncpg.Connection, time: str, close: int, repair: int = 0) -> None:
    """As a sink does. Its columns are those of the first migration, so that it works on an old schema too."""
    await connection.execute(
        'INSERT INTO crypto_aggregates (time, symbol, interval, start, "end", open, high, low, close, volume, vwap, '
        "trade_count, buy_volume, sell_volume, status, repair, revision, flags, missing_ns, quality, source, fingerprint) "
        "SELECT $1::text::timestamptz, 'BTC-USD', '1m', ns, ns + 60000000000, 1, 9, 1, $2, 2, 1.5, 3, 1, 1, 'final', $3, "
        "0, '{}', 0, 1, 'trades', 'f' FROM (SELECT (extract(epoch FROM $1::text::timestamptz) * 1000000000)::bigint AS ns) "
        "ON CONFLICT (symbol, interval, time) DO UPDATE SET close = excluded.close, repair = excluded.repair",
        time,
        close,
        repair,
    )


async def test_a_database_of_the_first_release_keeps_its_rows(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = database.MIGRATIONS
    for file in newest.glob("000[12].*.sql"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(database, "MIGRATIONS", tmp_path)
    monkeypatch.setattr(storage, "apply", AsyncMock())  # its tables are not there yet
    await database.prepare(settings)
    connection = await connected(settings)
    await insert_trade(connection, "2026-11-01 10:00:00.123456Z", "a")
    await insert_bar(connection, "2026-11-01 10:00Z", 5)
    before = [await connection.fetch(f"SELECT * FROM {table}") for table in ("crypto_trades", "crypto_aggregates")]
    monkeypatch.undo()
    await database.prepare(settings)
    after = [await connection.fetch(f"SELECT * FROM {table}") for table in ("crypto_trades", "crypto_aggregates")]
    assert after == before
    assert await connection.fetchval("SELECT close FROM crypto_aggregates_history") == 5
    assert (await schema(settings)).keys() >= TABLES
    await connection.close()


async def test_one_role_writes_and_one_only_reads(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    await connection.execute("SET ROLE tapedeck_writer")
    await insert_bar(connection, "2026-11-01 10:00Z", 5)
    await connection.execute("INSERT INTO sink_losses VALUES ('crypto_trades', 'trades.v1', 0, 0, 1)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("DROP TABLE crypto_aggregates")
    await connection.execute("SET ROLE tapedeck_reader")
    for table in (*sorted(TABLES), "ohlcv", "bars_hourly", "bars_daily"):
        await connection.execute(f"SELECT * FROM {table}")
    assert await connection.fetchval("SELECT close FROM ohlcv") == 5
    await connection.execute("SELECT * FROM get_latest_price('BTC-USD')")
    for change in ("DELETE FROM crypto_aggregates", "INSERT INTO exchanges VALUES (99, 'x')", "CREATE TABLE mine ()"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(change)
    await connection.close()


async def test_who_may_only_read_verifies_and_asks_for_the_status_and_is_told_when_the_schema_is_old(
    settings: Settings,
) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'plain' IN ROLE tapedeck_reader")
    url = urlsplit(settings.database_url.get_secret_value())
    netloc = f"{name}:plain@{url.netloc.rpartition('@')[2]}"
    reader = settings.model_copy(update={"database_url": SecretStr(url._replace(netloc=netloc).geturl())})
    try:
        assert await status._tables(reader) is not None
        for kind in mend.TARGETS:
            async with mend.mending(reader, kind, 0, MINUTE_NS) as tables:
                assert await tables.compare(nothing_read, apply=False, listed=None) == {}
        await connection.execute(
            "DELETE FROM _yoyo_migration WHERE migration_id = (SELECT max(migration_id) FROM _yoyo_migration)"
        )
        with pytest.raises(UsageError, match="lacks tables of this version, and this user may not make them"):
            await database.prepare(reader)
    finally:
        await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
        await connection.close()


async def nothing_read() -> mend.Bounds:
    return mend.Bounds(0, MINUTE_NS, 0, 0, False, False, "", {})


async def test_roles_that_come_later_get_their_rights_at_the_next_start(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    for role, rights in storage.RIGHTS.items():
        await connection.execute(
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE {rights} ON TABLES FROM {role}; "
            f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}"
        )
    await database.prepare(settings)
    await connection.execute("CREATE TABLE later (a int)")
    for role in storage.RIGHTS:
        await connection.execute(f"SET ROLE {role}; SELECT * FROM crypto_quotes, later; RESET ROLE")
    await connection.close()


BUCKETS = "SELECT time, open, high, low, close, volume, trade_count, minutes FROM {} ORDER BY time"


async def test_hours_and_days_are_the_bars_that_stand(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    for minute, close in (("10:00", 5), ("10:59", 6), ("11:00", 7)):
        await insert_bar(connection, f"2026-11-01 {minute}Z", close)
    hours = await connection.fetch(BUCKETS.format("bars_hourly"))
    ten = datetime(2026, 11, 1, 10, tzinfo=UTC)
    assert [tuple(row) for row in hours] == [(ten, 1, 9, 1, 6, 4, 6, 2), (ten.replace(hour=11), 1, 9, 1, 7, 2, 3, 1)]
    days = await connection.fetch(BUCKETS.format("bars_daily"))
    assert [tuple(row) for row in days] == [(ten.replace(hour=0), 1, 9, 1, 7, 6, 9, 3)]
    await connection.close()


INDEXED = {
    "latest": "SELECT * FROM {} WHERE symbol = 'A' ORDER BY time DESC LIMIT 1",
    "range": "SELECT * FROM {} WHERE symbol = 'A' AND time >= '2026-11-01' AND time < '2026-11-02' ORDER BY time",
    "as of": "SELECT * FROM {} WHERE symbol = 'A' AND time <= '2026-11-01' ORDER BY time DESC LIMIT 1",
}


@pytest.mark.parametrize("table", ["crypto_trades", "crypto_quotes", "crypto_aggregates", "anomalies"])
async def test_what_people_ask_for_has_an_index_that_also_sorts(settings: Settings, table: str) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    await connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    bars = table == "crypto_aggregates"
    for name, query in INDEXED.items():
        asked = query.replace("WHERE", "WHERE interval = '1m' AND" if bars else "WHERE").format(table)
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {asked}"))
        # Of a hypertable without chunks there is nothing to see.
        assert "One-Time Filter: false" in plan or ("Index Scan" in plan and "Sort " not in plan), (name, plan)
    await connection.close()


@pytest.fixture
async def timescale(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's empty database on a server with TimescaleDB."""
    connection = await connected(settings)
    if await connection.fetchval(storage.LOADED) is None:
        await connection.close()
        pytest.skip("this PostgreSQL has no TimescaleDB")
    yield connection
    await connection.close()


async def jobs(connection: asyncpg.Connection) -> set[tuple[str, str, str]]:
    found = await connection.fetch(
        "SELECT hypertable_name, proc_name, coalesce(config ->> 'drop_after', config ->> 'compress_after') AS age "
        "FROM timescaledb_information.jobs WHERE proc_name IN ('policy_retention', 'policy_compression')"
    )
    return {tuple(row) for row in found}


async def test_with_timescaledb_the_tables_of_events_are_hypertables_with_policies_as_set(
    settings: Settings, timescale: asyncpg.Connection
) -> None:
    await database.prepare(settings)
    names = await timescale.fetch("SELECT hypertable_name FROM timescaledb_information.hypertables")
    assert {row["hypertable_name"] for row in names} >= TABLES - PLAIN
    old = {(table, "policy_compression", "7 days") for table in TABLES - PLAIN}
    keeping = ("crypto_trades", "crypto_quotes")
    assert await jobs(timescale) == old | {(table, "policy_retention", "730 days") for table in keeping}
    await database.prepare(settings.model_copy(update={"columnstore_after_days": 9, "trades_keep_days": 0}))
    assert await jobs(timescale) == {(table, "policy_compression", "9 days") for table in TABLES - PLAIN}
    await database.prepare(settings)
    assert await jobs(timescale) == old | {(table, "policy_retention", "730 days") for table in keeping}


async def test_status_knows_what_is_in_the_chunks(settings: Settings, timescale: asyncpg.Connection) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    for trade in range(3):
        await insert_trade(connection, "2026-11-01 10:00Z", str(trade))
    await connection.execute("ANALYZE")
    tables = (await status.look(settings)).tables
    assert tables is not None
    sizes = {size.table: (size.rows, size.bytes) for size in tables.sizes}
    assert sizes["crypto_trades"][0] == 3
    assert sizes["crypto_trades"][1] > sizes["crypto_quotes"][1]
    assert sizes["exchanges"][0] == 5
    await connection.close()


async def test_timescaledb_may_come_to_a_database_that_began_without_it(
    settings: Settings, timescale: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(storage, "LOADED", "SELECT NULL")
        for file in database.MIGRATIONS.glob("*.sql"):
            text = file.read_text().replace("current_setting('timescaledb.disable_load', true)", "NULL")
            (tmp_path / file.name).write_text(text)
        without.setattr(database, "MIGRATIONS", tmp_path)
        await database.prepare(settings)
    assert not await timescale.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'")
    for day in (1, 2, 3):
        await insert_trade(timescale, f"2026-11-0{day} 10:00Z", "a")
        await insert_bar(timescale, f"2026-11-0{day} 10:00Z", day)
    queries = ["SELECT * FROM crypto_trades ORDER BY time", *(BUCKETS.format(name) for name in storage.AGGREGATES)]
    before = [await timescale.fetch(query) for query in queries]
    await timescale.close()
    await database.prepare(settings)
    again = await connected(settings)
    assert [await again.fetch(query) for query in queries] == before
    assert (
        await again.fetchval(
            "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'crypto_trades'"
        )
        == 3
    )
    assert len(await jobs(again)) == len(storage.HYPERTABLES) + 2
    await again.close()


async def test_a_repair_of_a_compressed_hour_shows_in_the_aggregates_after_the_next_refresh(
    settings: Settings, timescale: asyncpg.Connection
) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    for minute in ("10:00", "10:01", "12:00"):
        await insert_bar(connection, f"2026-06-01 {minute}Z", 5)
    job = await connection.fetchval(
        "SELECT job_id FROM timescaledb_information.jobs WHERE proc_name = 'policy_refresh_continuous_aggregate' "
        "AND hypertable_name = 'bars_hourly'"
    )

    async def refreshed() -> bool:
        """Not while TimescaleDB does it by itself."""
        with contextlib.suppress(asyncpg.LockNotAvailableError):
            await connection.execute(f"CALL run_job({job})")
            return True
        return False

    await until(refreshed)
    for chunk in await connection.fetch("SELECT show_chunks('crypto_aggregates')::text"):
        await connection.execute(f"CALL convert_to_columnstore('{chunk[0]}')")
    await insert_bar(connection, "2026-06-01 10:01Z", 8, repair=1)
    await until(refreshed)
    assert await connection.fetchval("SELECT close FROM bars_hourly WHERE time = '2026-06-01 10:00Z'") == 8
    assert await connection.fetchval("SELECT close FROM crypto_aggregates WHERE time = '2026-06-01 10:01Z'") == 8
    await connection.close()


async def test_who_owns_the_database_need_not_be_superuser_nor_own_all_in_it(settings: Settings) -> None:
    connection = await connected(settings)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'plain'; ALTER DATABASE {name} OWNER TO {name}")
    url = urlsplit(settings.database_url.get_secret_value())
    netloc = f"{name}:plain@{url.netloc.rpartition('@')[2]}"
    plain = SecretStr(url._replace(netloc=netloc).geturl())
    await connection.execute("CREATE TABLE others (time int)")
    await connection.execute(
        "DO $$ BEGIN CREATE ROLE tapedeck_reader NOLOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )
    await database.prepare(settings.model_copy(update={"database_url": plain}))
    assert (await schema(settings)).keys() >= TABLES
    assert await connection.fetchval("SELECT col_description('others'::regclass, 1)") is None
    may_read = "SELECT has_table_privilege('tapedeck_reader', $1, 'SELECT')"
    assert [await connection.fetchval(may_read, table) for table in ("others", "crypto_trades")] == [False, True]
    await connection.execute(f"ALTER DATABASE {name} OWNER TO CURRENT_USER; REASSIGN OWNED BY {name} TO CURRENT_USER")
    await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
    await connection.close()


async def test_processes_that_migrate_at_once_do_not_disturb_each_other(settings: Settings) -> None:
    processes = [migrating(settings) for _ in range(3)]
    codes = [await asyncio.to_thread(process.wait, 30) for process in processes]
    assert codes == [0, 0, 0]
    assert (await schema(settings)).keys() >= TABLES


SLOW = f"""
import pathlib, tempfile
from tapedeck import database, storage
folder = pathlib.Path(tempfile.mkdtemp())
for file in database.MIGRATIONS.glob("*.sql"):
    (folder / file.name).write_bytes(file.read_bytes())
(folder / "9999.slow.sql").write_text("CREATE TABLE half (a int); SELECT pg_sleep(60)")
database.MIGRATIONS = folder
{MIGRATE}
"""


async def test_one_killed_half_way_leaves_no_lock_and_no_half_schema(settings: Settings) -> None:
    watching = await connected(settings)
    process = migrating(settings, SLOW)

    asleep = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    await until(partial(watching.fetchval, f"SELECT count(*) {asleep}"))
    waiting = asyncio.create_task(database.prepare(settings))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert "half" not in await schema(settings)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The server finds out when it next looks: at the end of the statement, which nobody waits for here.
    await watching.execute(f"SELECT pg_cancel_backend(pid) {asleep}")
    await asyncio.wait_for(waiting, 10)
    assert (await schema(settings)).keys() >= TABLES
    assert "half" not in await schema(settings)
    await watching.close()


KILLED = f"""
import os, yoyo
from yoyo import internalmigrations
from yoyo.backends.base import DatabaseBackend
%s = lambda *_, **__: os.kill(os.getpid(), 9)
{MIGRATE}
"""


@pytest.mark.parametrize(
    "step",
    ["DatabaseBackend.mark_one", "internalmigrations.upgrade"],
    ids=["after a migration and before it is noted", "inside the library's own lock"],
)
async def test_one_killed_inside_the_library_does_not_block_the_next(settings: Settings, step: str) -> None:
    assert await asyncio.to_thread(migrating(settings, KILLED % step).wait, 30) == -signal.SIGKILL
    await asyncio.wait_for(database.prepare(settings), 5)
    assert (await schema(settings)).keys() >= TABLES


async def test_a_user_without_a_name_can_migrate(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a bare user id."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    await database.prepare(settings)


async def test_waiting_for_the_lock_can_be_given_up_at_once(settings: Settings) -> None:
    holder = await connected(settings)
    await holder.execute(f"SELECT pg_advisory_lock({database.LOCK})")
    waiting = asyncio.create_task(database.prepare(settings))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    started = time.monotonic()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert time.monotonic() - started < 5
    await holder.close()


async def test_a_migration_that_fails_says_why_and_leaves_nothing_of_itself(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0001.good.sql").write_text("CREATE TABLE good (a int)")
    (tmp_path / "0002.bad.sql").write_text("CREATE TABLE half (a int); CREATE TABLE good (a int)")
    monkeypatch.setattr(database, "MIGRATIONS", tmp_path)
    with pytest.raises(TapedeckError, match=r'cannot be migrated: .*relation "good" already exists'):
        await database.prepare(settings)
    assert await schema(settings) == {"good": ["a"]}


async def test_the_last_message_of_the_vendor_for_a_minute_is_the_one_that_holds(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)

    async def message(symbol: str, start: int, epoch: int, n: int, close: int) -> None:
        await connection.execute(
            'INSERT INTO vendor_bars (time, symbol, interval, start, "end", ts_recv, open, high, low, close, '
            "volume, vwap, epoch, partition, n) "
            "VALUES (to_timestamp($2 / 1e9), $1, '1m', $2, $2 + 60000000000, 1, 1, 9, 1, $5, 1, NULL, $3, 0, $4)",
            symbol,
            start,
            epoch,
            n,
            close,
        )

    minute = 1_723_161_240_000_000_000
    await message("BTC-USD", minute, 1, 7, 3)
    await message("BTC-USD", minute, 2, 1, 5)  # a later epoch, though a lower number
    await message("BTC-USD", minute, 1, 9, 4)
    await message("BTC-USD", minute + 60_000_000_000, 1, 10, 6)
    await message("ETH-USD", minute, 1, 2, 8)
    await message("ETH-USD", minute, 1, 1, 7)
    rows = await connection.fetch("SELECT symbol, start, close FROM vendor_bars_latest ORDER BY symbol, start")
    assert [tuple(row) for row in rows] == [
        ("BTC-USD", minute, 5),
        ("BTC-USD", minute + 60_000_000_000, 6),
        ("ETH-USD", minute, 8),
    ]
    await connection.close()
