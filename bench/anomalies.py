"""What the detectors find of anomalies put into real and synthetic data, what they find in untouched data, and
what they cost.

Labelled anomalies are put into the frames of a feed, the producer's slicer makes a raw log of them and the pure
pipeline runs over it. Two markets: the recording in ../shared/data, where it lies there, and the simulator's.

A robust deviation of a pair, here: the 90th percentile of its absolute log returns between seconds with trades, per
sqrt(s), over the whole untouched data, / 1.6449; times sqrt(s since its trade before) where that is more than 1 s.
(The median of the recording's one-second returns is a single tick: moves of 8 of those are nothing.)

A label is found if an anomaly of its kind and pair is detected within its time; every other anomaly of that kind is
false, a second one for the same label too.
"""

import argparse
import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import exp, log, sqrt
from random import Random
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import orjson
from rich.console import Console
from rich.table import Table

from bench.line import span
from processors.detectors.registry import DETECTORS, thresholds
from processors.operators import anomalies as operator
from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import topics, wire
from schemas.events import NS_PER_MS, NS_PER_S, Anomaly, decode_anomaly
from schemas.frames import Frame
from schemas.raw import GapValue, RawRecord, decode_tick_value
from simulator.market import market
from tests.recordings import BINANCE, recording

STREAMS = ["XT", "XQ", "XA"]
SYMBOLS = ["BTC-USD", "ETH-USD", "SOL-USD", "MATIC-USD", "AVAX-USD"]
BEGIN_NS = 1_723_161_240 * NS_PER_S
SIZES = (4, 6, 8, 12, 20)
WARM_UP_S = 120  # and 30 seconds with trades and a minute: before that nothing is known of a pair
APART_S = 25  # between two labels of a pair
LONG_S = 130  # the same for what takes a while to be seen


class Event(NamedTuple):
    recv_ns: int
    message: dict[str, Any]

    @property
    def ns(self) -> int:
        return int(self.message.get("t", self.message.get("s"))) * NS_PER_MS


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


def source(name: str, frames: Iterable[tuple[int, bytes]]) -> Source:
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


def simulated(seed: int, seconds: float) -> Source:
    def frames() -> Iterator[tuple[int, bytes]]:
        for frame in market(seed, SYMBOLS, BEGIN_NS):
            if frame.offset_ns > seconds * NS_PER_S:
                return
            yield frame.clock_ns, bytes(frame.data)

    return source("simulator", frames())


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
        self.labels.append(Label(kind, what, symbol(pair), self.events[index].ns, within_s, explains))


def symbol(pair: str) -> str:
    return wire.symbol_of(pair)


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
    for pair, index in injector.places(700):
        quotes = injector.following(pair, index, 120, "XQ")
        if quotes:
            first = injector.events[quotes[0]].message
            for at in quotes:
                injector.change(at, bp=first["bp"], ap=first["ap"])
            injector.label("stale_pair", "frozen quotes, 2 min", pair, quotes[0], 121, "trade_through")


