"""One pair of the synthetic market: when something happens, and what.

Arrivals are a self-exciting (Hawkes) process with an exponential kernel, simulated after Dassios and Zhao
(2013), "Exact simulation of Hawkes process with exponentially decaying intensity". The middle price is a
geometric random walk over the arrivals; quotes stand around it and trades mostly happen at the quotes.
"""

import math
from functools import cache
from math import exp, log
from random import Random
from typing import NamedTuple

import msgspec

from simulator.frame import Event
from simulator.minute import SIZE_DIGITS, decimal

# In about dollars; only the order of magnitude matters. A currency not named here gets a random one.
_START_PRICES = {"BTC": 61_000, "ETH": 2_600, "SOL": 155, "MATIC": 0.42, "AVAX": 22.5}
_DOLLARS = {"USD", "EUR", "GBP", "USDT", "USDC"}

_S = 1_000_000_000
_MS = 1_000_000
_EXCHANGES = (1, 1, 1, 1, 2, 6, 23, 23)
_CONDITIONS = {"buy": '"c":[2],', "sell": '"c":[1],', "zero": '"c":[0],', "missing": ""}

_BRANCHING = 0.6  # children per arrival
_DECAY_PER_S = 3.0
_LONGEST_GAP_S = 5.0
_TRADE_SHARE = 0.2  # of the arrivals; sweeps make it about a quarter of the events
_SWEEP_SHARE = 0.05  # of the trade arrivals
_TRADES_PER_TRADE_ARRIVAL = 1.3
_LATE_SHARE = 0.004
_VERY_LATE_SHARE = 0.0005
_MINUTES_LATE_SHARE = 0.0001
_OVERTAKEN_SHARE = 0.01  # of the quotes
_VOLATILITY = 1.1e-4  # of the price per square root of a second: 60 % a year
_SIZES, _FEW_SIZES = 1024, 64  # a pair draws its sizes once, then picks among them


class Activity(NamedTuple):
    """How much goes on in a pair: its mean rate (0 is quiet: nothing but regular trades), and whether a trade
    comes every 20 to 30 s at least. Without that it may take hours."""

    trades_per_s: float
    regular: bool = True


class Fill(msgspec.Struct, frozen=True, gc=False):
    """A trade as its minute's aggregate needs it: price in ticks, size in 1e-8."""

    t_ms: int
    price: int
    size: int


Publication = tuple[int, Event, Fill | None]
"""When the vendor publishes an event (ns of market time), the event, and the fill if it is a trade."""


class TradeIds:
    """Trade ids in each exchange's manner, unique over exchanges, and over runs by the second they start."""

    def __init__(self, start_ns: int) -> None:
        # Below 2**53, so that readers with binary floats keep them; ten million trades per second of start.
        self._base = start_ns // _S % 900_000_000 * 10_000_000
        # Odd multipliers permute the 48-bit numbers: distinct stays distinct, and looks random.
        scrambled = f"{start_ns // _MS * 0x9E3779B97F4B % 2**48:012x}"
        self._prefix = f"{scrambled[:8]}-{scrambled[8:]}"
        self._count = 0

    def next(self, exchange: int) -> str:
        """JSON: an integer (Coinbase, Bitfinex), a string of digits (Bitstamp) or a UUID string (Kraken)."""
        self._count += 1
        if exchange == 23:
            return f'"{self._prefix}-4b1d-8c27-{self._count * 0x5DEECE66D1A7 % 2**48:012x}"'
        return f'"{self._base + self._count}"' if exchange == 6 else str(self._base + self._count)


