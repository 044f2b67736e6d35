"""Every fault of the simulator, as a plain WebSocket client meets it and as the record tells it."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from schemas.frames import read_frames
from simulator.config import SimulatorConfig
from simulator.faults import Fault, parse
from simulator.record import faults_path
from simulator.server import Bound, serve

START_NS = 1_732_200_000_000_000_000
SPEED = 20.0  # some 1,500 events a second
MIB = 2**20


class Simulator:
    """A running one, its record, and its control."""

    def __init__(self, bound: Bound, record: Path, http: aiohttp.ClientSession) -> None:
        self.url = f"ws://127.0.0.1:{bound.port}/crypto"
        self._control = f"http://127.0.0.1:{bound.rest_port}/control/faults"
        self._record = record
        self._http = http

    async def fault(self, kind: str, **parameters: Any) -> dict[str, Any]:
        async with self._http.post(self._control, json={"kind": kind, **parameters}) as response:
            assert response.status == 201, await response.text()
            return dict(await response.json())

    async def refused(self, body: bytes) -> str:
        async with self._http.post(self._control, data=body) as response:
            assert response.status == 400
            return str((await response.json())["error"])

    async def state(self) -> dict[str, Any]:
        async with self._http.get(self._control) as response:
            return dict(await response.json())

    async def end(self, label: str) -> int:
        async with self._http.delete(f"{self._control}/{label}") as response:
            return response.status

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of the record; those in base64 without a frame."""
        return [json.loads(line) for line in self._record.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]

    def noted(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in faults_path(self._record).read_bytes().splitlines()]