def bursts(injector: Injector) -> None:
    """Three seconds with so many times the 90th percentile of ten seconds' volume."""
    usual: dict[str, Counter[int]] = defaultdict(Counter)
    for event in injector.events:
        if event.message["ev"] == "XT":
            usual[event.message["pair"]][event.ns // NS_PER_S // 10] += event.message["s"]
    start_ns = injector.events[0].recv_ns + 320 * NS_PER_S
    for number, (pair, index) in enumerate(injector.places(60)):
        if injector.events[index].recv_ns < start_ns or len(usual[pair]) < 40:
            continue
        volumes = sorted(usual[pair].values())
        times = (10, 30, 100)[number % 3]
        trades = injector.following(pair, index, 3, "XT")
        size = times * volumes[9 * len(volumes) // 10] / len(trades)
        for at in trades:
            injector.change(at, s=size)
        injector.label("volume_spike", f"{times} x the 90th percentile", pair, index, 5)


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


PLANS: tuple[Callable[[Injector], None], ...] = (prints, moves, crossings, freezes, bursts, outages)

# -- what is found ----------------------------------------------------------------------------------


def log_of(events: Sequence[Event]) -> Iterator[RawRecord]:
    frames = (Frame(recv_ns, b"[" + orjson.dumps(message) + b"]") for recv_ns, message in events)
    return records_of(frames, SlicerSettings(), STREAMS, ["*"])


def marked(records: Iterable[RawRecord], gaps: Sequence[tuple[int, int]]) -> Iterator[RawRecord]:
    """The log with these gaps in every partition, each in front of the first record after its end."""
    done: Counter[int] = Counter()
    for record in records:
        while done[record.partition] < len(gaps) and gaps[done[record.partition]][1] < record.recv[0][0]:
            since, until = gaps[done[record.partition]]
            value = msgspec.json.encode(GapValue(since, until, STREAMS, ["*"], "reconnect"))
            n = record.n + done[record.partition]
            yield record._replace(kind="gap", n=n, recv=[(until, 1)], value=value)
            done[record.partition] += 1
        yield record._replace(n=record.n + done[record.partition])


def found_in(events: Sequence[Event], gaps: Sequence[tuple[int, int]] = ()) -> list[Anomaly]:
    """What one pass finds; what is said once for each partition counts once."""
    pipelines: dict[int, Pipeline] = {}
    found: dict[str, Anomaly] = {}
    for record in marked(log_of(events), gaps):
        pipeline = pipelines.get(record.partition)
        if pipeline is None:
            pipeline = pipelines[record.partition] = Pipeline(record.partition, PipelineSettings())
        for output in pipeline.process(record):
            if output.topic == topics.ANOMALIES.name:
                anomaly = decode_anomaly(output.value)
                whom = anomaly.symbol or f"every partition, {anomaly.ts_event}, {anomaly.detail}"
                found.setdefault(f"{anomaly.id if anomaly.symbol else anomaly.kind} {whom}", anomaly)
    return list(found.values())


class Tally:
    """Of one (market, what was put in): labels, those found, the delays; and by kind what was false."""

    def __init__(self) -> None:
        self.labels: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.delays: dict[str, list[float]] = defaultdict(list)
        self.false: Counter[str] = Counter()
        self.true: Counter[str] = Counter()

    def take(self, labels: Sequence[Label], anomalies: Sequence[Anomaly]) -> None:
        claimed: set[int] = set()
        for anomaly in anomalies:
            near = [
                (place, label)
                for place, label in enumerate(labels)
                if label.pair in (anomaly.symbol, "*")
                and -NS_PER_S < anomaly.detected - label.ns <= label.within_s * NS_PER_S
            ]
            of_kind = [(place, label) for place, label in near if label.kind == anomaly.kind and place not in claimed]
            if of_kind:
                place, label = of_kind[0]
                claimed.add(place)
                self.found[label.what] += 1
                self.true[anomaly.kind] += 1
                self.delays[label.what].append((anomaly.detected - label.ns) / NS_PER_S)
            elif not any(anomaly.kind in label.explains for _, label in near):
                self.false[anomaly.kind] += 1
        for label in labels:
            self.labels[label.what] += 1


def score(make: Callable[[int], Source], runs: int) -> tuple[str, list[Tally], list[Counter[str]], float]:
    """One tally a seed; the anomalies of the untouched data by kind, and its pair-hours."""
    tallies, quiet, hours = [], [], 0.0
    name = ""
    for seed in range(1, runs + 1):
        data = make(seed)
        name = data.name
        hours += data.pair_hours
        quiet.append(Counter(f"{a.kind}, {a.severity}" for a in found_in(data.events)))
        tally = Tally()
        for plan in PLANS:
            injector = Injector(data, seed)
            plan(injector)
            tally.take(injector.labels, found_in(injector.events, injector.gaps))
        tallies.append(tally)
    return name, tallies, quiet, hours


def show(console: Console, name: str, tallies: list[Tally], quiet: list[Counter[str]], hours: float) -> None:
    table = Table(title=f"{name}: what was put in and found (min - max of {len(tallies)} seeds)")
    for column in ("put in", "labels", "recall", "median delay, s"):
        table.add_column(column, justify="left" if column == "put in" else "right")
    for what in sorted({what for tally in tallies for what in tally.labels}, key=_by_number):
        recalls = [tally.found[what] / tally.labels[what] for tally in tallies if tally.labels[what]]
        delays = [median(tally.delays[what]) for tally in tallies if tally.delays[what]]
        count = sum(tally.labels[what] for tally in tallies)
        table.add_row(what, str(count), span(recalls, 3), span(delays, 1) if delays else "-")
    console.print(table)
    table = Table(title=f"{name}: precision in those runs")
    for column in ("kind", "true", "false", "precision"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in sorted({kind for tally in tallies for kind in (*tally.true, *tally.false)}):
        ratios = [t.true[kind] / (t.true[kind] + t.false[kind]) for t in tallies if t.true[kind] + t.false[kind]]
        true, false = (sum(getattr(tally, name)[kind] for tally in tallies) for name in ("true", "false"))
        table.add_row(kind, str(true), str(false), span(ratios, 3))
    console.print(table)
    total: Counter[str] = sum(quiet, Counter())
    table = Table(title=f"{name}: anomalies of untouched data, {hours:.1f} pair-hours")
    for column in ("kind", "in all", "per pair-hour"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    waking = sum(count for kind, count in total.items() if not kind.endswith("info"))
    for kind, count in [*sorted(total.items()), ("all warnings and criticals", waking)]:
        table.add_row(kind, str(count), f"{count / hours:.3f}")
    console.print(table)


def _by_number(what: str) -> tuple[str, int]:
    number = what.split()[0]
    return (what.lstrip("0123456789"), int(number) if number.isdigit() else 0)


# -- what it costs ----------------------------------------------------------------------------------

Call = tuple[str, tuple[Any, ...]]


def calls_of(events: Sequence[Event]) -> list[Call]:
    """What the pipeline would call on the operator of a single partition."""
    calls: list[Call] = []
    before = 0
    for record in log_of(events):
        if record.kind == "slice":
            for message in wire.decode_slice(record.value):
                if isinstance(message, wire.XT):
                    price, size = float(message.p), float(message.s)
                    calls.append(
                        ("trade", (message.pair, message.t * NS_PER_MS, price, size, message.x, 1, len(calls)))
                    )
                elif isinstance(message, wire.XQ):
                    bid, ask = float(message.bp), float(message.ap)
                    calls.append(("quote", (message.pair, message.t * NS_PER_MS, bid, ask, message.x, 1, len(calls))))
        elif record.kind == "tick" and record.timestamp_ms * NS_PER_MS > before:
            tick = record.timestamp_ms * NS_PER_MS
            calls.append(("tick", (before or tick, tick, decode_tick_value(record.value).fresh, ())))
            before = tick
    return calls


def seconds_of(calls: Sequence[Call], kinds: Sequence[Any]) -> float:
    with mock.patch.object(operator, "DETECTORS", kinds):
        one = operator.Anomalies(0, thresholds(), "")
    methods = {"trade": one.trade, "quote": one.quote, "tick": one.tick}
    bound = [(methods[name], arguments) for name, arguments in calls]
    gc.collect()
    gc.freeze()  # the collector has no business with the calls that are kept here
    begin = time.process_time()
    for method, arguments in bound:
        method(*arguments)
    spent = time.process_time() - begin
    gc.unfreeze()
    return spent


def cost(console: Console, sources: Sequence[Source], runs: int) -> None:
    for data in sources:
        calls = calls_of(data.events)
        trades = [call for call in calls if call[0] != "quote"]
        quotes = [call for call in calls if call[0] != "trade"]
        counts = Counter(name for name, _ in calls)
        table = Table(title=f"{data.name}: µs of CPU time, {counts['trade']:,} trades, {counts['quote']:,} quotes")
        for column in ("detector", "per trade", "per quote"):
            table.add_column(column, justify="left" if column == "detector" else "right")
        kinds: list[tuple[str, Sequence[Any]]] = [("none: keeping the events", ())]
        kinds += [(detector.kind, (detector,)) for detector in DETECTORS]
        kinds.append(("all", DETECTORS))
        base: dict[str, list[float]] = {}
        for name, chosen in kinds:
            row = [name]
            for part, of in (("trade", trades), ("quote", quotes)):
                spent = [1e6 * seconds_of(of, chosen) / max(1, counts[part]) for _ in range(runs)]
                base.setdefault(part, spent)
                if len(chosen) == 1:
                    spent = [max(0.0, each - min(base[part])) for each in spent]
                row.append(span(spent, 2))
            table.add_row(*row)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="seeds of each")
    parser.add_argument("--minutes", type=float, default=60, help="of the simulator's market")
    options = parser.parse_args()
    console = Console(width=110)
    sources = [simulated(1, min(600.0, 60 * options.minutes))]
    if BINANCE.exists():
        real = source("recording", ((frame.recv_ns, frame.data) for frame in recording()))
        sources.append(real)
        name, tallies, quiet, hours = score(lambda _: real, options.runs)
        show(console, name, tallies, quiet[:1], hours / options.runs)
    else:
        console.print("no recording at ../shared/data: only the simulator's market is scored")
    show(console, *score(lambda seed: simulated(seed, 60 * options.minutes), options.runs))
    cost(console, sources, options.runs)


if __name__ == "__main__":
    main()