class Pair:
    """The state of one pair."""

    def __init__(self, symbol: str, activity: Activity, start_ns: int, ids: TradeIds, rng: Random) -> None:
        self.symbol = symbol
        base, _, quote = symbol.partition("-")
        price = _START_PRICES.get(base if quote in _DOLLARS else "") or 10 ** rng.uniform(-1, 3)
        self.digits = min(max(2, 4 - math.floor(math.log10(price))), 4)
        self._rng = rng
        self._random = rng.random
        self._ids = ids
        self._quiet = not activity.trades_per_s
        self._regular = activity.regular
        self._longest_gap_s = _LONGEST_GAP_S if activity.regular else math.inf
        self._trade_share = 0.0 if self._quiet else _TRADE_SHARE

        arrivals_per_s = 0.3 if self._quiet else activity.trades_per_s / (_TRADE_SHARE * _TRADES_PER_TRADE_ARRIVAL)
        self._spontaneous = arrivals_per_s * (1 - _BRANCHING)  # per second
        self._excited = 0.001 * self._spontaneous  # on top, per second; decays, and jumps at each arrival
        self._trade_due_ns = start_ns + int(rng.uniform(0, 15) * _S) if activity.regular else math.inf
        self._published_ns = start_ns

        self._ticks = 10**self.digits
        self._fractions = _fractions(self.digits)
        self._mid = price * self._ticks
        self._step = math.sqrt(12 / arrivals_per_s) * _VOLATILITY  # uniform with the variance of the volatility
        sizes = _SIZES if activity.regular else _FEW_SIZES
        self._sizes = [_draw_size(int(30 / price * 10**SIZE_DIGITS), rng) for _ in range(sizes)]
        self._topic_trade, self._topic_quote = ("XT", symbol), ("XQ", symbol)
        self._bid = self._ask = 0
        self._requote()

    def next_gap_ns(self) -> int:
        """Draw the time from the last arrival to the next: the first of a spontaneous and an excited one."""
        random = self._random
        gap_s = -log(1 - random()) / self._spontaneous
        remaining = 1 + _DECAY_PER_S * log(1 - random()) / self._excited
        if remaining > 0 and (excited_s := -log(remaining) / _DECAY_PER_S) < gap_s:
            gap_s = excited_s
        if gap_s > self._longest_gap_s:
            gap_s = self._longest_gap_s
        self._excited = self._excited * exp(-_DECAY_PER_S * gap_s) + _BRANCHING * _DECAY_PER_S
        return int(gap_s * _S) + 1

    def arrive(self, t_ns: int) -> list[Publication]:
        """What happens at this arrival: a quote, a trade, or the trades of a sweep."""
        # A pair is received in order, 3 to 45 ms after the fact; what is late beyond that is overtaken.
        received_ns = t_ns + (3 + int(42 * self._random() ** 2)) * _MS
        if received_ns < self._published_ns:
            received_ns = self._published_ns
        self._published_ns = received_ns
        if self._random() < self._trade_share or t_ns >= self._trade_due_ns:
            return self._trade(t_ns, received_ns)
        return [self._quote(t_ns, received_ns)]

    def _requote(self) -> None:
        random = self._random
        mid = self._mid = self._mid * (1 + self._step * (random() - 0.5))
        half_spread = mid * (0.5 + random()) * 1e-4
        self._bid = bid = int(mid - half_spread) or 1
        self._ask = int(mid + half_spread)
        if self._ask <= bid:
            self._ask = bid + 1

    def _price_text(self, price: int) -> str:
        return f"{price // self._ticks}{self._fractions[price % self._ticks]}"

    def _quote(self, t_ns: int, received_ns: int) -> Publication:
        self._requote()
        random, sizes = self._random, self._sizes
        if random() < _OVERTAKEN_SHARE:
            received_ns += int((0.05 + 0.75 * random()) * _S)
        event = (
            f'{{"ev":"XQ","pair":"{self.symbol}","lp":0,"ls":0,"bp":{self._price_text(self._bid)}'
            f',"bs":{sizes[int(random() * len(sizes))][1]},"ap":{self._price_text(self._ask)}'
            f',"as":{sizes[int(random() * len(sizes))][1]},"t":{t_ns // _MS}'
            f',"x":{_EXCHANGES[int(random() * len(_EXCHANGES))]},"r":{received_ns // _MS}}}'
        )
        return received_ns, Event(self._topic_quote, event.encode()), None

    def _trade(self, t_ns: int, received_ns: int) -> list[Publication]:
        rng = self._rng
        if self._regular:
            self._trade_due_ns = t_ns + int(rng.uniform(20, 25) * _S)
        exchange = _EXCHANGES[int(rng.random() * len(_EXCHANGES))]
        buys = rng.random() < 0.5
        u = rng.random()
        conditions = _CONDITIONS["zero" if u < 0.12 else "missing" if u < 0.2 else "buy" if buys else "sell"]
        fills = rng.randint(3, 12) if rng.random() < _SWEEP_SHARE else 1
        published_ns = received_ns + self._lateness_ns(t_ns)
        t_ms = t_ns // _MS
        price = self._trade_price(buys)
        result: list[Publication] = []
        for _ in range(fills):
            size, size_text = self._sizes[int(rng.random() * len(self._sizes))]
            event = (
                f'{{"ev":"XT","pair":"{self.symbol}","p":{self._price_text(price)},"t":{t_ms}'
                f',"s":{size_text},{conditions}"i":{self._ids.next(exchange)},"x":{exchange}'
                f',"r":{published_ns // _MS}}}'
            )
            result.append((published_ns, Event(self._topic_trade, event.encode()), Fill(t_ms, price, size)))
            if rng.random() < 0.15:  # a level is used up
                price = max(1, price + (1 if buys else -1))
        return result

    def _trade_price(self, buys: bool) -> int:
        """At the quote, sometimes between the two, rarely worse."""
        u = self._random()
        if u < 0.08:
            return self._rng.randint(self._bid, self._ask)
        worse = self._ask - self._bid if u < 0.1 else 0
        return self._ask + worse if buys else max(1, self._bid - worse)

    def _lateness_ns(self, t_ns: int) -> int:
        """Mostly 0, sometimes 1 to 3 s; rarely, in a busy pair, past the minute's end: 20 to 90 s, or to 5 min."""
        u = self._random()
        if u >= _LATE_SHARE:
            return 0
        if u >= _VERY_LATE_SHARE or self._quiet:
            return int(self._rng.uniform(1, 3) * _S)
        if u < _MINUTES_LATE_SHARE:
            return int(self._rng.uniform(90, 300) * _S)
        to_minute_end = 60 * _S - t_ns % (60 * _S)
        return max(int(self._rng.uniform(20, 85) * _S), to_minute_end + 5 * _S)


@cache
def _fractions(digits: int) -> list[str]:
    """ ".01" of 61000.01, for every fraction that this many digits have; nothing for a whole number."""
    return [decimal(tick, digits)[1:] for tick in range(10**digits)]


def _draw_size(least: int, rng: Random) -> tuple[int, str]:
    """A size in 1e-8 and its JSON: heavy-tailed (Pareto) up to 500 times the least; now and then dust.

    Dust, below 0.0001, is in scientific notation, as in captures.
    """
    if rng.random() < 0.02:
        size = rng.randint(1, 9_999)
        return size, f"{size / 10**SIZE_DIGITS:g}"
    size = 1 + int(least / (rng.random() + 0.002))
    return size, decimal(size, SIZE_DIGITS)
