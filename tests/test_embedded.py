"""The embedded Kafka and PostgreSQL, as they are: real servers, killed for real."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tapedeck.embedded import (
    EmbeddedError,
    Service,
    Status,
    ensure_jars,
    environment,
    prepare_kafka,
    prepare_postgres,
    start,
    status,
    stop,
)
from tapedeck.embedded import ports as ports_
from tapedeck.embedded.jars import locked_jars


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    # Not tmp_path: pytest keeps its folders to their owner, and root's PostgreSQL runs as somebody else.
    folder = Path(tempfile.mkdtemp(prefix="tapedeck-"))
    folder.chmod(0o711)
    yield folder
    for data_dir in folder.iterdir():
        stop(data_dir)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def data_dir(base: Path) -> Path:
    folder = base / "märz 1"  # a blank and a letter that isn't ASCII
    start(folder)
    return folder


def pids(statuses: list[Status]) -> list[int | None]:
    return [each.pid for each in statuses]


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        places = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in place for place in places):
            found.append(process)
    return found


async def create_topic(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()


async def topics(bootstrap: str) -> set[str]:
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap) as consumer:
        return set(await consumer.topics())


async def send(bootstrap: str, topic: str, values: list[bytes]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        for value in values:
            await producer.send_and_wait(topic, value)


async def read(bootstrap: str, topic: str, count: int) -> list[bytes]:
    async with AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest") as consumer:
        return [(await asyncio.wait_for(consumer.getone(), 10)).value for _ in range(count)]


async def test_start_returns_when_both_services_take_work(data_dir: Path) -> None:
    env = environment(data_dir)
    await create_topic(env["KAFKA_BOOTSTRAP_SERVERS"], "tape")
    await send(env["KAFKA_BOOTSTRAP_SERVERS"], "tape", [b"1", b"2"])
    assert await read(env["KAFKA_BOOTSTRAP_SERVERS"], "tape", 2) == [b"1", b"2"]

    connection = await asyncpg.connect(env["DATABASE_URL"])
    assert await connection.fetchval("SELECT current_database()") == "tapedeck"
    settings = {name: await connection.fetchval(f"SHOW {name}") for name in ("fsync", "server_encoding")}
    assert settings == {"fsync": "on", "server_encoding": "UTF8"}
    await connection.close()


async def test_a_topic_is_never_made_by_accident(data_dir: Path) -> None:
    bootstrap = environment(data_dir)["KAFKA_BOOTSTRAP_SERVERS"]
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, request_timeout_ms=500) as producer:
        with pytest.raises(Exception, match=r"KafkaTimeoutError|UnknownTopic"):
            await producer.send_and_wait("tpae", b"1")
    assert "tpae" not in await topics(bootstrap)


async def test_the_database_asks_for_its_password(data_dir: Path) -> None:
    url = environment(data_dir)["DATABASE_URL"]
    password = (data_dir / "postgres.password").read_text()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(url.replace(password, "guess"))
    assert (data_dir / "postgres.password").stat().st_mode & 0o077 == 0


def test_status_names_the_running_processes(data_dir: Path) -> None:
    kafka, postgres = status(data_dir)
    assert (kafka.name, postgres.name) == ("kafka", "postgres")
    assert psutil.Process(kafka.pid).name() == "java"
    assert psutil.Process(postgres.pid).name() == "postgres"


def test_postgres_does_not_run_as_root(data_dir: Path) -> None:
    _, postgres = status(data_dir)
    assert psutil.Process(postgres.pid).uids().effective != 0


def test_a_second_start_changes_nothing(data_dir: Path) -> None:
    before = status(data_dir)
    again = start(data_dir)
    assert pids(again) == pids(before)
    assert not any(each.started for each in again)


@pytest.mark.parametrize("prepare", [prepare_kafka, prepare_postgres])
def test_a_running_service_is_not_prepared_again(data_dir: Path, prepare: Callable[[Path], Service]) -> None:
    with pytest.raises(EmbeddedError, match=r"already runs .* as process"):
        prepare(data_dir)


async def test_two_folders_run_side_by_side_and_stop_leaves_no_process(base: Path, data_dir: Path) -> None:
    other = base / "other"
    with ThreadPoolExecutor(2) as pool:  # two starts at once make one pair
        one, two = pool.map(start, [other, other])
    assert pids(one) == pids(two)
    assert sum(each.started for each in one + two) == 2

    first, second = environment(data_dir), environment(other)
    await create_topic(second["KAFKA_BOOTSTRAP_SERVERS"], "other")
    assert "other" not in await topics(first["KAFKA_BOOTSTRAP_SERVERS"])
    assert set(first.values()).isdisjoint(second.values())

    assert processes_of(other)
    stop(other)
    assert processes_of(other) == []
    assert pids(status(other)) == [None, None]
    assert (other / "kafka" / ".kafka_cleanshutdown").exists()
    assert "database system is shut down" in (other / "postgres.log").read_text()
    assert None not in pids(status(data_dir))
    stop(other)


async def test_data_and_addresses_survive_kill_9(data_dir: Path) -> None:
    env = environment(data_dir)
    await create_topic(env["KAFKA_BOOTSTRAP_SERVERS"], "kept")
    values = [b"%d" % number for number in range(100)]
    await send(env["KAFKA_BOOTSTRAP_SERVERS"], "kept", values)
    connection = await asyncpg.connect(env["DATABASE_URL"])
    await connection.execute("CREATE TABLE kept (number int)")
    await connection.executemany("INSERT INTO kept VALUES ($1)", [(number,) for number in range(100)])

    # The session is open and busy, so that its backend outlives the server that it belongs to.
    busy = asyncio.ensure_future(connection.fetchval("SELECT count(*) FROM generate_series(1, 1e9)"))
    await asyncio.sleep(0.2)
    killed = [psutil.Process(each.pid) for each in status(data_dir)]
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, 5)
    assert pids(status(data_dir)) == [None, None]

    assert all(each.started for each in start(data_dir))
    assert environment(data_dir) == env
    assert await read(env["KAFKA_BOOTSTRAP_SERVERS"], "kept", 100) == values
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await busy
    connection = await asyncpg.connect(env["DATABASE_URL"])
    assert await connection.fetchval("SELECT sum(number) FROM kept") == sum(range(100))
    await connection.close()


def test_a_service_that_cannot_start_says_why_and_leaves_nothing(data_dir: Path) -> None:
    stop(data_dir)
    meta = data_dir / "kafka" / "meta.properties"
    good = meta.read_text()
    meta.write_text(good.replace("node.id=1", "node.id=7"))
    with pytest.raises(EmbeddedError, match=r"(?s)kafka stopped while it was starting.*node.id"):
        start(data_dir)
    assert processes_of(data_dir) == []
    meta.write_text(good)


def test_a_supervised_server_starts_though_its_old_pid_is_taken(data_dir: Path) -> None:
    stop(data_dir)
    before = environment(data_dir)["DATABASE_URL"]
    service = prepare_postgres(data_dir)
    stranger = subprocess.Popen(["sleep", "60"], **service.options)
    pid_file = data_dir / "postgres" / "postmaster.pid"
    pid_file.write_text(f"{stranger.pid}\n{pid_file.parent}\n0\n0\n\n127.0.0.1\n0 0\nready\n")

    service = prepare_postgres(data_dir)
    assert service.addresses == {"DATABASE_URL": before}
    with service.log.open("ab") as log:
        server = subprocess.Popen(service.argv, stdout=log, stderr=log, **service.options)
    assert service.ready(10), service.log_tail()
    server.send_signal(service.stop_signal)
    assert server.wait(10) == 0
    stranger.kill()
    stranger.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")
def test_a_folder_that_postgres_cannot_enter_is_named(base: Path) -> None:
    closed = base / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError, match=rf"may not enter {closed}\. .*chmod o\+x"):
        prepare_postgres(closed / "data")


def test_a_jar_with_the_wrong_checksum_is_refused_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_jars()
    jar = locked_jars()[-1]
    shutil.copytree(jar.path.parent, tmp_path / "jars")
    monkeypatch.setenv("TAPEDECK_CACHE_DIR", str(tmp_path))
    assert jar.path.is_relative_to(tmp_path)
    with jar.path.open("ab") as file:
        file.write(b"!")
    with pytest.raises(EmbeddedError, match=f"{jar.path.name} .*sha256.* has been deleted"):
        ensure_jars()
    assert not jar.path.exists()


def test_a_port_is_given_once_though_nobody_has_bound_it_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports_, "LISTENING", range(23_000, 23_100))
    given = [port for _ in range(40) for port in ports_.free_ports(1)]
    assert len(set(given)) == 40
