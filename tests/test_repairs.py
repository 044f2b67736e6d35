"""A minute made anew from REST is the minute that the live pipeline made of the same market, to the last digit."""

from itertools import takewhile
from typing import Any

import aiohttp
import msgspec
import pytest
import test_simulator_rest
from pure.feed import Feed, through
from test_simulator_rest import PLAYED_S, START_MS, START_NS, SYMBOLS

from processors.pipeline import Output
from processors.repairs import Repairs
from schemas import topics
from schemas.events import MINUTE_NS, NS_PER_MS, NS_PER_S, Bar, MinuteEmpty, Trade, decode_bar, decode_trade
from schemas.rest import RestRecord, records_of
from simulator.market import market
from simulator.server import Bound

feed = test_simulator_rest.feed  # a market that is over, behind a real server
FINGERPRINT = "f0"
MINUTES = range(START_NS - START_NS % MINUTE_NS, START_NS + PLAYED_S * NS_PER_S - MINUTE_NS, MINUTE_NS)


class Answer(msgspec.Struct):
    results: list[msgspec.Raw] = []
    next_url: str | None = None


decode_answer = msgspec.json.Decoder(Answer).decode


@pytest.fixture(scope="module")
def live() -> list[Output]:
    """What the pipeline makes of the whole market."""
    producer = Feed(latency_ms=0)
    for frame in takewhile(lambda frame: frame.offset_ns <= PLAYED_S * 1e9, market(1, SYMBOLS, START_NS)):
        producer.raw(frame.clock_ns / NS_PER_MS, frame.data)
    producer.flush(START_MS + PLAYED_S * 1_000 + 70_000)
    return through(producer.records)


async def results_of(bound: Bound, path: str, **params: Any) -> list[bytes]:
    """The bytes of each result, over all pages."""
    found: list[bytes] = []
    url: str | None = f"http://127.0.0.1:{bound.rest_port}{path}"
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as http:
        while url is not None:
            async with http.get(url, params=params) as response:
                assert response.status == 200
                answer: Answer = decode_answer(await response.read())
            found += [bytes(result) for result in answer.results]
            url, params = answer.next_url, {}
    return found


def repaired(number: int, symbol: str, minute: int, of: Any, results: list[bytes]) -> list[Output]:
    stage = Repairs(1, FINGERPRINT)
    parts = records_of(number, f"X:{symbol.replace('-', '')}", minute, of, results, START_NS)
    return [out for headers, value in parts for out in stage.process(RestRecord(START_MS, headers, value, 0))]


def bar_in(outputs: list[Output], symbol: str, minute: int) -> Bar:
    found = [decode_bar(output.value) for output in outputs if output.topic == topics.BARS_1M.name]
    (bar,) = (bar for bar in found if isinstance(bar, Bar) and (bar.symbol, bar.start) == (symbol, minute))
    return bar


def trades_in(outputs: list[Output], symbol: str, minute: int) -> list[Trade]:
    found = [decode_trade(output.value) for output in outputs if output.topic == topics.TRADES.name]
    return [trade for trade in found if trade.symbol == symbol and minute <= trade.ts_event < minute + MINUTE_NS]


@pytest.mark.parametrize("symbol", SYMBOLS)
async def test_a_bar_from_the_trades_of_rest_is_the_live_bar(
    feed: Bound,
    live: list[Output],
    symbol: str,
) -> None:
    assert len(MINUTES) >= 2
    for minute in MINUTES:
        bounds = {"timestamp.gte": minute, "timestamp.lt": minute + MINUTE_NS, "order": "asc", "limit": 70}
        results = await results_of(feed, f"/v3/trades/X:{symbol.replace('-', '')}", **bounds)
        assert results
        outputs = repaired(3, symbol, minute, "trades", results)
        ours, theirs = bar_in(outputs, symbol, minute), bar_in(live, symbol, minute)
        as_repaired: dict[str, Any] = {"repair": 3, "flags": ["repaired"], "missing_ns": 0, "quality": ours.quality}
        assert ours == msgspec.structs.replace(theirs, **as_repaired, fingerprint=FINGERPRINT)
        assert "late" not in theirs.flags
        keys = [
            {
                (trade.exchange, trade.trade_id, trade.ts_event, trade.price, trade.size, trade.side)
                for trade in trades_in(made, symbol, minute)
            }
            for made in (outputs, live)
        ]
        assert keys[0] == keys[1]


@pytest.mark.parametrize("symbol", SYMBOLS)
async def test_a_bar_from_an_aggregate_of_rest_has_its_prices_and_volume(
    feed: Bound,
    live: list[Output],
    symbol: str,
) -> None:
    for minute in MINUTES:
        span = f"/range/1/minute/{minute // NS_PER_MS}/{minute // NS_PER_MS}"
        results = await results_of(feed, f"/v2/aggs/ticker/X:{symbol.replace('-', '')}{span}")
        ours = bar_in(repaired(3, symbol, minute, "aggregates", results), symbol, minute)
        theirs = bar_in(live, symbol, minute)
        for name in ("open", "high", "low", "close", "volume", "vwap", "trade_count"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert abs(ours.notional / theirs.notional - 1) < 1e-12
        assert (ours.source, ours.buy_volume, ours.sell_volume) == ("aggregates", 0, 0)


async def test_a_minute_in_which_rest_knows_no_trade_is_empty(feed: Bound) -> None:
    minute = MINUTES.start - 10 * MINUTE_NS
    bounds = {"timestamp.gte": minute, "timestamp.lt": minute + MINUTE_NS, "order": "asc"}
    results = await results_of(feed, "/v3/trades/X:BTCUSD", **bounds)
    (output,) = repaired(3, "BTC-USD", minute, "trades", results)
    assert isinstance(decode_bar(output.value), MinuteEmpty)
