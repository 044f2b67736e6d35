"""Real services for the tests: containers where a Docker engine answers, else the embedded ones.

TAPEDECK_TEST_DATABASE_URL names a database server to use instead; each test makes a database of its own in it.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest
from pydantic import SecretStr

from bench.market import write_frames
from schemas import events, topics
from tapedeck import database
from tapedeck import kafka as kafka_clients
from tapedeck.embedded import Service, prepare_kafka, prepare_postgres
from tapedeck.embedded.ports import free_ports
from tapedeck.settings import Settings

KAFKA_IMAGE = "confluentinc/cp-kafka:7.9.2"
POSTGRES_IMAGE = "timescale/timescaledb:2.23.1-pg17"


class Embedded:
    """An embedded server, as a child of the tests that dies with them."""

    def __init__(self, prepare: Callable[[Path], Service], folder: Path) -> None:
        self._prepare = prepare
        self._folder = folder
        self._service = prepare(folder)
        self.start()

    @property
    def address(self) -> str:
        (address,) = self._service.addresses.values()
        return address

    def start(self) -> None:
        with self._service.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._service.argv, stdout=log, stderr=log, preexec_fn=_die_with_parent, **self._service.options
            )

    def wait_ready(self) -> None:
        assert self._service.ready(240), self._service.log_tail()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """After `kill`: at the same address, for its port is still free."""
        before = self.address
        self._service = self._prepare(self._folder)
        assert self.address == before
        self.start()
        self.wait_ready()

    def stop(self) -> None:
        self.process.send_signal(self._service.stop_signal)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Servers(NamedTuple):
    """Addresses, and the embedded servers themselves, which a test may kill; None where they are not ours."""

    kafka: str
    postgres: str
    broker: Embedded | None = None
    database: Embedded | None = None


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    other = os.environ.get("TAPEDECK_TEST_DATABASE_URL")
    with contextlib.ExitStack() as stack:
        yield _containers(stack, other) if _docker_answers() else _embedded(stack, other)


@pytest.fixture(scope="session")
def kafka(servers: Servers) -> str:
    """host:port"""
    return servers.kafka


@pytest.fixture(scope="session")
def postgres(servers: Servers) -> str:
    """URL of a superuser."""
    return servers.postgres


def _docker_answers() -> bool:
    import docker

    try:
        return bool(docker.from_env(timeout=2).ping())
    except docker.errors.DockerException:
        return False


def _containers(stack: contextlib.ExitStack, other: str | None) -> Servers:
    from testcontainers.community.kafka import KafkaContainer
    from testcontainers.community.postgres import PostgresContainer

    broker = KafkaContainer(KAFKA_IMAGE).with_kraft().with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
    database = PostgresContainer(POSTGRES_IMAGE, driver=None)
    with ThreadPoolExecutor() as pool:
        list(pool.map(stack.enter_context, [broker] if other else [broker, database]))
    return Servers(broker.get_bootstrap_server(), other or database.get_connection_url())


def _embedded(stack: contextlib.ExitStack, other: str | None) -> Servers:
    # Not tmp_path_factory: pytest keeps its folders to their owner, and root's PostgreSQL runs as somebody else.
    folder = Path(tempfile.mkdtemp(prefix="tapedeck-tests-"))
    stack.callback(shutil.rmtree, folder)
    folder.chmod(0o711)
    broker = Embedded(prepare_kafka, folder / "kafka")  # it boots while PostgreSQL makes its tables
    stack.callback(broker.kill)  # nobody will read it again, and an orderly stop takes seconds
    database = None
    if not other:
        database = Embedded(prepare_postgres, folder / "postgres")
        stack.callback(database.stop)
        database.wait_ready()
    broker.wait_ready()
    return Servers(broker.address, database.address if database else str(other), broker, database)


@pytest.fixture
async def database_url(postgres: str) -> AsyncIterator[str]:
    """A fresh, empty database."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    server = await asyncpg.connect(postgres)
    await server.execute(f"CREATE DATABASE {name}")
    await server.close()
    yield urlsplit(postgres)._replace(path=f"/{name}").geturl()
    server = await asyncpg.connect(postgres)
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


@pytest.fixture
def settings(kafka: str, database_url: str, tmp_path: Path) -> Settings:
    """Topics and a database that no other test has."""
    return Settings(
        _env_file=None,
        kafka_bootstrap_servers=kafka,
        database_url=SecretStr(database_url),
        topic_prefix=f"t{uuid.uuid4().hex[:8]}.",
        journal_dir=tmp_path / "journal",
        connect_timeout_s=2,
        polygon_api_key=SecretStr("dummy"),
        http_port=0,
    )


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's migrated database."""
    await database.prepare(settings)
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    yield connection
    await connection.close()


Publish = Callable[[topics.Topic, int, Iterable[msgspec.Struct | bytes | None]], Awaitable[None]]


