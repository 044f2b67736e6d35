"""The simulator's REST: the socket's story told again, to the official client and to a plain one."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from massive import RESTClient
from massive.websocket import WebSocketClient
from websockets.asyncio.client import connect

from schemas.frames import read_frames
from simulator.config import SimulatorConfig
from simulator.faults import Fault
from simulator.frame import Event, Frame
from simulator.history import History, window
from simulator.market import market
from simulator.server import Bound, serve

START_NS = 1_732_200_000_000_000_000  # 2024-11-21, 14:40
START_MS = START_NS // 1_000_000
MINUTE_MS = 60_000
SYMBOLS = ("BTC-USD", "ETH-USD")
PLAYED_S = 200


def made() -> list[dict[str, Any]]:
    """The trades that a market of PLAYED_S makes, in the order of publication."""
    frames = takewhile(lambda frame: frame.offset_ns <= PLAYED_S * 1e9, market(1, SYMBOLS, START_NS))
    events = [json.loads(event.data) for frame in frames for event in frame.events]
    return [event for event in events if event["ev"] == "XT"]


@contextlib.asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[Bound]:
    stop = asyncio.Event()
    bound: asyncio.Future[Bound] = asyncio.get_running_loop().create_future()
    config = SimulatorConfig(**{"symbols": SYMBOLS, "start_ns": START_NS, "speed": 1000.0, **settings})
    serving = asyncio.create_task(serve(config, stop, bound.set_result))
    await asyncio.wait([serving, bound], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        yield bound.result()
    finally:
        stop.set()
        await serving


@pytest.fixture(scope="module")
async def feed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bound]:
    """A market of PLAYED_S that is over, of which a client asked for nothing that exists."""
    file = tmp_path_factory.mktemp("rest") / "frames"
    frames = takewhile(lambda frame: frame.offset_ns <= PLAYED_S * 1e9, market(1, SYMBOLS, START_NS))
    file.write_bytes(b"".join(b'{"recv_ns":%d,"frame":%b}\n' % (one.clock_ns, one.data) for one in frames))
    async with served(frames=file) as bound, connect(f"ws://127.0.0.1:{bound.port}/crypto") as connection:
        await connection.send('{"action":"auth","params":"k"}')
        await connection.send('{"action":"subscribe","params":"XT.NONE-USD"}')
        async with aiohttp.ClientSession() as http:
            while not await is_over(http, bound):
                await asyncio.sleep(0.02)
        yield bound


async def is_over(http: aiohttp.ClientSession, bound: Bound) -> bool:
    async with http.get(f"http://127.0.0.1:{bound.rest_port}/control/faults") as response:
        return bool((await response.json())["clock_ns"] >= START_NS + (PLAYED_S - 1) * 10**9)


@pytest.fixture(scope="module")
def trades() -> list[dict[str, Any]]:
    return made()


def of(trades: Sequence[dict[str, Any]], pair: str) -> list[dict[str, Any]]:
    """A pair's, by exchange time; those of one time as published."""
    return sorted((trade for trade in trades if trade["pair"] == pair), key=lambda trade: trade["t"])


Get = Callable[..., Any]


@pytest.fixture
async def get(feed: Bound) -> AsyncIterator[Get]:
    """The status and the JSON of an answer."""
    async with aiohttp.ClientSession() as http:

        async def get(path: str, key: str | None = "k", **params: Any) -> tuple[int, dict[str, Any]]:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            url = path if path.startswith("http") else f"http://127.0.0.1:{feed.rest_port}{path}"
            async with http.get(url, params=params, headers=headers) as response:
                return response.status, json.loads(await response.text(), parse_float=Decimal)

        yield get


async def official(bound: Bound, ask: Callable[[RESTClient], Any], **settings: Any) -> Any:
    """What the official client gets; it blocks, hence the thread."""
    client = RESTClient("k", base=f"http://127.0.0.1:{bound.rest_port}", **settings)
    return await asyncio.to_thread(ask, client)


