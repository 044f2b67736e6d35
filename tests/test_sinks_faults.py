"""Each event once, whatever dies: sinks, database, disk; slow ones, and the beginning and end of a sink."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from conftest import Process, Publish, Servers, Spawn, until
from pydantic import SecretStr
from sinking import Load, all_once, counted, places, quote, reaches, says, sinking

from schemas import topics
from sinks import assignment, service, tables, writer
from tapedeck import database
from tapedeck.embedded.ports import free_ports
from tapedeck.settings import Settings
from tapedeck.shell import Shell

# -- whatever dies --------------------------------------------------------------------------------


@pytest.fixture
def load(publish: Publish) -> Load:
    return Load(publish)


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
    (port,) = free_ports(1)
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

    away = SecretStr(f"postgresql://someone@127.0.0.1:{free_ports(1)[0]}/tape")
    shell = Shell(settings.model_copy(update={"database_url": away, "connect_timeout_s": 30}), "sink")
    task = asyncio.create_task(service.run(shell, "all"))
    await stop_soon(shell)
    await task
