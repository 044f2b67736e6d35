"""The simulator: Polygon's protocol over real sockets, frames files played untouched, a plausible market."""

import asyncio
import base64
import contextlib
import gzip
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from decimal import Decimal
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from massive.exceptions import AuthError
from massive.websocket import WebSocketClient
from massive.websocket.models import CryptoQuote, CryptoTrade, CurrencyAgg
from prometheus_client import REGISTRY
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from schemas import wire
from schemas.frames import NotAFramesFile, read_frames
from schemas.numbers import decimal_of
from simulator.config import DEFAULT_SYMBOLS, MAX_SPEED, SimulatorConfig
from simulator.frame import Frame
from simulator.market import market
from simulator.minute import Minute
from simulator.protocol import Session
from simulator.server import Bound, serve
from simulator.symbols import plausible

CAPTURES = Path(__file__).parents[2] / "shared" / "data" / "polygon-captures"
FULL = Path("/dev/full")
START_NS = 1_732_200_000_000_000_000  # a whole minute
MINUTE_NS = 60_000_000_000
RECV_NS = 1_723_161_255_000_000_000

CONNECTED = {"ev": "status", "status": "connected", "message": "Connected Successfully"}
AUTH_SUCCESS = {"ev": "status", "status": "auth_success", "message": "authenticated"}
NOT_AUTHORIZED = {"ev": "status", "status": "error", "message": "not authorized"}

# Numbers and spacing that any decoding and encoding again would change.
BTC = b'{"ev":"XT", "pair":"BTC-USD","p":61000.10,"t":1723161255001,"s":4.522E-05,"i":"a","x":1,"new":[1.0]}'
ETH = b'{"ev":"XT","pair":"ETH-USD","p":2600.00,"t":1723161255003,"s":1e0,"i":18446744073709551616,"x":2}'
QUOTE = b'{"ev":"XQ","pair":"ETH-USD","bp":2599.90,"ap":2600.10,"t":1723161255002,"x":2}'
BAR = b'{"ev":"XA","pair":"BTC-USD","o":1,"h":2,"l":1,"c":2,"v":3.00,"s":1723161180000,"e":1723161240000}'


def ack(param: str, action: str = "subscribed") -> dict[str, str]:
    return {"ev": "status", "status": "success", "message": f"{action} to: {param}"}


def array(*events: bytes) -> bytes:
    return b"[" + b",".join(events) + b"]"


