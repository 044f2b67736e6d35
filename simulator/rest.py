"""The vendor's REST, answered from the market that the socket plays: one story, told twice."""

import asyncio
import base64
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
from aiohttp import web

from simulator.faults import Faults, Incident
from simulator.history import DAY_MS, LONGEST_MS, Bar, History, Trade, bar, base_windows, decode_fields, window, windows

Query = Mapping[str, str]
Answer = dict[str, Any]
MAX_LIMIT = 50_000
MAX_TICKERS = 1_000

EXCHANGES = {1: "Coinbase", 2: "Bitfinex", 6: "Bitstamp", 10: "Binance.US", 23: "Kraken"}
CONDITIONS = {1: "Sell Side", 2: "Buy Side"}
_NAMES = {"BTC": "Bitcoin", "ETH": "Ethereum", "SOL": "Solana", "USD": "United States Dollar", "EUR": "Euro"}

ERRORS = {
    401: {"status": "ERROR", "error": "Unknown API Key"},
    403: {"status": "NOT_AUTHORIZED", "message": "You are not entitled to this data. Please upgrade your plan."},
    404: {"status": "NOT_FOUND", "message": "Data not found."},
    429: {
        "status": "ERROR",
        "error": "You've exceeded the maximum requests per minute, please wait or upgrade your subscription.",
    },
}
_BROKEN = {"status": "ERROR", "error": "Internal server error"}
_NO_KEY = {"status": "ERROR", "error": "API Key was not provided"}

_encode = msgspec.json.Encoder(decimal_format="number").encode


class Wrong(ValueError):
    """A parameter that makes no sense: the answer is 400."""


