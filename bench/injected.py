"""Labelled anomalies, put into the events of a feed.

A robust deviation of a pair, here: the 90th percentile of its absolute log returns between seconds with trades, per
sqrt(s), over the whole untouched data, / 1.6449; times sqrt(s since its trade before) where that is more than 1 s.
(The median of the recording's one-second returns is a single tick: moves of 8 of those are nothing.)
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import exp, log, sqrt
from random import Random
from typing import Any, NamedTuple

import orjson

from schemas import wire
from schemas.events import NS_PER_MS, NS_PER_S
from schemas.frames import Frame

SIZES = (4, 6, 8, 12, 20)
WARM_UP_S = 120  # and 30 seconds with trades and a minute: before that nothing is known of a pair
APART_S = 25  # between two labels of a pair
LONG_S = 130  # the same for what takes a while to be seen


class Event(NamedTuple):
    recv_ns: int
    message: dict[str, Any]

    @property
    def ns(self) -> int:
        return int(self.message["s" if self.message["ev"] == "XA" else "t"]) * NS_PER_MS


class Label(NamedTuple):
    """`within_s`: how long after it the anomaly may come; `explains`: other kinds that it is as well."""

    kind: str
    what: str
    pair: str
    ns: int
    within_s: float = 2.5
    explains: tuple[str, ...] = ()


class Source(NamedTuple):
    """A market: its events in the order they are received, and each pair's robust deviation."""

    name: str
    events: list[Event]
    deviations: dict[str, float]

    @property
    def pair_hours(self) -> float:
        return len(self.deviations) * (self.events[-1].recv_ns - self.events[0].recv_ns) / 3600 / NS_PER_S


