"""The producer against a feed that speaks the vendor's protocol, onto a real Kafka."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from aiokafka.errors import KafkaTimeoutError, TopicAuthorizationFailedError
from conftest import Spawn, until
from test_processor import send_in_transaction
from websockets.asyncio.server import ServerConnection, serve

from bench.scoring import raw_log
from producers import service, session
from producers.protocol import AuthFailed, Evicted, Protocol, Refused, SessionError
from producers.resume import read_log_end, read_silences
from producers.split import split_frame
from schemas import topics, wire
from schemas.frames import read_frames
from schemas.raw import RawRecord, decode_gap_value
from tapedeck import kafka
from tapedeck.settings import Settings
from tapedeck.shell import Shell

BEGIN_MS = 1_723_161_240_000


def status(name: str, message: str = "") -> bytes:
    return b'[{"ev":"status","status":"%s","message":"%s"}]' % (name.encode(), message.encode())


def trade(pair: str, number: int, ms: int, exchange: int = 1) -> bytes:
    return b'{"ev":"XT","pair":"%s","p":%d.50,"t":%d,"s":1e-3,"i":%d,"x":%d,"odd":[1, 2]}' % (
        pair.encode(),
        100 + number,
        ms,
        number,
        exchange,
    )


# -- the protocol machine ------------------------------------------------------------------------------


def test_the_protocol_authenticates_then_subscribes_then_is_live() -> None:
    protocol = Protocol("secret", ["XT.BTC-USD", "XQ.BTC-USD"])
    assert protocol.receive(status("connected")) == []
    assert protocol.to_send() == [b'{"action":"auth","params":"secret"}']
    protocol.receive(status("auth_success"))
    assert protocol.to_send() == [b'{"action":"subscribe","params":"XT.BTC-USD,XQ.BTC-USD"}']
    protocol.receive(status("success", "subscribed to: XQ.BTC-USD"))
    assert not protocol.live
    protocol.receive(status("success", "subscribed to: XT.BTC-USD"))
    assert protocol.live
    assert protocol.to_send() == []


def test_a_frame_may_mix_status_and_market_events() -> None:
    protocol = Protocol("secret", ["XT.A-B"])
    mixed = b"[" + status("success", "whatever")[1:-1] + b"," + trade("A-B", 1, BEGIN_MS) + b"]"
    assert [item.data for item in protocol.receive(mixed)] == [trade("A-B", 1, BEGIN_MS)]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("auth_failed", AuthFailed),
        ("auth_timeout", SessionError),
        ("max_connections", Evicted),
        ("slow_consumer", SessionError),
        ("force_disconnect", SessionError),
    ],
)
def test_what_ends_a_session_is_told_apart(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Protocol("secret", ["XT.A-B"]).receive(status(name, "because"))


def test_a_key_that_may_subscribe_to_nothing_is_refused_and_to_a_part_goes_on() -> None:
    protocol = Protocol("secret", ["XT.A-B", "XQ.A-B"])
    protocol.receive(status("connected"))
    protocol.receive(status("auth_success"))
    protocol.receive(status("error", "not authorized"))
    protocol.receive(status("success", "subscribed to: XQ.A-B"))
    assert protocol.live
    assert protocol.refused == ["XT.A-B"]
    protocol = Protocol("secret", ["XT.A-B"])
    protocol.receive(status("connected"))
    protocol.receive(status("auth_success"))
    with pytest.raises(Refused):
        protocol.receive(status("error", "not authorized"))


# -- on a real socket and a real Kafka ---------------------------------------------------------------


class Feed:
    """A scripted vendor: accepts everybody and sends what it is told to."""

    def __init__(self) -> None:
        self.sessions: list[ServerConnection] = []
        self.subscribed = asyncio.Event()
        self.url = ""

    async def handle(self, connection: ServerConnection) -> None:
        await connection.send(status("connected", "Connected Successfully").decode())
        await connection.recv()
        await connection.send(status("auth_success", "authenticated").decode())
        params = wire.msgspec.json.decode(await connection.recv())["params"].split(",")
        for param in params:
            await connection.send(status("success", f"subscribed to: {param}").decode())
        self.sessions.append(connection)
        self.subscribed.set()
        await connection.wait_closed()

    async def send(self, *events: bytes) -> None:
        await self.sessions[-1].send((b"[" + b",".join(events) + b"]").decode())

    async def again(self) -> None:
        await asyncio.wait_for(self.subscribed.wait(), 30)
        self.subscribed.clear()


@pytest.fixture
async def feed() -> AsyncIterator[Feed]:
    feed = Feed()
    async with serve(feed.handle, "127.0.0.1", 0) as server:
        feed.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/crypto"
        yield feed


@contextlib.asynccontextmanager
async def producing(settings: Settings, feed: Feed, record: Path | None = None) -> AsyncIterator[Shell]:
    shell = Shell(settings.model_copy(update={"polygon_ws_url": feed.url, "symbols": ["BTC-USD"]}), "produce")
    running = asyncio.create_task(service.run(shell, record))
    try:
        await feed.again()
        yield shell
    finally:
        shell.stopping.set()
        await asyncio.wait_for(running, 10)


def gaps(records: list[RawRecord]) -> list[tuple[str, int | None, int | None]]:
    values = [decode_gap_value(record.value) for record in records if record.kind == "gap"]
    return [(gap.reason, gap.from_, gap.to) for gap in values]


async def test_the_log_holds_the_very_bytes_numbered_and_in_order(
    settings: Settings, feed: Feed, tmp_path: Path
) -> None:
    sent = [trade("BTC-USD", n, BEGIN_MS + n * 100) for n in range(50)]
    other = [trade("ETH-USD", n, BEGIN_MS + n * 100, exchange=2) for n in range(50)]
    async with producing(settings, feed, tmp_path / "frames.ndjson"):
        for one, two in zip(sent, other, strict=True):
            await feed.send(one, two, b'{"ev":"XT","p":NaN}')
        await asyncio.sleep(0.5)
    log = await raw_log(settings)
    events = {p: [i.data for r in rs if r.kind == "slice" for i in split_frame(r.value)] for p, rs in log.items()}
    assert sorted(e for es in events.values() for e in es) == sorted(sent + other)
    assert [e for es in events.values() for e in es if b"BTC" in e] == sent
    assert sum(r.kind == "bad" and r.value == b'{"ev":"XT","p":NaN}' for r in log[0]) == 50
    for records in log.values():
        position = 0
        for record in records:
            assert (record.epoch, record.n) == (1, position)
            position += record.events
        stamps = [record.timestamp_ms for record in records]
        assert stamps == sorted(stamps)
        assert [reason for reason, *_ in gaps(records)] == ["start", "stop"]
    frames = [frame.data for frame in read_frames(tmp_path / "frames.ndjson")]
    assert b"".join(frames).count(b'"pair":"BTC-USD"') == 50


async def test_a_lost_connection_is_a_marked_gap_and_every_subscription_comes_back(
    settings: Settings, feed: Feed
) -> None:
    async with producing(settings, feed):
        await feed.send(trade("BTC-USD", 1, BEGIN_MS), trade("ETH-USD", 2, BEGIN_MS, 2))
        await asyncio.sleep(0.3)
        feed.sessions[-1].transport.abort()
        await feed.again()
        await feed.send(trade("BTC-USD", 3, BEGIN_MS + 4000), trade("ETH-USD", 4, BEGIN_MS + 4000, 2))
        await asyncio.sleep(0.3)
    for records in (await raw_log(settings)).values():
        marked = [gap for gap in gaps(records) if gap[0] == "reconnect"]
        assert marked == [("reconnect", BEGIN_MS * 10**6, (BEGIN_MS + 4000) * 10**6)]


async def test_the_next_start_goes_on_from_the_log_and_marks_its_absence(settings: Settings, feed: Feed) -> None:
    for start in range(2):
        ms = BEGIN_MS + start * 5000
        async with producing(settings, feed):
            await feed.send(trade("BTC-USD", start * 2, ms), trade("ETH-USD", start * 2 + 1, ms, 2))
            await asyncio.sleep(0.3)
    resume = (await read_log_end(settings)).resume({})
    assert resume is not None
    assert resume.epoch > 1
    for records in (await raw_log(settings)).values():
        assert [reason for reason, *_ in gaps(records)] == ["start", "stop", "away", "stop"]
        _, since, until = gaps(records)[2]
        assert since is not None
        assert since <= (BEGIN_MS + 1000) * 10**6
        assert until == (BEGIN_MS + 5000) * 10**6
    await write_foreign(settings)
    assert (await read_log_end(settings)).resume({}) == resume


async def test_a_log_that_ends_with_the_end_of_a_transaction_is_gone_on_with(settings: Settings) -> None:
    """As where somebody copied it in transactions, each of which takes an offset that is no record's."""
    await kafka.prepare(settings)
    value = b'{"fresh":[],"silent":{"XT":5}}'
    ticks = [RawRecord(p, BEGIN_MS, "tick", 4, 7, [(1, 1)], value) for p in range(topics.PARTITIONS)]
    await send_in_transaction(settings, ticks)
    for _ in range(2):
        async with asyncio.timeout(60):
            end = await read_log_end(settings)
            assert await read_silences(settings, end) == {"XT": 5}
        assert (end.epoch, end.clock_ms, end.common_ms) == (4, BEGIN_MS, BEGIN_MS)
        await write_foreign(settings)