class TestOfficialClient:
    async def test_trades_over_many_pages_are_the_sockets(self, feed: Bound, trades: list[Any]) -> None:
        expected = of(trades, "BTC-USD")
        assert len(expected) > 1000
        found = await official(feed, lambda client: list(client.list_trades("X:BTCUSD", limit=100, order="asc")))
        assert [(t.id, t.price, t.size, t.exchange, t.participant_timestamp, t.conditions) for t in found] == [
            (str(t["i"]), t["p"], t["s"], t["x"], t["t"] * 1_000_000, t.get("c", [])) for t in expected
        ]

    async def test_trades_of_a_stretch(self, feed: Bound, trades: list[Any]) -> None:
        from_ms, to_ms = START_MS + 20_000, START_MS + 80_000

        def ask(client: RESTClient) -> list[Any]:
            bounds = {"timestamp_gte": from_ms * 1_000_000, "timestamp_lt": to_ms * 1_000_000}
            return list(client.list_trades("X:BTCUSD", order="asc", **bounds))

        inside = [str(trade["i"]) for trade in of(trades, "BTC-USD") if from_ms <= trade["t"] < to_ms]
        assert [trade.id for trade in await official(feed, ask)] == inside

    async def test_minute_bars_are_made_of_the_trades(self, feed: Bound, trades: list[Any]) -> None:
        def ask(client: RESTClient) -> list[Any]:
            return list(client.list_aggs("X:ETHUSD", 1, "minute", "2024-11-21", "2024-11-21", limit=2))

        found = await official(feed, ask)
        minutes: dict[int, list[Any]] = defaultdict(list)
        for trade in of(trades, "ETH-USD"):
            minutes[trade["t"] // MINUTE_MS * MINUTE_MS].append(trade)
        assert [agg.timestamp for agg in found] == list(minutes)
        for agg, those in zip(found, minutes.values(), strict=True):
            prices = [trade["p"] for trade in those]
            volume = sum(Decimal(str(trade["s"])) for trade in those)
            assert (agg.open, agg.close, agg.high, agg.low) == (prices[0], prices[-1], max(prices), min(prices))
            assert (agg.volume, agg.transactions) == (float(volume), len(those))
            assert agg.vwap == pytest.approx(sum(t["p"] * t["s"] for t in those) / float(volume))

    async def test_reference_data(self, feed: Bound) -> None:
        tickers = await official(feed, lambda client: list(client.list_tickers(market="crypto", limit=1)))
        assert [(one.ticker, one.base_currency_symbol, one.currency_symbol) for one in tickers] == [
            ("X:BTCUSD", "BTC", "USD"),
            ("X:ETHUSD", "ETH", "USD"),
        ]
        exchanges = await official(feed, lambda client: client.get_exchanges(asset_class="crypto"))
        assert {one.id: one.name for one in exchanges}[23] == "Kraken"
        conditions = await official(feed, lambda client: list(client.list_conditions(asset_class="crypto")))
        assert {one.id: one.name for one in conditions} == {1: "Sell Side", 2: "Buy Side"}
        status = await official(feed, lambda client: client.get_market_status())
        assert status.currencies.crypto == "open"
        assert status.server_time.startswith("2024-11-21T14:4")  # the market's time, not ours

    async def test_last_trade_and_day(self, feed: Bound, trades: list[Any]) -> None:
        last = await official(feed, lambda client: client.get_last_crypto_trade("BTC", "USD"))
        expected = of(trades, "BTC-USD")[-1]
        assert (last.price, last.timestamp) == (expected["p"], expected["t"])
        days = await official(
            feed, lambda client: client.get_grouped_daily_aggs("2024-11-21", locale="global", market_type="crypto")
        )
        counts = {one.ticker: one.transactions for one in days}
        assert counts == {"X:BTCUSD": len(of(trades, "BTC-USD")), "X:ETHUSD": len(of(trades, "ETH-USD"))}

    async def test_websocket_and_rest_agree(self) -> None:
        got: list[Any] = []

        async def collect(batch: list[Any]) -> None:
            got.extend(batch)

        async with served(seconds=0.2) as bound:
            feed = f"127.0.0.1:{bound.port}"
            socket = WebSocketClient("k", feed=feed, market="crypto", secure=False, subscriptions=["XT.BTC-USD"])
            session = asyncio.create_task(socket.connect(collect))
            await asyncio.sleep(0.6)
            found = await official(bound, lambda client: list(client.list_trades("X:BTCUSD", order="asc")))
            await socket.close()
            await asyncio.wait_for(session, 5)
        assert len(found) > 500
        assert sorted((trade.id, trade.price, trade.size) for trade in found) == sorted(
            (str(trade.id), trade.price, trade.size) for trade in got
        )


class TestAnswers:
    async def test_numbers_are_those_of_the_socket_to_the_letter(self, get: Get, trades: list[Any]) -> None:
        _, body = await get("/v3/trades/X:BTCUSD", limit=50_000)
        assert {Decimal(str(t["s"])) for t in of(trades, "BTC-USD")} == {t["size"] for t in body["results"]}
        times = [trade["participant_timestamp"] for trade in body["results"]]
        assert times == sorted(times, reverse=True)  # the latest first, if nothing else is asked for

    async def test_descending_pages_have_each_trade_once(self, get: Get, trades: list[Any]) -> None:
        ids: list[str] = []
        _, body = await get("/v3/trades/X:BTC-USD", limit=300, order="desc")
        while True:
            ids += [trade["id"] for trade in body["results"]]
            if "next_url" not in body:
                break
            _, body = await get(body["next_url"])
        assert ids == [str(trade["i"]) for trade in of(trades, "BTC-USD")][::-1]

    @pytest.mark.parametrize("ticker", ["X:NONEUSD", "X:BTCEUR"])
    async def test_nothing_is_no_results(self, get: Get, ticker: str) -> None:
        status, body = await get(f"/v2/aggs/ticker/{ticker}/range/1/minute/2024-11-21/2024-11-21")
        assert (status, body["status"], body["resultsCount"], "results" in body) == (200, "OK", 0, False)
        assert (await get(f"/v3/trades/{ticker}"))[1]["results"] == []
        assert (await get("/v2/aggs/ticker/X:BTCUSD/prev"))[1]["resultsCount"] == 0
        assert (await get("/v1/last/crypto/NONE/USD"))[0] == 404

    async def test_a_limit_counts_base_aggregates(self, get: Get) -> None:
        hours = "/v2/aggs/ticker/X:BTCUSD/range/2/minute/2024-11-21/2024-11-21"
        _, whole = await get(hours)
        _, body = await get(hours, limit=2)
        assert len(body["results"]) == 1  # a bar of two minutes is two base aggregates
        paged = body["results"]
        while "next_url" in body:
            _, body = await get(body["next_url"])
            paged += body["results"]
        assert paged == whole["results"]
        _, body = await get(hours, sort="desc")
        assert body["results"] == whole["results"][::-1]

    async def test_the_range_is_that_of_the_bars_starts(self, get: Get) -> None:
        path = f"/v2/aggs/ticker/X:BTCUSD/range/1/minute/{START_MS + 61_000}/{START_MS + 120_000}"
        _, body = await get(path)
        assert [one["t"] for one in body["results"]] == [START_MS + MINUTE_MS, START_MS + 2 * MINUTE_MS]

    @pytest.mark.parametrize(
        ("path", "params", "says"),
        [
            ("/v2/aggs/ticker/X:BTCUSD/range/0/minute/1/2", {}, "multiplier"),
            ("/v2/aggs/ticker/X:BTCUSD/range/1/fortnight/1/2", {}, "timespan"),
            ("/v2/aggs/ticker/X:BTCUSD/range/1/day/2/1", {}, "from must not be after"),
            ("/v2/aggs/ticker/X:BTCUSD/range/1/day/yesterday/2", {}, "'yesterday' is neither"),
            ("/v3/trades/X:BTCUSD", {"limit": 50_001}, "limit"),
            ("/v3/trades/X:BTCUSD", {"order": "up"}, "order"),
            ("/v3/trades/X:BTCUSD", {"cursor": "%"}, "cursor"),
            ("/v3/reference/tickers", {"limit": 1001}, "limit"),
        ],
    )
    async def test_what_makes_no_sense_is_400(self, get: Get, path: str, params: Any, says: str) -> None:
        status, body = await get(path, **params)
        assert (status, body["status"]) == (400, "ERROR")
        assert says in body["error"]

    async def test_one_ticker(self, get: Get) -> None:
        _, body = await get("/v3/reference/tickers", ticker="X:ETHUSD")
        assert [one["name"] for one in body["results"]] == ["Ethereum - United States Dollar"]


class TestLimitsAndFaults:
    async def test_keys(self) -> None:
        async with served(keys=frozenset({"good"})) as bound, aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{bound.rest_port}/v3/reference/exchanges"

            async def status(**more: Any) -> tuple[int, str]:
                async with http.get(url, **more) as response:
                    return response.status, (await response.json()).get("error", "")

            assert await status() == (401, "API Key was not provided")
            assert await status(headers={"Authorization": "Bearer bad"}) == (401, "Unknown API Key")
            assert await status(headers={"Authorization": "Bearer good"}) == (200, "")
            assert await status(params={"apiKey": "good"}) == (200, "")

    async def test_so_many_requests_a_minute(self) -> None:
        async with served(rest_per_minute=2) as bound, aiohttp.ClientSession() as http:

            async def status(key: str) -> tuple[int, str]:
                url = f"http://127.0.0.1:{bound.rest_port}/v1/marketstatus/now"
                async with http.get(url, params={"apiKey": key}) as response:
                    return response.status, (await response.json()).get("error", "")

            assert [(await status("a"))[0] for _ in range(2)] == [200, 200]
            code, error = await status("a")
            assert code == 429
            assert error.startswith("You've exceeded the maximum requests per minute")
            assert (await status("b"))[0] == 200

    @pytest.mark.parametrize(("code", "says"), [(429, "exceeded"), (500, "Internal"), (403, "NOT_AUTHORIZED")])
    async def test_errors_as_often_as_asked(self, code: int, says: str) -> None:
        fault = Fault(kind="rest-error", code=code, count=2, path="/v3/trades")
        async with served(faults=(fault,)) as bound, aiohttp.ClientSession() as http:

            async def ask(path: str) -> tuple[int, str]:
                async with http.get(f"http://127.0.0.1:{bound.rest_port}{path}?apiKey=k") as response:
                    return response.status, await response.text()

            assert (await ask("/v3/reference/exchanges"))[0] == 200
            for _ in range(2):
                status, text = await ask("/v3/trades/X:BTCUSD")
                assert status == code
                assert says in text
            assert (await ask("/v3/trades/X:BTCUSD"))[0] == 200

    async def test_slow_and_empty(self, feed: Bound, get: Get) -> None:
        control = f"http://127.0.0.1:{feed.rest_port}/control/faults"
        async with aiohttp.ClientSession() as http:
            for fault in ({"kind": "rest-slow", "amount": 0.3, "count": 1}, {"kind": "rest-empty", "count": 1}):
                await http.post(control, json=fault)
        before = asyncio.get_running_loop().time()
        _, body = await get("/v3/trades/X:BTCUSD", limit=1)
        assert asyncio.get_running_loop().time() - before >= 0.3
        assert body["results"] == []
        assert "next_url" not in body
        assert len((await get("/v3/trades/X:BTCUSD", limit=1))[1]["results"]) == 1


class TestOneStory:
    async def test_what_a_stall_withheld_is_there_over_rest(self, tmp_path: Path) -> None:
        record = tmp_path / "record"
        stall = Fault(kind="stall", at_s=0.1, seconds=0.2)
        async with served(speed=100.0, seconds=0.4, faults=(stall,), record=record) as bound:
            async with connect(f"ws://127.0.0.1:{bound.port}/crypto", close_timeout=0.1) as connection:
                await connection.send('{"action":"auth","params":"k"}')
                await connection.send('{"action":"subscribe","params":"XT.BTC-USD"}')
                await asyncio.sleep(0.6)
            found = await official(bound, lambda client: list(client.list_trades("X:BTCUSD", limit=50_000)))
        told = [json.loads(line) for line in record.read_bytes().splitlines()]
        assert {line["clients"] for line in told} == {0, 1}
        assert {trade.id for trade in found} == {str(event["i"]) for line in told for event in line["frame"]}
        assert sum(1 for _ in read_frames(record)) == len(told)

    def test_history_is_bounded_in_market_time(self) -> None:
        history = History(keep_ms=10 * MINUTE_MS, pairs=["BTC-USD"])
        for minute in range(60):
            t_ms = START_MS + minute * MINUTE_MS
            data = b'{"ev":"XT","pair":"BTC-USD","p":1,"s":1,"t":%d,"i":1,"x":1}' % t_ms
            history.add(Frame(0, t_ms * 1_000_000, data, [Event(("XT", "BTC-USD"), data)]))
        times = [(trade.t_ms - START_MS) // MINUTE_MS for trade in history.between("BTC-USD", 0, 2**62)]
        assert times == list(range(49, 60))
        without = History(keep_ms=0, pairs=[])
        without.add(Frame(0, 0, data, [Event(("XT", "BTC-USD"), data)]))
        assert without.last("BTC-USD") is None

    def test_what_is_no_trade_is_not_kept(self) -> None:
        history = History(keep_ms=MINUTE_MS, pairs=[])
        for data in (b'{"ev":"XT","pair":"BTC-USD"}', b'{"ev":"XT","pair":"BTC-USD","p":1,"s":1,"i":1,"x":1}', b"1"):
            history.add(Frame(0, 0, data, [Event(("XT", "BTC-USD"), data)]))
        assert history.last("BTC-USD") is None

    @pytest.mark.parametrize(
        ("multiplier", "span", "start"),
        [
            (5, "second", "2024-11-21T14:43:05"),
            (15, "minute", "2024-11-21T14:30:00"),
            (1, "day", "2024-11-21T00:00:00"),
            (1, "week", "2024-11-17T00:00:00"),
            (1, "month", "2024-11-01T00:00:00"),
            (1, "quarter", "2024-10-01T00:00:00"),
            (1, "year", "2024-01-01T00:00:00"),
        ],
    )
    def test_windows_are_the_calendars(self, multiplier: int, span: str, start: str) -> None:
        def ms(text: str) -> int:
            return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)

        assert window(ms("2024-11-21T14:43:07"), multiplier, span) == ms(start)
        assert window(ms(start), multiplier, span) == ms(start)
        assert window(ms(start) - 1, multiplier, span) < ms(start)