def source(name: str, frames: Iterable[Frame]) -> Source:
    """What a feed of these frames brings."""
    events = [Event(recv_ns, message) for recv_ns, data in frames for message in orjson.loads(data)]
    closes: dict[str, dict[int, float]] = defaultdict(dict)
    for event in events:
        if event.message["ev"] == "XT" and event.ns > event.recv_ns - 5 * NS_PER_S:
            closes[event.message["pair"]][event.ns // NS_PER_S] = event.message["p"]
    deviations = {}
    for pair, seconds in closes.items():
        order = sorted(seconds)
        moves = sorted(abs(log(seconds[b] / seconds[a])) / sqrt(b - a) for a, b in pairwise(order))
        deviations[pair] = moves[9 * len(moves) // 10] / 1.6449
    return Source(name, events, deviations)


# -- what is put in ---------------------------------------------------------------------------------


class Injector:
    """Changes a market's events; `places` are (pair, index of a trade), far enough apart."""

    def __init__(self, market: Source, seed: int) -> None:
        self.market = market
        self.rng = Random(seed)
        self.events = [event for event in market.events if event.message["ev"] != "XA"]
        self.labels: list[Label] = []
        self.gaps: list[tuple[int, int]] = []  # marked, ns
        self._trades: dict[str, list[int]] = defaultdict(list)
        for index, event in enumerate(self.events):
            if event.message["ev"] == "XT" and event.ns > event.recv_ns - NS_PER_S:
                self._trades[event.message["pair"]].append(index)

    def places(self, least_s: float) -> Iterator[tuple[str, int]]:
        """Random trades of each pair."""
        end = self.events[-1].recv_ns - 10 * NS_PER_S
        for pair, indexes in self._trades.items():
            seconds = len({self.events[index].recv_ns // NS_PER_S for index in indexes})
            usual_s = (self.events[-1].recv_ns - self.events[0].recv_ns) / NS_PER_S / seconds
            apart_s = max(least_s, 40 * usual_s)  # a pair whose every other trade is false has no market
            known = sorted({self.events[index].recv_ns // NS_PER_S for index in indexes})[:30][-1] + 60
            begin = max(self.events[0].recv_ns // NS_PER_S + WARM_UP_S, known)
            due = (begin + self.rng.uniform(0, apart_s)) * NS_PER_S
            for index in indexes:
                at = self.events[index].recv_ns
                if due <= at < end:
                    yield pair, index
                    due = at + (apart_s + self.rng.uniform(0, apart_s / 2)) * NS_PER_S

    def move(self, pair: str, index: int, deviations: float) -> float:
        """The factor of a move up or down by so many robust deviations."""
        before = max((i for i in self._trades[pair] if i < index), default=index)
        since_s = max(1.0, (self.events[index].ns - self.events[before].ns) / NS_PER_S)
        return exp(self.rng.choice((-1, 1)) * deviations * self.market.deviations[pair] * sqrt(since_s))

    def change(self, index: int, **fields: Any) -> None:
        recv_ns, message = self.events[index]
        self.events[index] = Event(recv_ns, message | fields)

    def scale(self, index: int, factor: float) -> None:
        message = self.events[index].message
        prices = {name: message[name] * factor for name in ("p", "bp", "ap") if name in message}
        self.change(index, **{name: float(f"{price:.12g}") for name, price in prices.items()})

    def following(self, pair: str, index: int, seconds: float, ev: str) -> list[int]:
        end = self.events[index].recv_ns + seconds * NS_PER_S
        found = []
        for at in range(index, len(self.events)):
            event = self.events[at]
            if event.recv_ns > end:
                break
            if event.message["ev"] == ev and event.message["pair"] == pair:
                found.append(at)
        return found

    def label(self, kind: str, what: str, pair: str, index: int, within_s: float = 2.5, *explains: str) -> None:
        self.labels.append(Label(kind, what, wire.symbol_of(pair), self.events[index].ns, within_s, explains))


def prints(injector: Injector) -> None:
    """One trade, and the next is where the market is."""
    for number, (pair, index) in enumerate(injector.places(APART_S)):
        if number % 6 == 5:
            injector.scale(index, injector.rng.choice((0.8, 0.95, 1.05, 1.5)))
            injector.label("price_spike", "fat finger, 5 to 50 %", pair, index, 2.5, "trade_through")
        else:
            size = SIZES[number % 6]
            injector.scale(index, injector.move(pair, index, size))
            injector.label("price_spike", f"{size} deviations, one print", pair, index, 2.5, "trade_through")


def moves(injector: Injector) -> None:
    """Everything of the pair moves and stays there."""
    level: dict[str, float] = defaultdict(lambda: 1.0)
    starts: dict[int, float] = {}
    for number, (pair, index) in enumerate(injector.places(APART_S)):
        size = SIZES[number % 5]
        starts[index] = injector.move(pair, index, size)
        injector.label("price_spike", f"{size} deviations, stays", pair, index, 2.5, "trade_through")
    for index, event in enumerate(injector.events):
        pair = event.message["pair"]
        if index in starts:
            level[pair] *= starts[index]
        injector.scale(index, level[pair])


def crossings(injector: Injector) -> None:
    """Quotes of two seconds, or one, whose bid is 1 to 20 bps above their ask."""
    for pair, index in injector.places(LONG_S):
        quotes = injector.following(pair, index, 20, "XQ")
        seconds = [i for i in quotes if injector.events[i].recv_ns < injector.events[quotes[0]].recv_ns + 2 * NS_PER_S]
        for at in injector.rng.choice((seconds, quotes[:1])):
            message = injector.events[at].message
            injector.change(at, bp=message["ap"] * (1 + injector.rng.uniform(1e-4, 2e-3)))
        if quotes:
            injector.label("crossed_quote", "bid above ask", pair, quotes[0], 4)


def freezes(injector: Injector) -> None:
    """The same quote again and again for two minutes, while trades go on."""
    end_ns = injector.events[-1].recv_ns - 120 * NS_PER_S
    for pair, index in injector.places(700):
        quotes = injector.following(pair, index, 120, "XQ")
        if quotes and injector.events[index].recv_ns < end_ns:
            first = injector.events[quotes[0]].message
            for at in quotes:
                injector.change(at, bp=first["bp"], ap=first["ap"])
            injector.label("stale_pair", "frozen quotes, 2 min", pair, quotes[0], 121, "trade_through")


def outages(injector: Injector) -> None:
    """Nothing for 25 s, marked as the producer marks a reconnection, and the market 30 robust deviations away
    afterwards: a gap, and no spike."""
    every = 100 * NS_PER_S
    start_ns = injector.events[0].recv_ns + WARM_UP_S * NS_PER_S
    events = []
    for recv_ns, message in injector.events:
        number, phase = divmod(recv_ns - start_ns, every)
        if number < 0:
            number, phase = -1, every
        if phase < 25 * NS_PER_S:
            if not injector.labels or injector.labels[-1].ns != start_ns + number * every:
                since = start_ns + number * every
                injector.labels.append(Label("gap", "25 s of nothing, marked", "*", since, 28, ("gap",)))
                injector.gaps.append((since, since + 25 * NS_PER_S))
            continue
        factor = exp(30 * (number + 1) * injector.market.deviations[message["pair"]])
        prices = {name: float(f"{message[name] * factor:.12g}") for name in ("p", "bp", "ap") if name in message}
        events.append(Event(recv_ns, message | prices))
    injector.events = events
    if injector.labels and injector.labels[-1].ns + 26 * NS_PER_S > events[-1].recv_ns:
        injector.labels.pop()


#: Of several passes over a market what is put in; those of one pass don't touch each other's kinds.
Passes = tuple[tuple[Callable[[Injector], None], ...], ...]

SPIKES: Passes = ((prints,), (moves,))
PASSES: Passes = ((prints, crossings), (moves,), (freezes,), (outages,))