async def write_foreign(settings: Settings) -> None:
    """Two records behind the end of each partition that no producer wrote."""
    publisher, topic = kafka.Publisher(settings), settings.topic_prefix + topics.RAW.name
    await publisher.start()
    for value in (b"", b"foreign"):
        await publisher.publish(
            kafka.Message(topic, number, None, value, BEGIN_MS, []) for number in range(topics.PARTITIONS)
        )
    await publisher.stop()


# -- as a process ------------------------------------------------------------------------------------


def produce(settings: Settings, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tapedeck", "produce"],
        env=os.environ
        | {
            "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "TOPIC_PREFIX": settings.topic_prefix,
            "POLYGON_API_KEY": "a-wrong-key",
            "HTTP_PORT": "0",
            "JOURNAL_DIR": str(settings.journal_dir),
            "LOG_FORMAT": "json",
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_a_wrong_key_is_one_clear_line_exit_2_and_no_retry_storm(settings: Settings) -> None:
    connections = 0

    async def refuse(connection: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        await connection.send(status("connected").decode())
        await connection.recv()
        await connection.send(status("auth_failed", "authentication failed").decode())
        await connection.wait_closed()

    async with serve(refuse, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/crypto"
        done = await asyncio.to_thread(produce, settings, POLYGON_WS_URL=url)
    assert done.returncode == 2
    assert connections == 1
    complaints = [line for line in done.stderr.splitlines() if '"level": "error"' in line]
    assert len(complaints) == 1
    assert "refused the key" in complaints[0]
    assert "a-wrong-key" not in done.stderr + done.stdout


def test_an_unreachable_kafka_is_named_and_given_up_after_a_set_time(settings: Settings) -> None:
    done = produce(settings, KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1", CONNECT_TIMEOUT_S="2")
    assert done.returncode == 1
    assert "Kafka at 127.0.0.1:1 cannot be reached after 2 s (KAFKA_BOOTSTRAP_SERVERS," in done.stderr


async def test_a_record_file_on_a_full_disk_costs_the_record_and_not_the_tape(settings: Settings, feed: Feed) -> None:
    async with producing(settings, feed, Path("/dev/full")):
        for n in range(300):
            ms = BEGIN_MS + n * 100
            await feed.send(trade("BTC-USD", n, ms), trade("ETH-USD", n, ms, exchange=2), b"1" * 300)
        await asyncio.sleep(0.3)
    log = await raw_log(settings)
    assert sum(r.events for records in log.values() for r in records if r.kind == "slice") == 900
    assert {reason for records in log.values() for reason, *_ in gaps(records)} == {"start", "stop"}


async def test_the_line_that_a_killed_process_tore_is_not_appended_to(
    settings: Settings, feed: Feed, tmp_path: Path
) -> None:
    path = tmp_path / "frames.ndjson"
    path.write_bytes(b'{"recv_ns":1,"frame":[]}\n{"recv_ns":2,"fra')
    async with producing(settings, feed, path):
        await feed.send(trade("BTC-USD", 1, BEGIN_MS))
        await asyncio.sleep(0.2)
    assert next(frame.recv_ns for frame in read_frames(path)) == 1
    assert b"BTC-USD" in path.read_bytes()


async def test_ctrl_c_ends_it_within_seconds_though_kafka_does_not_answer(spawn: Spawn) -> None:
    producer = spawn("produce", kafka_bootstrap_servers="127.0.0.1:1", connect_timeout_s=60)

    async def trying() -> bool:
        return "Kafka cannot be reached, trying again" in producer.log.read_text()

    await until(trying)
    producer.popen.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(producer.ended, 10) == 0, producer.log.read_text()


async def test_a_round_that_fails_half_way_is_gone_on_with_from_what_the_log_has(
    settings: Settings, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, failures = kafka.Publisher.publish, 0

    async def half(publisher: kafka.Publisher, messages: Iterable[kafka.Message]) -> None:
        nonlocal failures
        messages = list(messages)
        if len(messages) > 4 and failures < 5:
            failures += 1
            await publish(publisher, messages[: len(messages) // 2])
            raise KafkaTimeoutError
        await publish(publisher, messages)

    monkeypatch.setattr(kafka.Publisher, "publish", half)
    async with producing(settings, feed):
        for n in range(300):
            ms = BEGIN_MS + n * 100
            await feed.send(trade("BTC-USD", n, ms), trade("ETH-USD", n, ms, exchange=2))
            await asyncio.sleep(0.01)
    assert failures > 2
    for records in (await raw_log(settings)).values():
        position = 0
        for record in records:
            assert (record.epoch, record.n) == (1, position)
            position += record.events


async def test_a_user_that_may_not_write_any_more_is_told_of_with_what_to_do(
    settings: Settings, feed: Feed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded Kafka has no access control: its answer is put in the publisher's place."""
    publish, allowed = kafka.Publisher.publish, False

    async def denied(publisher: kafka.Publisher, messages: Iterable[kafka.Message]) -> None:
        if not allowed:
            raise TopicAuthorizationFailedError("raw")
        await publish(publisher, messages)

    monkeypatch.setattr(kafka.Publisher, "publish", denied)
    async with producing(settings, feed) as shell:
        await feed.send(trade("BTC-USD", 1, BEGIN_MS), trade("ETH-USD", 2, BEGIN_MS, 2))

        async def said() -> bool:
            return "Write, Read and Describe" in (shell.health.get("kafka") or "")

        async def well() -> bool:
            return shell.health.get("kafka", "") is None

        await until(said)
        allowed = True
        await until(well)
    assert "this user may not write to the topic" in "".join(capsys.readouterr())
    assert sum(r.events for records in (await raw_log(settings)).values() for r in records if r.kind == "slice") == 2


async def test_a_session_that_nobody_watches_any_more_ends_the_producer(
    settings: Settings, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(service.Slicer, "pong", broken)
    shell = Shell(settings.model_copy(update={"polygon_ws_url": feed.url}), "produce")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(service.run(shell), 20)


def test_thousands_of_failures_in_a_row_are_no_reason_to_fail() -> None:
    rests = [session.jitter(failures, 0.5, 60) for failures in (0, 1, 5_000)]
    assert max(rests[:2]) <= 0.5
    assert rests[2] <= 60


async def test_an_auth_success_is_no_reason_to_come_back_sooner_but_data_that_flowed_are(
    settings: Settings, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[int] = []

    def jitter(failures: int, *_: float) -> float:
        rests.append(failures)
        return 0.01

    monkeypatch.setattr(session, "jitter", jitter)
    monkeypatch.setattr(session, "GOOD_AFTER_S", 0.3)
    async with producing(settings, feed):
        for lost in range(4):  # authenticated and subscribed each time, and gone; the fourth time after data
            if lost == 3:
                for ms in (0, 400):
                    await asyncio.sleep(ms / 1000)
                    await feed.send(trade("BTC-USD", ms, BEGIN_MS + ms), trade("ETH-USD", ms, BEGIN_MS + ms, 2))
                await asyncio.sleep(0.2)
            feed.sessions[-1].transport.abort()
            await feed.again()
    assert rests[:4] == [1, 2, 3, 0]


def test_a_pair_that_cannot_be_understood_is_refused_at_start_with_the_reason(settings: Settings) -> None:
    done = produce(settings, SYMBOLS="BTC-USD,BTC/USD")
    assert done.returncode == 2
    assert "SYMBOLS: 'BTC/USD' is not a currency pair like BTC-USD" in done.stderr


@pytest.mark.parametrize(
    "url", ["wss://{address}/crypto", "ws://127.0.0.1:1/crypto", "ws://no-such-host.invalid/crypto"]
)
async def test_names_and_tls_that_fail_and_refused_connections_are_tried_again(
    settings: Settings, feed: Feed, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONGEST_RETRY_S", 0.2)
    url = url.format(address=feed.url.split("/")[2])
    shell = Shell(settings.model_copy(update={"polygon_ws_url": url}), "produce")
    running = asyncio.create_task(service.run(shell))
    said = ""

    async def twice() -> bool:
        nonlocal said
        captured = capsys.readouterr()
        said += captured.out + captured.err
        return said.count("the feed's connection is gone") >= 2

    await until(twice)
    assert not running.done()
    shell.stopping.set()
    await asyncio.wait_for(running, 10)