@pytest.fixture
async def simulate(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: Any) -> Simulator:
            stop = asyncio.Event()
            bound: asyncio.Future[Bound] = asyncio.get_running_loop().create_future()
            record = tmp_path / "record"
            config = SimulatorConfig(**{"speed": SPEED, "start_ns": START_NS, "record": record, **settings})
            serving = asyncio.create_task(serve(config, stop, bound.set_result))
            await asyncio.wait([serving, bound], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()

            async def end() -> None:
                stop.set()
                await serving

            stack.push_async_callback(end)
            http = await stack.enter_async_context(aiohttp.ClientSession())
            return Simulator(bound.result(), record, http)

        yield start


@contextlib.asynccontextmanager
async def client(feed: Simulator, params: str = "XT.*,XQ.*", key: str = "k") -> AsyncIterator[ClientConnection]:
    """Subscribed, with everything up to the acknowledgements read."""
    async with connect(feed.url, close_timeout=0.2, max_size=32 * MIB) as connection:
        await connection.send(json.dumps({"action": "auth", "params": key}))
        await connection.send(json.dumps({"action": "subscribe", "params": params}))
        while b"subscribed to" not in await receive(connection):
            pass
        yield connection


async def receive(connection: ClientConnection) -> bytes:
    async with asyncio.timeout(20):
        return await connection.recv(decode=False)


async def receive_for(connection: ClientConnection, seconds: float) -> list[dict[str, Any]]:
    """The events that come in this time."""
    events: list[dict[str, Any]] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                events += json.loads(await connection.recv())
    return events


async def closed(connection: ClientConnection) -> tuple[int | None, list[str]]:
    """How the server closed the connection (None: it did not), and the statuses that came before."""
    statuses: list[str] = []
    try:
        while True:
            statuses += [event["status"] for event in json.loads(await receive(connection)) if event["ev"] == "status"]
    except ConnectionClosed as end:
        return (end.rcvd.code if end.rcvd is not None else None), statuses


async def first_answer(feed: Simulator, action: str = "auth", params: str = "k") -> tuple[str, ClientConnection]:
    connection = await connect(feed.url, close_timeout=0.2)
    await receive(connection)
    await connection.send(json.dumps({"action": action, "params": params}))
    return json.loads(await receive(connection))[0]["status"], connection


def events_of(lines: list[dict[str, Any]], stream: str) -> set[int]:
    """The numbers of clients that the events of a stream were handed to."""
    return {line["clients"] for line in lines for event in line.get("frame", []) if event["ev"] == stream}


class TestConnections:
    async def test_a_drop_has_no_close_frame(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await feed.fault("drop")
            assert await closed(connection) == (None, [])
        async with client(feed) as connection:
            assert await receive(connection)

    async def test_half_open_answers_nothing_not_even_a_ping(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            fault = await feed.fault("half-open", seconds=60)
            await receive_for(connection, 0.05)  # what was under way
            pong = await connection.ping()
            assert await receive_for(connection, 0.2) == []
            assert not pong.done()
            with pytest.raises(TimeoutError):
                await connect(feed.url, open_timeout=0.1)
            await feed.end(fault["label"])
            async with client(feed) as second:  # it is over for those who come now, never for the first
                assert await receive(second)
                assert await receive_for(connection, 0.1) == []
                assert not pong.done()
        assert {0, 1} <= events_of(feed.lines(), "XT")

    @pytest.mark.parametrize("code", [1000, 1001, 1011, 4321])
    async def test_close_has_the_code(self, simulate: Any, code: int) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await feed.fault("close", code=code)
            assert await closed(connection) == (code, [])

    async def test_eviction_says_so_and_closes_with_1008(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await feed.fault("evict")
            assert await closed(connection) == (1008, ["max_connections"])

    async def test_a_keys_second_connection_evicts_its_first(self, simulate: Any) -> None:
        feed = await simulate(connections_per_key=1)
        async with client(feed, key="a") as first, client(feed, key="b") as other, client(feed, key="a") as second:
            assert await closed(first) == (1008, ["max_connections"])
            assert await receive(other)
            assert await receive(second)

    async def test_a_slow_consumer_is_told_and_closed(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await feed.fault("slow-consumer")
            assert await closed(connection) == (1008, ["slow_consumer", "force_disconnect"])

    async def test_a_client_that_does_not_read_is_cut_off_and_holds_nobody_up(self, simulate: Any) -> None:
        feed = await simulate(speed=2000.0, backlog_bytes=100_000)
        async with client(feed) as reading:
            stuck = await connect(feed.url, max_queue=1)
            await stuck.send('{"action":"auth"}')
            await stuck.send('{"action":"subscribe","params":"XT.*,XQ.*"}')
            for expected in (2, 1):
                while (await feed.state())["clients"] != expected:
                    await receive(reading)
            stuck.transport.abort()

    async def test_away_refuses_connections_then_takes_them_at_the_same_port(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            fault = await feed.fault("away", seconds=60)
            assert await closed(connection) == (None, [])
            with pytest.raises(ConnectionRefusedError):
                await connect(feed.url)
            async with asyncio.timeout(20):
                while 0 not in events_of(feed.lines(), "XQ"):  # the market goes on
                    await asyncio.sleep(0.01)
        await feed.end(fault["label"])
        async with client(feed) as connection:
            assert await receive(connection)


class TestConversation:
    @pytest.mark.parametrize("kind", ["auth-failed", "auth-timeout"])
    async def test_authentication_fails_as_often_as_asked(self, simulate: Any, kind: str) -> None:
        feed = await simulate()
        await feed.fault(kind, count=1)
        status, connection = await first_answer(feed)
        assert status == kind.replace("-", "_")
        assert await closed(connection) == (1008, [])
        status, connection = await first_answer(feed)
        assert status == "auth_success"
        await connection.close()

    async def test_a_named_subscription_is_refused(self, simulate: Any) -> None:
        feed = await simulate()
        await feed.fault("refuse", stream="XQ", pair="BTC-USD")
        _, connection = await first_answer(feed)
        await connection.send('{"action":"subscribe","params":"XT.BTC-USD,XQ.BTC-USD,XQ.ETH-USD"}')
        answers = json.loads(await receive(connection))
        assert [answer["status"] for answer in answers] == ["success", "error", "success"]
        assert answers[1]["message"] == "not authorized"
        await connection.close()


class TestStall:
    async def test_pongs_come_and_data_do_not(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await receive(connection)
            stall = await feed.fault("stall")
            await receive_for(connection, 0.05)
            assert await receive_for(connection, 0.2) == []
            await asyncio.wait_for(await connection.ping(), 1)
            assert await feed.end(stall["label"]) == 204
            assert await receive(connection)
        begin, end = (note["wall_ns"] for note in feed.noted())
        stalled = [line["clients"] for line in feed.lines() if begin < line["recv_ns"] < end]
        assert len(stalled) > 5
        assert set(stalled) == {0}
        assert {line["clients"] for line in feed.lines() if line["recv_ns"] < begin} == {1}

    @pytest.mark.parametrize(
        ("what", "silent"),
        [
            ({"stream": "XT"}, lambda event: event["ev"] == "XT"),
            ({"pair": "BTC-USD"}, lambda event: event["pair"] == "BTC-USD"),
            ({"stream": "XQ", "pair": "ETH-USD"}, lambda event: event["ev"] == "XQ" and event["pair"] == "ETH-USD"),
        ],
    )
    async def test_one_stream_or_pair_alone(self, simulate: Any, what: Any, silent: Callable[[Any], bool]) -> None:
        feed = await simulate(faults=(Fault(kind="stall", at_s=0, **what),))
        async with client(feed) as connection:
            received = await receive_for(connection, 0.4)
        assert received
        assert not any(map(silent, received))
        told = [(line["clients"], event) for line in feed.lines() for event in line["frame"]]
        assert {clients for clients, event in told if silent(event)} == {0}
        handed = [event for clients, event in told if clients]
        assert not any(map(silent, handed))
        assert handed[: len(received)] == received


class TestJunk:
    @pytest.mark.parametrize(
        ("kind", "error"),
        [("malformed", json.JSONDecodeError), ("truncated", UnicodeDecodeError), ("not-array", None)],
    )
    async def test_it_comes_between_the_frames_and_is_marked(self, simulate: Any, kind: str, error: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await receive(connection)
            await feed.fault(kind, label="mess", count=2)
            received = [await receive(connection) for _ in range(200)]
        marked = [number for number, line in enumerate(feed.lines()) if line.get("label") == "mess"]
        assert [feed.lines()[number]["fault"] for number in marked] == [kind, kind]
        frames = [frame.data for frame in read_frames(feed._record)]
        junk = frames[marked[0]]
        assert received.count(junk) == 2
        if error is None:
            assert not isinstance(json.loads(junk), list)
        else:
            with pytest.raises(error):
                json.loads(junk.decode())

    async def test_a_huge_frame(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await feed.fault("huge", amount=3)
            while len(message := await receive(connection)) < MIB:
                pass
            assert len(message) == 3 * MIB
            assert isinstance(json.loads(message), list)

    async def test_a_huge_frame_is_too_big_for_a_client_with_the_usual_limit(self, simulate: Any) -> None:
        feed = await simulate()
        async with connect(feed.url) as connection:
            await connection.send('{"action":"auth"}')
            await connection.send('{"action":"subscribe","params":"XQ.*"}')
            while b"subscribed" not in await receive(connection):
                pass
            await feed.fault("huge", amount=2)
            with pytest.raises(ConnectionClosed) as end:
                await receive_for(connection, 3)
        assert end.value.sent is not None
        assert end.value.sent.code == 1009

    async def test_the_last_frame_comes_again(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await receive(connection)
            await feed.fault("duplicate", count=3)
            received = [await receive(connection) for _ in range(200)]
        (again,) = {json.dumps(line["frame"]) for line in feed.lines() if line.get("fault") == "duplicate"}
        assert [json.dumps(json.loads(frame)) for frame in received].count(again) in (3, 4)
        assert [json.dumps(line.get("frame")) for line in feed.lines()].count(again) == 4


class TestMarket:
    @pytest.mark.parametrize(("count", "exchange"), [(1, None), (5, 23)])
    async def test_clocks_jump_ahead(self, simulate: Any, count: int, exchange: int | None) -> None:
        fault = Fault(kind="clock", at_s=0.1, count=count, exchange=exchange, amount=600, label="rogue")
        feed = await simulate(faults=(fault,))
        async with client(feed) as connection:
            received = await receive_for(connection, 0.6)
        rogue = [event for line in feed.lines() if line.get("label") == "rogue" for event in line["frame"]]
        assert len(rogue) == count
        assert all(590_000 < event["t"] - event["r"] <= 600_000 for event in rogue)
        assert exchange is None or {event["x"] for event in rogue} == {exchange}
        assert all(event in received for event in rogue)
        assert [event for event in received if event["t"] > event["r"]] == rogue

    async def test_a_spike_is_labelled_and_passes(self, simulate: Any) -> None:
        feed = await simulate(faults=(parse("0.1:spike,pair=BTC-USD,amount=-50,count=2,label=crash"),))
        async with client(feed, "XT.BTC-USD") as connection:
            received = await receive_for(connection, 0.6)
        crash = [event for line in feed.lines() if line.get("label") == "crash" for event in line["frame"]]
        assert len(crash) == 2
        assert all(29_000 < trade["p"] < 32_000 for trade in crash)
        assert [trade for trade in received if trade["p"] < 50_000] == crash
        assert {line["fault"] for line in feed.lines() if "label" in line} == {"spike"}


class TestControl:
    async def test_a_fault_given_at_the_start_comes_at_its_time(self, simulate: Any) -> None:
        feed = await simulate(faults=(parse("0.3:close,code=1011"),))
        async with client(feed) as connection:
            began = time.monotonic()
            assert await closed(connection) == (1011, [])
            assert time.monotonic() - began > 0.2

    async def test_begin_and_end_are_noted_beside_the_record(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            await receive(connection)
            assert (await feed.fault("stall", stream="XT", seconds=0.2, label="hush"))["state"] == "active"
            while not await receive_for(connection, 0.05) or len(feed.noted()) < 2:
                pass
            state = await feed.state()
        assert (state["clients"], [fault["state"] for fault in state["faults"]]) == (1, ["over"])
        begin, end = feed.noted()
        assert (begin["event"], end["event"]) == ("begin", "end")
        assert (begin["kind"], begin["label"]) == ("stall", "hush")
        assert begin["stream"] == "XT"
        assert 0.2e9 <= end["wall_ns"] - begin["wall_ns"] < 2e9
        assert START_NS < begin["clock_ns"] < end["clock_ns"]
        assert all("frame" in line for line in feed.lines())

    async def test_a_fault_to_come_can_be_called_off(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed) as connection:
            drop = await feed.fault("drop", at_s=0.2)
            assert drop["state"] == "pending"
            assert await feed.end(drop["label"]) == 204
            assert await feed.end("none") == 404
            await receive_for(connection, 0.3)
            assert await receive(connection)
        assert feed.noted() == []

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (b"{", "truncated"),
            (b'{"kind":"flood"}', "'flood' is not a fault"),
            (b'{"kind":"drop","seconds":1}', "drop takes nothing, not seconds"),
            (b'{"kind":"stall","colour":1}', "unknown field"),
            (b'{"kind":"stall","seconds":-1}', "seconds must not be below 0"),
            (b'{"kind":"huge","amount":0}', "amount must be finite, and above 0"),
            (b'{"kind":"clock","count":0}', "count must be at least 1"),
            (b'{"kind":"spike","amount":-100}', "above -100"),
            (b'{"kind":"stall","stream":"XY"}', "stream must be one of"),
            (b'{"kind":"stall","pair":"B%C"}', "'B%C' is not a currency pair"),
            (b'{"kind":"close","code":1006}', "1006 is no code"),
            (b'{"kind":"rest-error","code":200}', "code must be one of"),
        ],
    )
    async def test_what_makes_no_sense_is_refused_with_the_reason(self, simulate: Any, body: bytes, says: str) -> None:
        feed = await simulate()
        assert says in await feed.refused(body)

    async def test_a_label_is_given_once(self, simulate: Any) -> None:
        feed = await simulate()
        await feed.fault("stall", label="one")
        assert "called one already" in await feed.refused(b'{"kind":"drop","label":"one"}')

    @pytest.mark.parametrize(
        "text", ["drop", "x:drop", "1:", "1:stall,seconds", "1:stall,seconds=long", "-1:drop", "nan:drop"]
    )
    def test_the_command_lines_form_is_checked(self, text: str) -> None:
        with pytest.raises(ValueError, match=r".+"):
            parse(text)

    def test_the_command_lines_form_has_everything(self) -> None:
        fault = Fault(kind="stall", at_s=20, stream="XT", pair="BTC-USD", seconds=5)
        assert parse("20:stall,stream=XT,pair=X:BTCUSD,seconds=5") == fault


class TestRecord:
    async def test_what_came_before_all_was_subscribed_to_again_is_told(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed, "XT.*,XQ.*") as connection:
            await receive(connection)
        async with client(feed, "XT.*") as connection:
            await receive_for(connection, 0.2)
            again = time.time_ns()
            await connection.send('{"action":"subscribe","params":"XQ.*"}')
            await receive_for(connection, 0.2)
        quotes = [(line["recv_ns"], line["clients"]) for line in feed.lines() for e in line["frame"] if e["ev"] == "XQ"]
        between = [clients for recv_ns, clients in quotes if again - 0.15e9 < recv_ns < again]
        assert len(between) > 5
        assert set(between) == {0}
        assert quotes[0][1] == 1
        assert 1 in [clients for recv_ns, clients in quotes if recv_ns > again]

    async def test_each_event_of_several_clients_has_its_own_count(self, simulate: Any) -> None:
        feed = await simulate()
        async with client(feed, "XT.*,XQ.*") as both, client(feed, "XQ.*") as quotes:
            await receive_for(both, 0.2)
            await receive(quotes)
            since = (await feed.state())["clock_ns"]
            await receive_for(both, 0.3)
            until = (await feed.state())["clock_ns"]
        lines = [line for line in feed.lines() if since < line["clock_ns"] < until]
        assert events_of(lines, "XT") == {1}
        assert events_of(lines, "XQ") == {2}
