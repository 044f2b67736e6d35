"""A trade far from the trades right before it, measured in the pair's own robust deviations."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain
from math import exp, inf, log, sqrt
from typing import Annotated, Any

import msgspec

from processors.detectors.base import NORMAL_ABS_P90, Detector, Finding, Onsets, TradeSeen, percentile_90, touches
from schemas.events import MINUTE_NS, NS_PER_S, Gap

MINUTES = 24  # that the deviation is learned from
RANGE_NS = NS_PER_S  # a price that was traded so shortly before is no spike
CARRY_NS = 3 * MINUTE_NS  # how old the trades before may be
LEAST_RETURNS = 30  # fewer tell nothing of a pair
LATE_NS = 5 * NS_PER_S  # a trade this far behind the last tick says nothing about the price now
BUCKET_NS = 5 * NS_PER_S


class _Pair:
    __slots__ = ("level", "limit", "minute", "moves", "ranges", "recent", "returns", "unit", "usual")

    def __init__(self) -> None:
        self.recent: list[tuple[float, int]] = []  # the newest three trades: price, tick
        self.level: tuple[float, int] | None = None  # the median of those three, tick
        self.ranges: list[tuple[int, float, float]] = []  # tick, lowest and highest price after it
        self.moves: dict[int, array[float]] = {}  # of the level, by minute: absolute, log
        self.returns: dict[int, array[float]] = {}  # the same per sqrt(s)
        self.minute = 0  # that unit, usual and limit are for
        self.unit = inf  # per sqrt(s)
        self.usual = 1.0  # a move, in units
        self.limit = inf  # no spike where the highest price is at most so many times the lowest


class PriceSpike(Detector):
    """score = distance / (unit x max(usual, sqrt(s since the trade before))).

    The distance is the log of the price to the nearer of the trade before and the reference, the median of the three
    trades before: one false print moves it nowhere, and a market that really runs takes it along trade by trade,
    however fast. Half of that distance at least must also lie outside everything traded in the second before: an
    order that swept the book ends far from the market, and the next trade, back in the market, is no spike.

    The unit is the 90th percentile of the absolute log returns from reference to reference, as each second with trades
    leaves it, per sqrt(s), over the 24 whole minutes before; divided by 1.6449 it is the standard deviation of a
    normal distribution. Not the median (MAD): where most seconds move by a tick or not at all that measures the tick.
    The usual move is the same of the returns as they were: what a pair of few trades moves by in a second with trades
    is not sqrt(s) of its quiet minutes, of which its unit mostly comes. Each is at least the smallest move there was:
    one tick is no spike.
    """

    kind = "price_spike"
    severity = "warning"
    memory_ns = (MINUTES + 1) * MINUTE_NS + CARRY_NS

    class Settings(Detector.Settings, frozen=True):
        deviations: Annotated[float, msgspec.Meta(gt=0)] = 7.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._pairs: dict[str, _Pair] = {}
        self._onsets = Onsets(BUCKET_NS)

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        floor = at - LATE_NS
        prices = [trade[0] for trade in trades if trade[2] >= floor]
        if not prices:
            return ()
        pair = self._pairs.get(symbol)
        if pair is None:
            pair = self._pairs[symbol] = _Pair()
        minute = at // MINUTE_NS
        if pair.minute != minute:
            self._learn(pair, minute)
        before = pair.recent
        if before and before[0][1] < at - CARRY_NS:
            before = [one for one in before if one[1] >= at - CARRY_NS]
        highest, lowest = max(prices), min(prices)
        ranges = pair.ranges
        if ranges and ranges[0][0] < at - RANGE_NS:
            ranges = [one for one in ranges if one[0] >= at - RANGE_NS]
        pair.ranges = [*ranges, (at, lowest, highest)]
        for price, _ in before:
            if price > highest:
                highest = price
            elif price < lowest:
                lowest = price
        findings: Iterable[Finding] = ()
        if highest > lowest * pair.limit:
            findings = self._judge(symbol, pair, before, ranges, [t for t in trades if t[2] >= floor], at)
        pair.recent = recent = (before + [(price, at) for price in prices[-3:]])[-3:]
        if len(recent) == 3:
            level = sorted([price for price, _ in recent])[1]
            if pair.level is not None and pair.level[1] >= at - CARRY_NS:
                was, then = pair.level
                if minute not in pair.moves:
                    pair.moves[minute], pair.returns[minute] = array("d"), array("d")
                move = abs(log(level / was))
                pair.moves[minute].append(move)
                pair.returns[minute].append(move / sqrt(max(1.0, (at - then) / NS_PER_S)))
            pair.level = (level, at)
        return findings

    def _learn(self, pair: _Pair, minute: int) -> None:
        pair.minute, pair.unit, pair.limit = minute, inf, inf
        self._drop(pair, minute - MINUTES)
        returns = sorted(chain.from_iterable(pair.returns.values()))
        if len(returns) >= LEAST_RETURNS and returns[-1]:
            pair.unit = _deviation(returns)
            pair.usual = max(1.0, _deviation(sorted(chain.from_iterable(pair.moves.values()))) / pair.unit)
            pair.limit = exp(min(700.0, self.settings.deviations * pair.usual * pair.unit))

    def _drop(self, pair: _Pair, oldest: int) -> None:
        pair.moves = {minute: moves for minute, moves in pair.moves.items() if minute >= oldest}
        pair.returns = {minute: returns for minute, returns in pair.returns.items() if minute >= oldest}

    def _judge(
        self,
        symbol: str,
        pair: _Pair,
        before: list[tuple[float, int]],
        ranges: list[tuple[int, float, float]],
        trades: list[TradeSeen],
        at: int,
    ) -> Iterable[Finding]:
        deviations = self.settings.deviations
        series = [(price, then) for price, then in before] + [(trade[0], at) for trade in trades]
        low = min([price for price, _ in before] + [low for _, low, _ in ranges], default=inf)
        high = max([price for price, _ in before] + [high for _, _, high in ranges], default=0.0)
        worst, found = 0.0, -1
        for place in range(len(before), len(series)):
            price = series[place][0]
            if low <= price <= high:
                continue
            if place >= 3:
                last, then = series[place - 1]
                reference = sorted(series[place - 3 : place])[1][0]
                unit = pair.unit * max(pair.usual, sqrt((at - then) / NS_PER_S))
                score = min(abs(log(price / reference)), abs(log(price / last))) / unit
                outside = log(max(price / high, low / price)) / unit
                if score > worst and outside >= score / 2:
                    worst, found = score, place
            low, high = min(low, price), max(high, price)
        if worst < deviations or not self._onsets.begins(symbol, at):
            return ()
        price, _, ts, epoch, n, _ = trades[found - len(before)]
        reference = sorted(series[found - 3 : found])[1][0]
        detail = f"{100 * (price / reference - 1):+.3g} % from the trades before"
        key = str(at // BUCKET_NS * (BUCKET_NS // NS_PER_S))
        return [Finding(symbol, key, ts, price, reference, worst, deviations, detail, epoch, n)]

    def gap(self, gap: Gap, at: int) -> None:
        if "XT" in gap.streams:
            for symbol, pair in self._pairs.items():
                if touches(gap, symbol):
                    pair.recent, pair.ranges, pair.level = [], [], None

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)
        oldest = tick // MINUTE_NS - MINUTES
        for symbol, pair in list(self._pairs.items()):
            self._drop(pair, oldest)
            pair.recent = [one for one in pair.recent if one[1] >= tick - CARRY_NS]
            pair.ranges = [one for one in pair.ranges if one[0] >= tick - RANGE_NS]
            if pair.level is not None and pair.level[1] < tick - CARRY_NS:
                pair.level = None
            if not pair.returns and not pair.recent:
                del self._pairs[symbol]

    def state(self) -> object:
        return (
            {s: (p.recent, p.ranges, p.level, p.moves, p.returns) for s, p in self._pairs.items()},
            self._onsets.state(),
        )


def _deviation(moves: Sequence[float]) -> float:
    """Of sorted moves that are not all 0; at least the smallest that is not."""
    return max(percentile_90(moves) / NORMAL_ABS_P90, moves[bisect_right(moves, 0.0)])
