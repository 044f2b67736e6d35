"""Migrations: from nothing to the newest schema, whoever comes first and whatever dies."""

import asyncio
import os
import pwd
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from conftest import until
from pydantic import SecretStr

from tapedeck import database
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

PLAIN = {"sink_offsets", "gaps", "dead_letters", "quarantine", "exchanges"}
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


async def test_with_timescaledb_the_tables_of_events_are_hypertables(settings: Settings) -> None:
    await database.prepare(settings)
    connection = await connected(settings)
    try:
        if not await connection.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'"):
            pytest.skip("this PostgreSQL has no TimescaleDB")
        names = await connection.fetch("SELECT hypertable_name FROM timescaledb_information.hypertables")
        assert {row["hypertable_name"] for row in names} == TABLES - PLAIN
    finally:
        await connection.close()


async def test_who_owns_the_database_need_not_be_superuser(settings: Settings) -> None:
    connection = await connected(settings)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'plain'; ALTER DATABASE {name} OWNER TO {name}")
    url = urlsplit(settings.database_url.get_secret_value())
    netloc = f"{name}:plain@{url.netloc.rpartition('@')[2]}"
    plain = SecretStr(url._replace(netloc=netloc).geturl())
    await database.prepare(settings.model_copy(update={"database_url": plain}))
    assert (await schema(settings)).keys() >= TABLES
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
from tapedeck import database
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
    assert time.monotonic() - started < 0.5
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