def frames_file(path: Path, frames: Iterable[bytes], step_ms: int = 1) -> Path:
    """A frames file with `step_ms` between the frames."""
    lines = [
        b'{"recv_ns":%d,"frame":%b}\n' % (RECV_NS + number * step_ms * 1_000_000, frame)
        for number, frame in enumerate(frames)
    ]
    path.write_bytes(b"".join(lines))
    return path


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"tapedeck_feed_{name}", labels) or 0.0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def simulator(**settings: Any) -> AsyncIterator[int]:
    """A running simulator's port; re-raises what it ended with."""
    stop = asyncio.Event()
    bound: asyncio.Future[Bound] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(SimulatorConfig(**settings), stop, bound.set_result))
    await asyncio.wait([serving, bound], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        yield bound.result().port
    finally:
        stop.set()
        await serving


@contextlib.asynccontextmanager
async def client(port: int, params: str | None = None) -> AsyncIterator[ClientConnection]:
    """A connection, authenticated and subscribed to `params` unless None."""
    async with connect(f"ws://127.0.0.1:{port}/crypto", close_timeout=0.2) as connection:
        assert await statuses(connection) == [CONNECTED]
        if params is not None:
            assert await ask(connection, "auth", "any") == [AUTH_SUCCESS]
            assert await ask(connection, "subscribe", params) == [ack(param) for param in params.split(",")]
        yield connection


async def receive(connection: ClientConnection) -> bytes:
    async with asyncio.timeout(20):
        return await connection.recv(decode=False)


async def statuses(connection: ClientConnection) -> Any:
    return json.loads(await receive(connection))


async def ask(connection: ClientConnection, action: str, params: str) -> Any:
    await connection.send(json.dumps({"action": action, "params": params}))
    return await statuses(connection)


async def is_silent(connection: ClientConnection) -> bool:
    try:
        async with asyncio.timeout(0.1):
            await connection.recv()
    except TimeoutError:
        return True
    return False


async def play_all(frames: Path, received: list[bytes], **settings: Any) -> None:
    """Play a file to a client until it is closed; re-raises what the simulator ended with."""
    async with simulator(frames=frames, speed=MAX_SPEED, **settings) as port, client(port, "XT.*") as connection:
        with contextlib.suppress(ConnectionClosed):
            while True:
                received.append(await receive(connection))


class TestProtocol:
    async def test_the_official_client_gets_parsed_trades_quotes_and_aggregates(self, tmp_path: Path) -> None:
        sent = list(takewhile(lambda frame: frame.offset_ns < 65e9, market(1, DEFAULT_SYMBOLS, START_NS)))
        wanted = {("XT", "BTC-USD"), ("XQ", "SOL-USD"), *(("XA", symbol) for symbol in DEFAULT_SYMBOLS)}
        expected = [json.loads(event.data) for frame in sent for event in frame.events if event.topic in wanted]
        frames = frames_file(tmp_path / "frames", [frame.data for frame in sent])
        messages: list[Any] = []

        async def collect(batch: list[Any]) -> None:
            messages.extend(batch)

        async with simulator(frames=frames, speed=MAX_SPEED) as port:
            official = WebSocketClient(
                "key",
                feed=f"127.0.0.1:{port}",
                market="crypto",
                secure=False,
                subscriptions=["XT.BTC-USD", "XQ.SOL-USD", "XA.*"],
            )
            session = asyncio.create_task(official.connect(collect))
            await until(lambda: len(messages) >= len(expected))
            await official.close()
            await asyncio.wait_for(session, 5)
        assert [message.event_type for message in messages] == [event["ev"] for event in expected]
        for message, event in zip(messages, expected, strict=True):
            match message:
                case CryptoTrade():
                    assert (message.price, message.size, message.id) == (event["p"], event["s"], event["i"])
                case CryptoQuote():
                    assert (message.bid_price, message.ask_price) == (event["bp"], event["ap"])
                case CurrencyAgg():
                    assert (message.open, message.volume, message.vwap) == (event["o"], event["v"], event["vw"])

    async def test_the_official_client_is_told_that_its_key_is_wrong(self) -> None:
        async with simulator(keys=frozenset({"good"})) as port:
            official = WebSocketClient("bad", feed=f"127.0.0.1:{port}", market="crypto", secure=False)
            with pytest.raises(AuthError, match="authentication failed"):
                await asyncio.wait_for(official.connect(lambda _: asyncio.sleep(0)), 5)

    @pytest.mark.parametrize(
        ("action", "params", "reply"),
        [
            ("auth", "any", [AUTH_SUCCESS]),
            ("subscribe", "XT.BTC-USD", [ack("XT.BTC-USD")]),
            ("subscribe", "XT.BTC-USD, XA.*", [ack("XT.BTC-USD"), ack("XA.*")]),
            ("subscribe", "XT.X:BTC-USD,XT.X:BTCUSD", [ack("XT.X:BTC-USD"), ack("XT.X:BTCUSD")]),
            ("subscribe", "XT.NONE-USD", [ack("XT.NONE-USD")]),
            ("subscribe", "T.MSFT,XQ.ETH-USD", [NOT_AUTHORIZED, ack("XQ.ETH-USD")]),
            ("subscribe", "XT", [NOT_AUTHORIZED]),
            ("subscribe", "", [NOT_AUTHORIZED]),
            ("unsubscribe", "XT.BTC-USD,T.MSFT", [ack("XT.BTC-USD", "unsubscribed"), NOT_AUTHORIZED]),
        ],
    )
    async def test_every_param_is_answered(self, action: str, params: str, reply: list[Any]) -> None:
        async with simulator() as port, client(port) as connection:
            assert await ask(connection, "auth", "any") == [AUTH_SUCCESS]
            assert await ask(connection, action, params) == reply

    async def test_nothing_is_granted_before_auth(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)])
        async with simulator(frames=frames, speed=MAX_SPEED) as port, client(port) as connection:
            for action in ("subscribe", "unsubscribe"):
                assert await ask(connection, action, "XT.*") == [NOT_AUTHORIZED]
            assert await is_silent(connection)

    @pytest.mark.parametrize("message", [b"", b"{", b"[]", b'{"action":"dance"}', b'{"action":1}', b"\xff"])
    def test_what_is_no_command_is_an_error_and_not_the_end(self, message: bytes) -> None:
        session = Session()
        assert json.loads(session.receive(message))[0]["status"] == "error"
        assert json.loads(session.receive(b'{"action":"auth","params":"k"}')) == [AUTH_SUCCESS]

    async def test_a_key_that_is_not_accepted_ends_the_connection(self) -> None:
        async with simulator(keys=frozenset({"good"})) as port:
            async with client(port) as connection:
                assert (await ask(connection, "auth", "bad"))[0]["status"] == "auth_failed"
                with pytest.raises(ConnectionClosed):
                    await receive(connection)
            async with client(port) as connection:
                assert await ask(connection, "auth", "good") == [AUTH_SUCCESS]

    async def test_a_client_that_does_not_authenticate_is_timed_out(self) -> None:
        async with simulator(auth_timeout_s=0.1) as port:
            async with client(port) as connection:
                assert (await statuses(connection))[0]["status"] == "auth_timeout"
                with pytest.raises(ConnectionClosed):
                    await receive(connection)
            async with client(port, "XT.NONE-USD") as connection:
                await asyncio.sleep(0.2)
                assert await ask(connection, "unsubscribe", "XT.*") == [ack("XT.*", "unsubscribed")]

    async def test_the_feed_is_at_crypto_only(self) -> None:
        async with simulator() as port:
            with pytest.raises(InvalidStatus, match="404"):
                await connect(f"ws://127.0.0.1:{port}/stocks")