class Rest:
    """The handlers, each a function from a request to the JSON of its answer, behind key, limits and faults."""

    def __init__(
        self,
        history: History,
        faults: Faults,
        keys: Collection[str],
        per_minute: int | None,
        clock_ns: Callable[[], int],
    ) -> None:
        """`clock_ns` is the market's time; `per_minute` is how many requests a key has in 60 s of wall time."""
        self._history = history
        self._faults = faults
        self._keys = keys
        self._per_minute = per_minute
        self._clock_ns = clock_ns
        self._asked: defaultdict[str, deque[float]] = defaultdict(deque)

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Serve at the vendor's paths."""
        aggs = "/v2/aggs"
        for path, handler in {
            aggs + "/ticker/{ticker}/range/{multiplier}/{span}/{from}/{to}": self._range,
            aggs + "/ticker/{ticker}/prev": self._previous,
            aggs + "/grouped/locale/global/market/crypto/{date}": self._grouped,
            "/v3/trades/{ticker}": self._trades,
            "/v1/last/crypto/{from}/{to}": self._last,
            "/v3/reference/tickers": self._tickers,
            "/v3/reference/conditions": self._conditions,
            "/v3/reference/exchanges": self._exchanges,
            "/v1/marketstatus/now": self._status,
        }.items():
            router.add_get(path, self._guarded(handler))

    def _guarded(self, handler: Callable[[web.Request, Query], Answer]) -> Callable[[web.Request], Awaitable[Any]]:
        async def answer(request: web.Request) -> web.Response:
            if (slow := self._strike("rest-slow", request)) is not None:
                await asyncio.sleep(slow.fault.amount or 0)
            if (error := self._strike("rest-error", request)) is not None:
                return _failed(error.fault.code or 500)
            key = _key(request)
            if not key:
                return _reply(_NO_KEY, 401)
            if self._keys and key not in self._keys:
                return _failed(401)
            if self._too_many(key):
                return _failed(429)
            try:
                found = handler(request, _query(request))
            except Wrong as wrong:
                return _reply({"status": "ERROR", "error": str(wrong)}, 400)
            if self._strike("rest-empty", request) is not None:
                found = _emptied(found)
            return _failed(404) if found.get("status") == "NOT_FOUND" else _reply(found, 200)

        return answer

    def _strike(self, kind: str, request: web.Request) -> Incident | None:
        for incident in self._faults.of(kind):
            if request.path.startswith(incident.fault.path or ""):
                incident.strike()
                return incident
        return None

    def _too_many(self, key: str) -> bool:
        if self._per_minute is None:
            return False
        asked, now = self._asked[key], time.monotonic()
        while asked and asked[0] <= now - 60:
            asked.popleft()
        if len(asked) >= self._per_minute:
            return True
        asked.append(now)
        return False

    # -- aggregates ------------------------------------------------------------------------------------

    def _range(self, request: web.Request, query: Query) -> Answer:
        path = request.match_info
        ticker, span = path["ticker"], path["span"]
        multiplier = _integer("multiplier", path["multiplier"], 1, 100_000)
        if span not in LONGEST_MS:
            raise Wrong(f"timespan must be one of {', '.join(LONGEST_MS)}")
        limit = _integer("limit", query.get("limit", "5000"), 1, MAX_LIMIT)
        descending = _descending("sort", query.get("sort", "asc"))
        from_ms, to_ms = _moment_ms(path["from"]), _moment_ms(path["to"], last=True)
        if from_ms > to_ms:
            raise Wrong("from must not be after to")
        pair, until_ms = self._history.pair_of(ticker), to_ms + multiplier * LONGEST_MS[span]
        trades = self._history.between(pair, window(from_ms, multiplier, span), until_ms)
        found = [(start, those) for start, those in windows(trades, multiplier, span) if start <= to_ms]
        if descending:
            found.reverse()
        if (after := query.get("after")) is not None:
            found = [one for one in found if (one[0] < int(after) if descending else one[0] > int(after))]
        bars: list[Bar] = []
        base = 0
        for start_ms, those in found:
            base += base_windows(those, span)
            if bars and base > limit:
                return self._bars(ticker, bars) | {"next_url": _next_url(request, query, str(bars[-1].t))}
            bars.append(bar(start_ms, those))
        return self._bars(ticker, bars)

    def _previous(self, request: web.Request, _: Query) -> Answer:
        ticker = request.match_info["ticker"]
        today_ms = window(self._clock_ns() // 1_000_000, 1, "day")
        found = self._day(self._history.pair_of(ticker), today_ms - DAY_MS)
        return self._bars(ticker, [found] if found else [], ticker)

    def _grouped(self, request: web.Request, _: Query) -> Answer:
        day_ms = _moment_ms(request.match_info["date"])
        bars = {pair: self._day(pair, day_ms) for pair in self._history.pairs}
        results = [_with_ticker(_ticker(pair), found) for pair, found in bars.items() if found]
        return _aggregates(results)

    def _day(self, pair: str | None, day_ms: int) -> Bar | None:
        trades = self._history.between(pair, day_ms, day_ms + DAY_MS)
        return bar(day_ms, trades) if trades else None

    @staticmethod
    def _bars(ticker: str, bars: list[Bar], named: str | None = None) -> Answer:
        return {"ticker": ticker} | _aggregates([_with_ticker(named, one) if named else one for one in bars])

    # -- trades ----------------------------------------------------------------------------------------

    def _trades(self, request: web.Request, query: Query) -> Answer:
        limit = _integer("limit", query.get("limit", "1000"), 1, MAX_LIMIT)
        descending = _descending("order", query.get("order", "desc"))
        from_ms, until_ms = _bounds_ms(query)
        trades = self._history.between(self._history.pair_of(request.match_info["ticker"]), from_ms, until_ms)
        if descending:
            trades = trades[::-1]
        if (after := query.get("after")) is not None:
            t_ms, place = map(int, after.split("-"))
            seen = (t_ms, place)
            trades = [one for one in trades if (_at(one) < seen if descending else _at(one) > seen)]
        page = trades[:limit]
        answer: Answer = {"status": "OK", "results": [_trade(one) for one in page]}
        if len(trades) > limit:
            answer["next_url"] = _next_url(request, query, f"{page[-1].t_ms}-{page[-1].place}")
        return answer

    def _last(self, request: web.Request, _: Query) -> Answer:
        symbol = f"{request.match_info['from']}-{request.match_info['to']}".upper()
        trade = self._history.last(symbol)
        if trade is None:
            return {"status": "NOT_FOUND"}
        fields = decode_fields(trade.data)
        last = {"conditions": fields.c, "exchange": fields.x, "price": fields.p, "size": fields.s}
        return {"status": "success", "symbol": symbol, "last": last | {"timestamp": trade.t_ms}}

    # -- reference -------------------------------------------------------------------------------------

    def _tickers(self, request: web.Request, query: Query) -> Answer:
        limit = _integer("limit", query.get("limit", "100"), 1, MAX_TICKERS)
        wanted, search = query.get("ticker"), query.get("search", "").upper()
        if query.get("market", "crypto") != "crypto" or query.get("active", "true") != "true":
            return {"status": "OK", "count": 0, "results": []}
        found = sorted((_ticker(pair), pair) for pair in self._history.pairs)
        found = [
            (ticker, pair)
            for ticker, pair in found
            if wanted in (None, ticker) and search in pair and ticker > query.get("after", "")
        ]
        page = found[:limit]
        answer: Answer = {"status": "OK", "count": len(page), "results": [self._ticker_of(pair) for _, pair in page]}
        if len(found) > limit:
            answer["next_url"] = _next_url(request, query, page[-1][0])
        return answer

    def _ticker_of(self, pair: str) -> Answer:
        base, _, quote = pair.partition("-")
        base_name, quote_name = _NAMES.get(base, base), _NAMES.get(quote, quote)
        return {
            "ticker": _ticker(pair),
            "name": f"{base_name} - {quote_name}",
            "market": "crypto",
            "locale": "global",
            "active": True,
            "currency_symbol": quote,
            "currency_name": quote_name,
            "base_currency_symbol": base,
            "base_currency_name": base_name,
            "last_updated_utc": _iso(self._clock_ns()),
        }

    @staticmethod
    def _conditions(_: web.Request, __: Query) -> Answer:
        results = [
            {"id": number, "name": name, "type": "trade", "asset_class": "crypto", "data_types": ["trade"]}
            for number, name in CONDITIONS.items()
        ]
        return {"status": "OK", "count": len(results), "results": results}

    @staticmethod
    def _exchanges(_: web.Request, __: Query) -> Answer:
        results = [
            {"id": number, "name": name, "type": "exchange", "asset_class": "crypto", "locale": "global"}
            for number, name in EXCHANGES.items()
        ]
        return {"status": "OK", "count": len(results), "results": results}

    def _status(self, _: web.Request, __: Query) -> Answer:
        return {
            "market": "open",
            "serverTime": _iso(self._clock_ns()),
            "currencies": {"crypto": "open", "fx": "open"},
            "exchanges": {"nasdaq": "open", "nyse": "open", "otc": "open"},
            "afterHours": False,
            "earlyHours": False,
        }


# -- answers -------------------------------------------------------------------------------------------


def _reply(body: Mapping[str, Any], status: int) -> web.Response:
    identified = {**body, "request_id": uuid.uuid4().hex}
    return web.Response(body=_encode(identified), status=status, content_type="application/json")


def _failed(status: int) -> web.Response:
    return _reply(ERRORS.get(status, _BROKEN), status)


def _aggregates(results: list[Any]) -> Answer:
    """An answer of bars; without any it has no `results`."""
    found: Answer = {"status": "OK", "adjusted": True, "queryCount": len(results), "resultsCount": len(results)}
    return found | {"results": results} if results else found


def _emptied(found: Answer) -> Answer:
    """The same answer if there were nothing."""
    if "resultsCount" in found:
        return _aggregates([])
    found.pop("next_url", None)
    return found | {"results": []} if "results" in found else {"status": "NOT_FOUND"}


def _with_ticker(ticker: str, one: Bar) -> Answer:
    return {"T": ticker} | msgspec.structs.asdict(one)


def _at(trade: Trade) -> tuple[int, int]:
    return trade.t_ms, trade.place


def _trade(trade: Trade) -> Answer:
    fields = decode_fields(trade.data)
    return {
        "conditions": fields.c,
        "exchange": fields.x,
        "id": str(fields.i),
        "participant_timestamp": trade.t_ms * 1_000_000,
        "price": fields.p,
        "size": fields.s,
    }


def _ticker(pair: str) -> str:
    return "X:" + pair.replace("-", "")


def _iso(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="seconds")


# -- requests ------------------------------------------------------------------------------------------

_LATEST_MS = 2**62


def _key(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else request.query.get("apiKey", "")


def _query(request: web.Request) -> Query:
    """The parameters, or those of the first page and `after` if there is a cursor; raises Wrong."""
    cursor = request.query.get("cursor")
    if cursor is None:
        return {name: value for name, value in request.query.items() if name != "after"}
    try:
        text = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
        return dict(parse_qsl(text, strict_parsing=True))
    except ValueError as error:
        raise Wrong("cursor is not one of ours") from error


def _next_url(request: web.Request, query: Query, after: str) -> str:
    """The address of the next page; like the vendor's it lacks the key."""
    query = {name: value for name, value in query.items() if name != "apiKey"} | {"after": after}
    cursor = base64.urlsafe_b64encode(urlencode(query).encode()).decode()
    return f"{request.scheme}://{request.host}{request.path}?cursor={cursor}"


def _integer(name: str, text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise Wrong(f"{name} must be a whole number from {least} to {most}, not {text!r}")
    return number


def _descending(name: str, text: str) -> bool:
    if text not in ("asc", "desc"):
        raise Wrong(f"{name} must be asc or desc, not {text!r}")
    return text == "desc"


def _moment_ms(text: str, *, last: bool = False) -> int:
    """Milliseconds, or YYYY-MM-DD: that day's first, or `last`, millisecond."""
    if text.isdigit():
        return int(text)
    return _day_ms(text) + (DAY_MS - 1 if last else 0)


def _day_ms(text: str) -> int:
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as error:
        raise Wrong(f"{text!r} is neither a timestamp nor a date like 2024-08-09") from error


def _bounds_ms(query: Query) -> tuple[int, int]:
    """What the `timestamp` parameters (ns, or a date: all of that day) leave of time: [from, until) in ms."""
    from_ms, until_ms = 0, _LATEST_MS
    for name, value in query.items():
        if not name.startswith("timestamp"):
            continue
        if value.isdigit():
            first_ms, after_ms = -(-int(value) // 1_000_000), int(value) // 1_000_000 + 1
        else:
            first_ms, after_ms = _day_ms(value), _day_ms(value) + DAY_MS
        match name:
            case "timestamp":
                from_ms, until_ms = max(from_ms, first_ms), min(until_ms, after_ms)
            case "timestamp.gte":
                from_ms = max(from_ms, first_ms)
            case "timestamp.gt":
                from_ms = max(from_ms, after_ms)
            case "timestamp.lt":
                until_ms = min(until_ms, first_ms)
            case "timestamp.lte":
                until_ms = min(until_ms, after_ms)
    return from_ms, until_ms
