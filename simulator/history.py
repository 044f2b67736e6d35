"""The market's trades so far, by pair and exchange time: what REST answers from. Pure.

Every trade that the market made is in it, whether a client got it or not, as the bytes that the socket has
for it; what a fault changed is in it as changed, what a fault repeated once.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Context, Decimal
from itertools import groupby

import msgspec

from schemas import wire
from simulator.frame import Frame

SECOND_MS, MINUTE_MS, HOUR_MS, DAY_MS = 1_000, 60_000, 3_600_000, 86_400_000
_SUM = Context(prec=60)
_VWAP = Context(prec=14)

_FIXED_MS = {"second": SECOND_MS, "minute": MINUTE_MS, "hour": HOUR_MS, "day": DAY_MS, "week": 7 * DAY_MS}
_MONTHS = {"month": 1, "quarter": 3, "year": 12}
_FIRST_SUNDAY_MS = 3 * DAY_MS  # weeks begin on Sunday
LONGEST_MS = _FIXED_MS | {span: months * 31 * DAY_MS for span, months in _MONTHS.items()}
"""The spans of aggregates, and how long one is at most."""


class Trade(msgspec.Struct, frozen=True, gc=False, order=True):
    """Exchange time (ms), place in the order of publication, and the bytes of the XT message."""

    t_ms: int
    place: int
    data: bytes


class Fields(msgspec.Struct, frozen=True):
    """The fields of an XT message that REST has too, numbers as the text they are."""

    p: msgspec.Raw
    s: msgspec.Raw
    i: int | str
    x: int
    c: list[int] = []


class Bar(msgspec.Struct, frozen=True):
    """An aggregate as REST has it: `t` is the window's start (ms), `n` the number of trades."""

    v: Decimal
    vw: Decimal
    o: Decimal
    c: Decimal
    h: Decimal
    l: Decimal  # noqa: E741 - the vendor's name
    t: int
    n: int


decode_fields = msgspec.json.Decoder(Fields).decode


class History:
    """Grows with each frame and forgets what is older than `keep_ms` of market time; 0 keeps nothing."""

    def __init__(self, keep_ms: int, pairs: Iterable[str]) -> None:
        """`pairs` are known from the beginning, others as they trade."""
        self._keep_ms = keep_ms
        self._trades: dict[str, list[Trade]] = {pair: [] for pair in pairs}
        self._place = 0
        self._tidy_ms = 0

    @property
    def pairs(self) -> list[str]:
        """In the order of the alphabet."""
        return sorted(self._trades)

    def pair_of(self, ticker: str) -> str | None:
        """BTC-USD for X:BTCUSD and X:BTC-USD; None for a pair that is not traded here."""
        name = ticker.removeprefix("X:").replace("-", "")
        return next((pair for pair in self._trades if pair.replace("-", "") == name), None)

    def add(self, frame: Frame) -> None:
        """Take in the frame's trades; what has not the fields of one is none."""
        if not self._keep_ms:
            return
        for event in frame.events:
            if event.topic is None or event.topic[0] != "XT":
                continue
            try:
                t_ms = wire.decode_head(event.data).time_ms
                decode_fields(event.data)
            except wire.DECODE_ERRORS:
                continue
            if t_ms is not None:
                trades = self._trades.setdefault(event.topic[1], [])
                self._place += 1
                insort(trades, Trade(t_ms, self._place, event.data))
        clock_ms = frame.clock_ns // 1_000_000
        if clock_ms >= self._tidy_ms:
            self._tidy_ms = clock_ms + MINUTE_MS
            for trades in self._trades.values():
                del trades[: bisect_left(trades, clock_ms - self._keep_ms, key=_time)]

    def between(self, pair: str | None, from_ms: int, until_ms: int) -> Sequence[Trade]:
        """The pair's trades in [from_ms, until_ms) by exchange time, then publication."""
        trades = self._trades.get(pair or "", [])
        return trades[bisect_left(trades, from_ms, key=_time) : bisect_left(trades, until_ms, key=_time)]

    def last(self, pair: str | None) -> Trade | None:
        """The latest by exchange time."""
        trades = self._trades.get(pair or "")
        return trades[-1] if trades else None


def _time(trade: Trade) -> int:
    return trade.t_ms


def window(t_ms: int, multiplier: int, span: str) -> int:
    """The start (ms) of the window of `multiplier` spans that the time is in, UTC."""
    if width_ms := _FIXED_MS.get(span):
        origin_ms = _FIRST_SUNDAY_MS if span == "week" else 0
        width_ms *= multiplier
        return t_ms - (t_ms - origin_ms) % width_ms
    moment = datetime.fromtimestamp(t_ms / 1000, UTC)
    months = moment.year * 12 + moment.month - 1
    months -= months % (_MONTHS[span] * multiplier)
    return int(datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC).timestamp() * 1000)


def base_windows(trades: Iterable[Trade], span: str) -> int:
    """How many aggregates of a second, a minute or a day a bar of these trades is made of: limits count them."""
    base = span if span in ("second", "minute") else "minute" if span == "hour" else "day"
    return len({window(trade.t_ms, 1, base) for trade in trades})


def windows(trades: Iterable[Trade], multiplier: int, span: str) -> Iterator[tuple[int, list[Trade]]]:
    """The trades by the start of their windows (ms); none is empty."""
    for start_ms, those in groupby(trades, key=lambda trade: window(trade.t_ms, multiplier, span)):
        yield start_ms, list(those)


def bar(start_ms: int, trades: Sequence[Trade]) -> Bar:
    """The aggregate of a window's trades, at least one."""
    fills = [(Decimal(bytes(f.p).decode()), Decimal(bytes(f.s).decode())) for f in _fields(trades)]
    prices = [price for price, _ in fills]
    volume = notional = Decimal(0)
    for price, size in fills:
        volume = _SUM.add(volume, size)
        notional = _SUM.add(notional, _SUM.multiply(price, size))
    vwap = _VWAP.divide(notional, volume) if volume else prices[-1]
    return Bar(volume, vwap, prices[0], prices[-1], max(prices), min(prices), start_ms, len(fills))


def _fields(trades: Iterable[Trade]) -> Iterator[Fields]:
    return (decode_fields(trade.data) for trade in trades)