class TestDelivery:
    @pytest.mark.parametrize("param", ["XT.BTC-USD", "XT.X:BTC-USD", "XT.*"])
    async def test_a_subscription_delivers(self, tmp_path: Path, param: str) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)])
        async with simulator(frames=frames, speed=MAX_SPEED) as port, client(port, param) as connection:
            assert await receive(connection) == array(BTC)

    @pytest.mark.parametrize("param", ["XT.X:BTCUSD", "XT.NONE-USD", "XA.ETH-USD", "XAS.BTC-USD", "XL2.*"])
    async def test_an_ack_is_not_delivery(self, tmp_path: Path, param: str) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC, BAR), array(QUOTE)])
        async with (
            simulator(frames=frames, speed=MAX_SPEED) as port,
            client(port, f"{param},XQ.ETH-USD") as connection,
        ):
            assert await receive(connection) == array(QUOTE)

    async def test_a_captured_session_arrives_byte_for_byte(self, tmp_path: Path) -> None:
        if not CAPTURES.is_dir():
            pytest.skip("the captured messages are not on this machine")
        bars = (CAPTURES / "xa_btcusd_2020-07-16_with_revision.jsonl").read_bytes().splitlines()
        trade = (CAPTURES / "xt_btcusd_2024-01-30_frame.json").read_bytes().strip()
        sent = [array(bar) for bar in bars] + [array(*bars), trade]
        frames = frames_file(tmp_path / "frames", sent)
        async with simulator(frames=frames, speed=MAX_SPEED) as port, client(port, "XA.*,XT.*") as connection:
            assert [await receive(connection) for _ in sent] == sent

    async def test_a_client_gets_the_bytes_of_its_events_only(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [b"[ " + BTC + b" ,\t" + ETH + b"," + QUOTE + b"]"])
        async with (
            simulator(frames=frames, speed=MAX_SPEED) as port,
            client(port, "XT.BTC-USD,XQ.*") as connection,
        ):
            assert await receive(connection) == array(BTC, QUOTE)

    async def test_events_without_a_pair_and_bytes_that_are_no_array_reach_everyone(self, tmp_path: Path) -> None:
        odd = [b'[1,"x",{"ev":"new"}]', b"[" + ETH + b',{"ev":"XT","pair":7}]', b'{"ev":"XT"', b"[\n1]", b"[]"]
        binary = [b"\xff[]", b'[{"ev":"\xff"}]']
        lines = [
            b'{"recv_ns":%d,"base64":"%b"}' % (RECV_NS, base64.b64encode(frame))
            for frame in [*odd, *binary, array(BTC)]
        ]
        frames, record = tmp_path / "frames", tmp_path / "record"
        frames.write_bytes(b"\n".join(lines))
        async with (
            simulator(frames=frames, speed=MAX_SPEED, record=record) as port,
            client(port, "XT.BTC-USD") as connection,
        ):
            text = [odd[0], b'[{"ev":"XT","pair":7}]', *odd[2:]]
            expected: list[str | bytes] = [*(frame.decode() for frame in text), *binary, array(BTC).decode()]
            assert [await connection.recv() for _ in expected] == expected
        assert [frame.data for frame in read_frames(record)] == [*text, *binary, array(BTC)]
        assert len(recorded(record)) == len(expected)  # every line is JSON

    async def test_after_the_file_the_connection_stays_open_and_answers_pings(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)])
        async with simulator(frames=frames, speed=MAX_SPEED) as port, client(port, "XT.*") as connection:
            await receive(connection)
            await until(lambda: sample("finished") == 1)
            assert await is_silent(connection)
            await (await connection.ping())

    async def test_a_file_is_played_at_a_multiple_of_its_pace(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)] * 5, step_ms=1000)
        began = time.monotonic()
        async with simulator(frames=frames, speed=20.0) as port, client(port, "XT.*") as connection:
            for number in range(5):
                await receive(connection)
                assert time.monotonic() - began >= number / 20
            assert time.monotonic() - began < 4  # at its own pace it takes as long

    async def test_a_gzipped_file_plays_too(self, tmp_path: Path) -> None:
        plain = frames_file(tmp_path / "frames", [array(BTC)])
        zipped = tmp_path / "frames.gz"
        zipped.write_bytes(gzip.compress(plain.read_bytes()))
        async with simulator(frames=zipped, speed=MAX_SPEED) as port, client(port, "XT.*") as connection:
            assert await receive(connection) == array(BTC)

    async def test_what_was_published_while_nobody_was_connected_is_gone(self, tmp_path: Path) -> None:
        events = [BTC.replace(b'"a"', b"%d" % number) for number in range(200)]
        frames = frames_file(tmp_path / "frames", [array(event, ETH) for event in events], step_ms=10)
        record = tmp_path / "record"
        async with simulator(frames=frames, record=record) as port:
            async with client(port, "XT.BTC-USD") as connection:
                first = await receive(connection)
            await until(lambda: [line["clients"] for line in recorded(record)].count(0) > 10)
            async with client(port, "XT.BTC-USD") as connection:
                second = await receive(connection)
            await until(lambda: sample("finished") == 1)
        assert first == array(events[0])
        lines = recorded(record)
        assert [array(event) for event in events] == [frame.data for frame in read_frames(record)]
        lost = [line["clients"] for line in lines].index(0)
        assert lost + 10 < [array(event) for event in events].index(second)
        assert lines[-1]["clients"] == 0

    async def test_at_max_speed_the_market_waits_for_a_client(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)] * 20_000)
        record = tmp_path / "record"
        async with simulator(frames=frames, speed=MAX_SPEED, record=record) as port:
            async with client(port, "XT.*") as connection:
                await receive(connection)
            await until(lambda: sample("clients") == 0)
            await asyncio.sleep(0.05)
            sent = len(recorded(record))
            await asyncio.sleep(0.05)
            assert len(recorded(record)) == sent < 20_000
            async with client(port, "XT.*") as connection:
                await receive(connection)

    async def test_unsubscribing_ends_delivery(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC), *[array(BTC, QUOTE)] * 2000], step_ms=10)
        async with simulator(frames=frames) as port, client(port, "XT.*,XQ.*") as connection:
            assert await receive(connection) == array(BTC)
            await connection.send(b'{"action":"unsubscribe","params":"XT.*"}')
            while b"unsubscribed" not in await receive(connection):
                pass
            assert await receive(connection) == array(QUOTE)

    async def test_sending_ends_after_the_given_seconds(self) -> None:
        async with simulator(speed=100.0, seconds=0.3) as port, client(port, "XQ.*") as connection:
            await receive(connection)
            await until(lambda: sample("finished") == 1)
            with contextlib.suppress(TimeoutError):
                while True:
                    await asyncio.wait_for(connection.recv(), 0.05)
            assert await is_silent(connection)

    async def test_a_stop_closes_with_going_away_within_a_second_though_a_client_does_not_read(self) -> None:
        stop, bound = asyncio.Event(), asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve(SimulatorConfig(speed=MAX_SPEED), stop, bound.set_result))
        port = (await bound).port
        async with client(port, "XT.NONE-USD") as reading:
            stuck = await connect(f"ws://127.0.0.1:{port}/crypto", max_queue=1)
            await stuck.send(b'{"action":"auth"}')
            await stuck.send(b'{"action":"subscribe","params":"XT.*,XQ.*"}')
            await until(lambda: sample("clients") == 2)
            sent = -1.0
            while sent < (sent := sample("events_total", stream="XQ")):
                await asyncio.sleep(0.2)
            assert sample("clients") == 2  # it is not thrown out: it holds the market up
            stop.set()
            async with asyncio.timeout(10):
                with pytest.raises(ConnectionClosed) as closed:
                    await reading.recv()
                await serving
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        stuck.transport.abort()