@pytest.fixture
async def publish(settings: Settings) -> AsyncIterator[Publish]:
    """Puts events, or raw values, on a partition of a topic; the registry's topics exist."""
    await kafka_clients.prepare(settings)
    publisher = kafka_clients.Publisher(settings)
    await publisher.start()

    async def publish(topic: topics.Topic, partition: int, values: Iterable[msgspec.Struct | bytes | None]) -> None:
        await publisher.publish(
            kafka_clients.Message(
                settings.topic_prefix + topic.name,
                partition,
                None,
                events.encode(value) if isinstance(value, msgspec.Struct) else value,  # type: ignore[arg-type]
                1_723_161_255_000,
                [],
            )
            for value in values
        )

    yield publish
    await publisher.stop()


class Process(NamedTuple):
    """`tapedeck …` as a process of its own, and the file with what it said."""

    popen: subprocess.Popen[bytes]
    log: Path

    def ended(self, timeout_s: float) -> int:
        """Its exit code, which it must have within `timeout_s`."""
        return self.popen.wait(timeout_s)


Spawn = Callable[..., Process]


@pytest.fixture
def spawn(settings: Settings, tmp_path: Path) -> Iterator[Spawn]:
    """Starts `tapedeck ARGUMENTS` with the test's settings; others can be given by keyword, and a `patch`: Python to
    run first."""
    started: list[Process] = []

    def spawn(*arguments: str, patch: str = "", **others: Any) -> Process:
        run = "import runpy, sys; sys.argv[0] = 'tapedeck'; runpy.run_module('tapedeck', run_name='__main__')"
        values = settings.model_copy(update=others)
        environment = {name.upper(): _text(getattr(values, name)) for name in values.model_fields_set}
        log = tmp_path / f"{len(started)}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [sys.executable, *(["-c", f"{patch}\n{run}"] if patch else ["-m", "tapedeck"]), *arguments],
                env=os.environ | environment,
                cwd=tmp_path,  # away from any tapedeck.env
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=_die_with_parent,
            )
        started.append(Process(popen, log))
        return started[-1]

    yield spawn
    for process in started:
        process.popen.kill()
        process.popen.wait()


RATE = 2_000


class Market(NamedTuple):
    """A simulated feed of 2,000 events/s, what it has sent, and where it takes faults."""

    record: Path
    url: str
    rest: str

    @property
    def control(self) -> str:
        return f"{self.rest}/control/faults"

    def events(self) -> int:
        return self.record.read_bytes().count(b'"ev"') if self.record.exists() else 0


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every market plays: longer than any test takes, also where Kafka needs a minute to come back."""
    path = tmp_path_factory.mktemp("market") / "frames.ndjson"
    # Of today: for records older than a day a broker that was killed no longer knows what it has of a producer.
    write_frames(path, RATE, 180, per_frame=4, begin_ms=int(time.time() * 1000))
    return path


@pytest.fixture
async def market(spawn: Spawn, frames: Path, tmp_path: Path) -> AsyncIterator[Market]:
    async with playing(spawn, frames, tmp_path / "sent.ndjson") as market:
        yield market


@contextlib.asynccontextmanager
async def playing(spawn: Spawn, frames: Path, record: Path) -> AsyncIterator[Market]:
    """A simulated feed of these frames."""
    port, rest = free_ports(2)
    ports = ["--port", str(port), "--rest-port", str(rest)]
    feed = spawn("simulate", *ports, "--frames", str(frames), "--speed", "1", "--record", str(record))

    async def ready() -> bool:
        return '"event": "feed"' in feed.log.read_text()

    await until(ready)
    yield Market(record, f"ws://127.0.0.1:{port}/crypto", f"http://127.0.0.1:{rest}")
    assert feed.popen.poll() is None, feed.log.read_text()


Produce = Callable[..., Process]


@pytest.fixture
def produce(spawn: Spawn, market: Market) -> Produce:
    def start(*arguments: str, **others: object) -> Process:
        vendor = {"polygon_ws_url": market.url, "polygon_rest_url": market.rest, "symbols": ["*"]}
        return spawn("produce", *arguments, **(vendor | others))

    return start


async def flows(market: Market, seconds: float = 1.0) -> None:
    """The feed has sent that much more."""
    before = market.events()

    async def more() -> bool:
        return market.events() >= before + seconds * RATE

    await until(more)


async def says(process: Process, words: str, timeout_s: float = 60) -> None:
    """It has logged these words."""

    async def said() -> bool:
        return words in process.log.read_text()

    await until(said, timeout_s)


async def recording(producer: Process) -> None:
    """It has taken up the log and listens to the feed: how long that takes is the machine's affair."""
    await says(producer, '"event": "subscribed"')


async def stopped(producer: Process) -> None:
    producer.popen.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(producer.ended, 10) == 0, producer.log.read_text()


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value)


async def until(holds: Callable[[], Awaitable[Any]], timeout_s: float = 60) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.02)
