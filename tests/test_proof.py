"""When a silence is proved to have been one: what REST tells against a raw log on a real Kafka."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pure.feed import LATENCY_MS, T0, Feed, xa, xq, xt

from producers.proof import _nothing_missed
from producers.rest import Rest
from producers.slicer import Suspicion
from schemas import topics
from schemas.events import NS_PER_MS
from tapedeck import kafka
from tapedeck.settings import Settings

PAIRS = ["BTC-USD", "ETH-USD"]
MINUTE = 60_000


class Told(dict[str, list[dict[str, Any]]]):
    """What REST has: results by ticker."""

    url = ""

    async def handle(self, request: web.Request) -> web.Response:
        ticker = next(part for part in request.path.split("/") if part.startswith("X:"))
        return web.json_response({"results": self.get(ticker, [])})


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    told = Told()
    app = web.Application()
    app.router.add_get("/{path:.*}", told.handle)
    async with TestServer(app) as server:
        told.url = str(server.make_url(""))
        yield told


def trade(ms: int, name: str) -> dict[str, Any]:
    return {"participant_timestamp": ms * NS_PER_MS + 500, "price": 100, "size": 1, "exchange": 1, "id": name}


def bar(start: int, volume: str = "3.5") -> dict[str, Any]:
    return {"o": 1, "h": 2, "l": 1, "c": 2, "v": float(volume), "vw": 1.5, "t": start, "n": 3}


async def publish(settings: Settings, feed: Feed) -> None:
    await kafka.prepare(settings)
    publisher = kafka.Publisher(settings)
    await publisher.start()
    topic = settings.topic_prefix + topics.RAW.name
    await publisher.publish(
        kafka.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers()) for r in feed.records
    )
    await publisher.stop()


async def test_only_where_rest_and_the_log_tell_the_same_and_both_know_how_it_ended(
    settings: Settings, told: Told
) -> None:
    feed = Feed()
    feed.at(T0, xt(T0, i="a"), xt(T0, i="b", pair="ETH-USD"), xa(T0 - MINUTE))
    for ms in range(T0 + 250, T0 + 2 * MINUTE, 250):
        feed.at(ms, xq(ms))
    end = T0 + 2 * MINUTE
    feed.at(
        end,
        xt(end - 20, i="c"),
        xq(end, pair="SOL-USD", x=2),
        xa(T0 + MINUTE),
        xa(T0 + MINUTE).replace(b'"v":3.5', b'"v":4.0'),
    )
    feed.flush(end + LATENCY_MS + 3_000)
    await publish(settings, feed)
    trades = Suspicion(T0 * NS_PER_MS, end * NS_PER_MS, ["XT"])
    bars = Suspicion(T0 * NS_PER_MS, end * NS_PER_MS, ["XA"])
    vendor = settings.model_copy(update={"polygon_rest_url": told.url})
    async with Rest(vendor) as rest:

        async def proved(gap: Suspicion, btc: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
            told.update({"X:BTCUSD": btc, "X:ETHUSD": other})
            return await _nothing_missed(vendor, rest, gap, PAIRS)

        first, last, ether = trade(T0, "a"), trade(end - 20, "c"), trade(T0, "b")
        assert await proved(trades, [first, last], [ether])
        assert not await proved(trades, [first, trade(T0 + 5_000, "missed"), last], [ether])
        assert not await proved(trades, [first, last], [ether, trade(T0 + 5_000, "missed")])
        assert not await proved(trades, [first], [ether]), "REST is late"
        assert not await proved(trades, [], []), "REST is empty by mistake"
        assert not await proved(trades, [last], [ether]), "REST lacks something"
        before, after = bar(T0 - MINUTE), bar(T0 + MINUTE, "4")
        assert await proved(bars, [before, after], [])
        assert not await proved(bars, [before, bar(T0), after], [])
        assert not await proved(bars, [before, bar(T0 + MINUTE, "4.5")], []), "a revision was missed"
        assert not await proved(bars, [before], [])
        with pytest.raises(ValueError, match="a volume is sNaN"):
            await proved(bars, [before, after | {"v": "sNaN"}], [])