class TestRecord:
    @pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
    async def test_what_cannot_be_recorded_is_not_sent(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)])
        with pytest.raises(OSError, match="No space left"):
            await play_all(frames, received := [], record=FULL)
        assert received == []

    async def test_it_holds_what_was_sent_with_clock_and_clients(self, tmp_path: Path) -> None:
        sent = [array(BTC), array(ETH, QUOTE), array(QUOTE), array(BAR)]
        frames, record = frames_file(tmp_path / "frames", sent), tmp_path / "record"
        before_ns = time.time_ns()
        events = sample("events_total", stream="XT")
        async with (
            simulator(frames=frames, speed=MAX_SPEED, record=record) as port,
            client(port, "XT.*,XA.*") as connection,
        ):
            for _ in range(3):
                await receive(connection)
        assert [frame.data for frame in read_frames(record)] == [array(BTC), array(ETH), array(BAR)]
        lines = recorded(record)
        assert [line["clock_ns"] for line in lines] == [
            1_723_161_255_001_000_000,
            1_723_161_255_003_000_000,
            1_723_161_255_003_000_000,  # the bar's minute began earlier: the clock does not go back
        ]
        assert {line["clients"] for line in lines} == {1}
        assert all(before_ns <= line["recv_ns"] <= time.time_ns() for line in lines)
        assert sample("events_total", stream="XT") == events + 2
        assert sample("clock_seconds") == pytest.approx(1_723_161_255.003)

    async def test_it_is_appended_to_and_can_be_played_again(self, tmp_path: Path) -> None:
        record, again = tmp_path / "record", tmp_path / "again"
        received: list[bytes] = []
        for start_ns in (START_NS, START_NS + MINUTE_NS):
            async with (
                simulator(speed=200.0, start_ns=start_ns, record=record) as port,
                client(port, "XT.*,XQ.*") as connection,
            ):
                received += [await receive(connection) for _ in range(200)]
        played = [frame.data for frame in read_frames(record)]
        assert received[:200] == played[:200]
        assert received[-1] in played
        async with (
            simulator(frames=record, speed=MAX_SPEED, record=again) as port,
            client(port, "XT.*,XQ.*") as connection,
        ):
            assert [await receive(connection) for _ in played] == played
        assert [frame.data for frame in read_frames(again)] == played

    async def test_with_several_clients_a_line_is_the_union_of_what_they_got(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BAR), *[array(BTC, ETH, QUOTE)] * 2000], step_ms=20)
        record = tmp_path / "record"
        async with (
            simulator(frames=frames, record=record) as port,
            client(port, "XT.ETH-USD") as one,
            client(port, "XQ.*") as two,
        ):
            assert await receive(two) == array(QUOTE)
            assert {await receive(one) for _ in range(3)} == {array(ETH)}
        lines = [(line["clients"], [event["ev"] for event in line["frame"]]) for line in recorded(record)]
        assert (1, ["XT", "XQ"]) in lines


class TestWrongSettings:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"speed": 0.0}, "speed must be above 0"),
            ({"speed": math.nan}, "speed must be above 0"),
            ({"symbols": ()}, "at least one pair"),
            ({"symbols": ("BTCUSD",)}, "'BTCUSD' is not a pair"),
            ({"symbols": ("BTC-USD", "BTC-USD")}, "must not repeat"),
            ({"record": Path("f"), "frames": Path("f")}, "same file"),
        ],
    )
    def test_are_named(self, settings: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            SimulatorConfig(**settings)

    async def test_a_file_that_cannot_be_played_is_named_before_the_port_is_bound(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            await serve(SimulatorConfig(frames=tmp_path / "none"), asyncio.Event())
        (tmp_path / "bad").write_bytes(b"{}\n")
        with pytest.raises(NotAFramesFile, match="line 1"):
            await serve(SimulatorConfig(frames=tmp_path / "bad"), asyncio.Event())

    async def test_a_line_that_is_no_frame_ends_the_simulator(self, tmp_path: Path) -> None:
        frames = frames_file(tmp_path / "frames", [array(BTC)])
        with frames.open("ab") as file:
            file.write(b"oops\n")
        with pytest.raises(NotAFramesFile, match="line 2"):
            await play_all(frames, [])


def stretch(minutes: int = 12, seed: int = 1, start_ns: int = START_NS) -> list[Frame]:
    frames = market(seed, DEFAULT_SYMBOLS, start_ns)
    return list(takewhile(lambda frame: frame.offset_ns < minutes * MINUTE_NS, frames))


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return stretch()


@pytest.fixture(scope="module")
def events(frames: list[Frame]) -> list[tuple[int, Any]]:
    """Each event, its numbers as decimals, with the market's time (ms) when its frame left."""
    return [(frame.clock_ns // 1_000_000, exact(event.data)) for frame in frames for event in frame.events]


def exact(data: bytes) -> Any:
    message = wire.decode_message(data)
    raw = {name: value for name, value in msgspec.structs.asdict(message).items() if isinstance(value, msgspec.Raw)}
    return msgspec.structs.replace(message, **{name: decimal_of(bytes(value)) for name, value in raw.items()})


class TestMarket:
    def test_the_same_seed_and_start_give_the_same_bytes(self, frames: list[Frame]) -> None:
        again = stretch(3)
        assert again == frames[: len(again)]
        assert stretch(1, seed=2)[0] != frames[0]

    def test_frames_are_arrays_of_up_to_20_events_of_any_channel_and_pair(self, frames: list[Frame]) -> None:
        assert all(frame.data == array(*(event.data for event in frame.events)) for frame in frames)
        sizes = [len(frame.events) for frame in frames]
        assert max(sizes) == 20
        assert sum(size > 1 for size in sizes) > len(sizes) / 4
        assert any(len({event.topic for event in frame.events}) > 2 for frame in frames)
        for frame in frames[:1000]:
            for event in frame.events:
                head = wire.decode_head(event.data)
                assert event.topic == (head.ev, head.pair)

    def test_time_moves_on_and_nothing_comes_before_it_happened(self, frames: list[Frame], events: Any) -> None:
        offsets = [frame.offset_ns for frame in frames]
        assert offsets == sorted(offsets)
        assert all(frame.clock_ns == START_NS + frame.offset_ns for frame in frames)
        assert all(event.t <= event.r <= sent_ms for sent_ms, event in events if not isinstance(event, wire.XA))

    def test_the_rates_are_a_markets(self, events: Any) -> None:
        counts: dict[str, int] = defaultdict(int)
        for _, event in events:
            counts[f"{type(event).__name__}.{event.pair}"] += 1
            counts[type(event).__name__] += 1
        assert 60 <= len(events) / 720 <= 100
        assert 2.3 <= counts["XQ"] / counts["XT"] <= 3.7
        assert counts["XT.BTC-USD"] > 50 * counts["XT.AVAX-USD"]
        per_second: dict[int, int] = defaultdict(int)
        for sent_ms, _ in events:
            per_second[sent_ms // 1000] += 1
        mean = sum(per_second.values()) / len(per_second)
        variance = sum((count - mean) ** 2 for count in per_second.values()) / len(per_second)
        assert variance > 2 * mean  # bursts: a Poisson process has the variance of its mean

    def test_every_pair_trades_in_every_minute(self, events: Any) -> None:
        minutes = {(trade.pair, trade.t // 60_000) for _, trade in events if isinstance(trade, wire.XT)}
        assert len(minutes) == 12 * len(DEFAULT_SYMBOLS)
        quiet = [trade.t for _, trade in events if isinstance(trade, wire.XT) and trade.pair == "AVAX-USD"]
        times = sorted(set(quiet))
        assert all(20_000 <= later - earlier <= 30_000 for earlier, later in pairwise(times))

    def test_trades_mostly_respect_the_quote_that_stands(self, events: Any) -> None:
        quotes: dict[str, Any] = {}
        inside = []
        for _, event in events:
            if isinstance(event, wire.XQ):
                assert 0 < event.bp < event.ap < event.bp * Decimal("1.01")
                quotes[event.pair] = event
            elif isinstance(event, wire.XT) and event.pair in quotes:
                inside.append(quotes[event.pair].bp <= event.p <= quotes[event.pair].ap)
        assert sum(inside) > 0.8 * len(inside)
        assert not all(inside)

    def test_trade_ids_are_unique_also_across_runs_and_of_three_kinds(self, events: Any) -> None:
        trades = [event for _, event in events if isinstance(event, wire.XT)]
        other_run = [
            wire.decode_message(event.data).i
            for frame in stretch(2, start_ns=START_NS + 7_000_000_000)
            for event in frame.events
            if event.topic is not None and event.topic[0] == "XT"
        ]
        ids = [str(trade.i) for trade in trades] + [str(i) for i in other_run]
        assert len(set(ids)) == len(ids)
        kinds = defaultdict(set)
        for trade in trades:
            text = isinstance(trade.i, str)
            kinds[trade.x].add("int" if not text else "digits" if trade.i.isdigit() else "uuid")
        assert kinds == {1: {"int"}, 2: {"int"}, 6: {"digits"}, 23: {"uuid"}}
        uuid = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
        assert all(uuid.fullmatch(trade.i) for trade in trades if trade.x == 23)

    def test_sizes_and_conditions_come_in_every_form_the_wire_has(self, frames: list[Frame], events: Any) -> None:
        trades = [event for _, event in events if isinstance(event, wire.XT)]
        assert {tuple(trade.c) if trade.c is not None else None for trade in trades} == {(0,), (1,), (2,), None}
        assert all(trade.s > 0 and trade.s == round(trade.s, 8) for trade in trades)
        assert any(re.search(rb'"s":[\d.]+e-05', frame.data) for frame in frames)

    def test_a_few_trades_are_late_and_rare_ones_late_for_their_minute(self, events: Any) -> None:
        trades = [(sent_ms, trade) for sent_ms, trade in events if isinstance(trade, wire.XT)]
        lateness_ms = [sent_ms - trade.t for sent_ms, trade in trades]
        assert all(late <= 70 or 1000 <= late <= 300_100 for late in lateness_ms)
        assert 10 < sum(1000 <= late < 4000 for late in lateness_ms) < len(trades) / 100
        very_late = [(sent_ms, trade) for sent_ms, trade in trades if sent_ms - trade.t > 4000]
        assert 0 < len(very_late) < len(trades) / 500
        assert all(
            sent_ms // 60_000 > trade.t // 60_000 and sent_ms - trade.t >= 20_000 for sent_ms, trade in very_late
        )
        on_time = [trade.r - trade.t for sent_ms, trade in trades if sent_ms - trade.t <= 70]
        assert 3 <= min(on_time) <= max(on_time) <= 45

    def test_an_aggregate_is_what_its_minutes_trades_so_far_make(self, events: Any) -> None:
        trades: dict[tuple[str, int], list[Any]] = defaultdict(list)
        sent: dict[tuple[str, int], int] = defaultdict(int)
        for sent_ms, event in events:
            if isinstance(event, wire.XT):
                trades[event.pair, event.t // 60_000 * 60_000].append(event)
            elif isinstance(event, wire.XA):
                those = sorted(trades[event.pair, event.s], key=lambda trade: trade.t)  # stable: ties as published
                assert (event.o, event.c) == (those[0].p, those[-1].p)
                assert event.h == max(trade.p for trade in those)
                assert event.l == min(trade.p for trade in those)
                assert event.v == sum(trade.s for trade in those)
                assert event.vw == pytest.approx(
                    sum(trade.p * trade.s for trade in those) / event.v, rel=Decimal("1e-7")
                )
                assert event.z == pytest.approx(event.v / len(those), abs=Decimal("1e-8"))
                assert event.e == event.s + 60_000
                sent[event.pair, event.s] += 1
                if sent[event.pair, event.s] == 1:
                    assert 100 <= sent_ms - event.e <= 2100
        start_ms = START_NS // 1_000_000
        whole = {(pair, start_ms + minute * 60_000) for pair in DEFAULT_SYMBOLS for minute in range(11)}
        assert set(sent) == whole
        assert 0 < sum(count > 1 for count in sent.values()) < len(sent) / 2  # some were revised

    def test_aggregates_of_seconds_are_frames_of_their_own_between_the_same_others(self, frames: list[Frame]) -> None:
        both = list(
            takewhile(lambda f: f.offset_ns < 12 * MINUTE_NS, market(1, DEFAULT_SYMBOLS, START_NS, seconds=True))
        )
        assert [frame.offset_ns for frame in both] == sorted(frame.offset_ns for frame in both)
        assert [frame for frame in both if frame.events[0].topic[0] != "XAS"] == frames
        trades: dict[tuple[str, int], list[Any]] = defaultdict(list)
        sent: set[tuple[str, int]] = set()
        for frame in both:
            for event in (exact(event.data) for event in frame.events):
                if isinstance(event, wire.XT):
                    trades[event.pair, event.t // 1_000 * 1_000].append(event)
                elif isinstance(event, wire.XAS):
                    those = sorted(trades[event.pair, event.s], key=lambda trade: trade.t)
                    assert (event.o, event.c, event.e) == (those[0].p, those[-1].p, event.s + 1_000)
                    assert event.v == sum(trade.s for trade in those)
                    if (event.pair, event.s) not in sent and max(trade.r for trade in those) < event.e:
                        assert 50 <= frame.clock_ns // 1_000_000 - event.e <= 60
                    sent.add((event.pair, event.s))
        assert {window for window in trades if window[1] < START_NS // 10**6 + 11 * 60_000} <= sent

    def test_open_and_close_go_by_exchange_time_and_ties_by_publication(self) -> None:
        minute = Minute(0)
        for t_ms, price in [(20, 120), (30, 131), (30, 132), (10, 111), (10, 112), (25, 125)]:
            minute.add(t_ms, price, 100_000_000)
        bar = exact(minute.encode("BTC-USD", 2))
        assert isinstance(bar, wire.XA)
        assert [bar.o, bar.h, bar.l, bar.c] == [Decimal("1.11"), Decimal("1.32"), Decimal("1.11"), Decimal("1.32")]
        assert [bar.v, bar.z, bar.vw] == [6, 1, Decimal("1.218333")]

    def test_some_quotes_are_overtaken_by_later_ones(self, events: Any) -> None:
        latest: dict[str, int] = {}
        overtaken = 0
        quotes = [event for _, event in events if isinstance(event, wire.XQ)]
        for quote in quotes:
            overtaken += quote.t < latest.get(quote.pair, 0)
            latest[quote.pair] = max(quote.t, latest.get(quote.pair, 0))
        assert len(quotes) / 500 < overtaken < len(quotes) / 50

    def test_hundreds_of_pairs_are_as_different_as_on_the_real_feed(self) -> None:
        symbols = plausible(500)
        assert len({*symbols, *plausible(2000)}) == 2000
        assert {"BTC-USD", "1INCH-USD", "USDT-USD", "TUSD-USD", "ETH-EUR"} <= set(symbols)
        counts: dict[str, int] = defaultdict(int)
        for frame in takewhile(lambda one: one.offset_ns < 10 * MINUTE_NS, market(1, symbols, START_NS, wide=True)):
            for event in frame.events:
                if event.topic is not None and event.topic[0] == "XT":
                    counts[event.topic[1]] += 1
        assert counts[symbols[0]] > 4000
        assert all(counts[symbol] >= 20 for symbol in symbols[:10])
        assert 50 < sum(counts[symbol] == 0 for symbol in symbols) < 400
        assert 10_000 < sum(counts.values()) < 30_000

    def test_trades_come_minutes_late(self) -> None:
        late_ms = [
            frame.clock_ns // 1_000_000 - trade.t
            for frame in stretch(40, seed=3)
            for event in frame.events
            if event.topic is not None
            and event.topic[0] == "XT"
            and isinstance(trade := wire.decode_message(event.data), wire.XT)
        ]
        assert 1 <= sum(late > 120_000 for late in late_ms) < len(late_ms) / 3000

    def test_any_pairs_can_be_asked_for(self) -> None:
        for symbols in (("DOGE-EUR",), ("1INCH-USD", "ETH-BTC", "SHIB-USD", "XRP-USD", "ADA-USD", "LTC-USD")):
            seen = set()
            for frame in takewhile(lambda frame: frame.offset_ns < MINUTE_NS, market(3, symbols, START_NS)):
                seen |= {event.topic[1] for event in frame.events if event.topic}
            assert seen == set(symbols)
