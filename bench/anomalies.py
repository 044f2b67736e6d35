"""What the detectors find of anomalies put into real and synthetic data, what they find in untouched data, and
what they cost.

Labelled anomalies (see injected) are put into the frames of a feed, the producer's slicer makes a raw log of them and
the pure pipeline runs over it. Two markets: the recording in ../shared/data, where it lies there, and the simulator's.
A label is found if an anomaly of its kind and pair is detected within its time; every other anomaly of that kind is
false, a second one for the same label too.

Volume bursts have a program of their own (see bursts), and so have false alarms: they need days. Of the simulator's
longer market, pairs from two trades a second to one in 50 s, the first seed has all streams, the others trades and
aggregates; what a frames file (`--frames`) brings is judged as well. Whatever is found there is counted, be it false
or the market's own.
"""

import argparse
import gc
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self
from unittest import mock

import msgspec
import orjson
from rich.console import Console
from rich.table import Table

from bench import bursts
from bench.injected import PASSES, SPIKES, Event, Injector, Label, Passes, Source, source
from bench.line import span
from processors.detectors.registry import DETECTORS, thresholds
from processors.operators import anomalies as operator
from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import topics, wire
from schemas.events import NS_PER_MS, NS_PER_S, Anomaly, decode_anomaly
from schemas.frames import Frame, read_frames
from schemas.raw import GapValue, RawRecord, decode_tick_value
from simulator import frame as simulated
from simulator.market import activities, batch, publish
from simulator.pair import Activity
from tests.recordings import BINANCE, recording

STREAMS = ["XT", "XQ", "XA"]
SYMBOLS = ["BTC-USD", "ETH-USD", "SOL-USD", "MATIC-USD", "AVAX-USD"]
LONG_RATES = (2.0, 1.0, 0.5, 0.25, 0.1, 0.0)  # trades/s with a trade at least every 25 s; 0 has no others
IRREGULAR_RATES = (0.3, 0.1, 0.04, 0.02)  # and without
LONG = [Activity(rate) for rate in LONG_RATES] + [Activity(rate, regular=False) for rate in IRREGULAR_RATES]
JUDGED = 8  # of these: the others have no 30 trades in 24 minutes
LONG_SYMBOLS = [f"P{number}-USD" for number in range(len(LONG))]
BEGIN_NS = 1_723_161_240 * NS_PER_S


def frames_of(seed: int, symbols: Sequence[str], rates: Sequence[Activity], hours: float) -> Iterator[simulated.Frame]:
    """The simulator's market for so long."""
    end_ns = round(hours * 3600 * NS_PER_S)
    whole = batch(publish(seed, symbols, BEGIN_NS, rates, seconds=False), BEGIN_NS)
    return takewhile(lambda frame: frame.offset_ns < end_ns, whole)


def market(seed: int, hours: float) -> Iterator[simulated.Frame]:
    return frames_of(seed, SYMBOLS, activities(len(SYMBOLS)), hours)


def received(frames: Iterable[simulated.Frame], kinds: Sequence[str] = STREAMS) -> Iterator[Frame]:
    """What a client of these streams gets of them."""
    for frame in frames:
        events = [event.data for event in frame.events if event.topic and event.topic[0] in kinds]
        if events:
            yield Frame(frame.clock_ns, b"[" + b",".join(events) + b"]")


# -- what is found ----------------------------------------------------------------------------------


def frames_with(events: Iterable[Event]) -> Iterator[Frame]:
    return (Frame(recv_ns, b"[" + orjson.dumps(message) + b"]") for recv_ns, message in events)


def log_of(frames: Iterable[Frame], kinds: Sequence[str] = STREAMS) -> Iterator[RawRecord]:
    return records_of(frames, SlicerSettings(), list(kinds), ["*"])


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


def found_in(records: Iterable[RawRecord]) -> list[Anomaly]:
    """What one pass finds; what is said once for each partition counts once."""
    pipelines: dict[int, Pipeline] = {}
    found: dict[str, Anomaly] = {}
    for record in records:
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


def scored(data: Source, seed: int, passes: Passes = PASSES) -> Tally:
    """Each pass over the market with its anomalies put in."""
    tally = Tally()
    for plans in passes:
        injector = Injector(data, seed)
        for plan in plans:
            plan(injector)
        records = marked(log_of(frames_with(injector.events)), injector.gaps)
        tally.take(injector.labels, found_in(records))
    return tally


def show(console: Console, name: str, tallies: Sequence[Tally]) -> None:
    table = Table(title=f"{name}: what was put in and found (min - max of {len(tallies)} seeds)")
    for column in ("put in", "labels", "found", "recall", "median delay, s"):
        table.add_column(column, justify="left" if column == "put in" else "right")
    for what in sorted({what for tally in tallies for what in tally.labels}, key=_by_number):
        recalls = [tally.found[what] / tally.labels[what] for tally in tallies if tally.labels[what]]
        delays = [median(tally.delays[what]) for tally in tallies if tally.delays[what]]
        count, found = (
            sum(each[what] for each in of) for of in zip(*((t.labels, t.found) for t in tallies), strict=True)
        )
        table.add_row(what, str(count), str(found), span(recalls, 3), span(delays, 1) if delays else "-")
    console.print(table)
    table = Table(title=f"{name}: precision in those runs")
    for column in ("kind", "true", "false", "precision"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in sorted({kind for tally in tallies for kind in (*tally.true, *tally.false)}):
        ratios = [t.true[kind] / (t.true[kind] + t.false[kind]) for t in tallies if t.true[kind] + t.false[kind]]
        true, false = (sum(getattr(tally, name)[kind] for tally in tallies) for name in ("true", "false"))
        table.add_row(kind, str(true), str(false), span(ratios, 3))
    console.print(table)


def _by_number(what: str) -> tuple[str, int]:
    number = what.split()[0]
    return (what.lstrip("0123456789"), int(number) if number.isdigit() else 0)


# -- untouched data ---------------------------------------------------------------------------------


class Untouched(NamedTuple):
    """What was found in data nobody touched, and how many days of it there are of each pair."""

    found: list[Anomaly]
    days: dict[str, float]

    @classmethod
    def of(cls, frames: Iterable[Frame], kinds: Sequence[str] = STREAMS) -> Self:
        """Its pairs are those that are in it, from its first frame to its last."""
        first = last = 0
        pairs: set[str] = set()

        def seen() -> Iterator[Frame]:
            nonlocal first, last
            for frame in frames:
                pairs.update(message["pair"] for message in orjson.loads(frame.data))
                first, last = first or frame.recv_ns, frame.recv_ns
                yield frame

        found = found_in(log_of(seen(), kinds))
        return cls(found, {wire.symbol_of(pair): (last - first) / 86_400 / NS_PER_S for pair in pairs})


def show_untouched(console: Console, name: str, several: Sequence[Untouched]) -> None:
    days: Counter[str] = Counter()
    kinds: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in several:
        days.update(one.days)  # type: ignore[arg-type]
        for anomaly in one.found:
            kinds[anomaly.kind, anomaly.severity][anomaly.symbol or "*"] += 1
    total = days.total()
    table = Table(title=f"{name}: anomalies of untouched data, {total:.2f} pair-days")
    for column in ("kind", "severity", "in all", "per pair and day", "of the worst pair"):
        table.add_column(column, justify="left" if column in ("kind", "severity") else "right")
    for (kind, severity), counts in sorted(kinds.items()):
        worst, pair = max((count / days.get(pair, total), pair) for pair, count in counts.items())
        count = counts.total()
        table.add_row(kind, severity, str(count), f"{count / total:.2f}", f"{worst:.2f} ({pair})")
    console.print(table)


# -- what it costs ----------------------------------------------------------------------------------

Call = tuple[str, tuple[Any, ...]]


def calls_of(events: Sequence[Event]) -> list[Call]:
    """What the pipeline would call on the operator of a single partition."""
    calls: list[Call] = []
    before = 0
    for record in log_of(frames_with(events)):
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


# -- all of it, a process for each market -----------------------------------------------------------


def of_recording(seed: int) -> Tally:
    return scored(source("recording", recording()), seed)


def of_market(seed: int, hours: float) -> Tally:
    return scored(source("simulator", received(market(seed, hours))), seed)


def of_longer_market(seed: int, hours: float) -> Tally:
    frames = frames_of(seed, LONG_SYMBOLS[:JUDGED], LONG[:JUDGED], hours)
    return scored(source("longer", received(frames, ["XT"])), seed, SPIKES)


def in_market(seed: int, hours: float) -> Untouched:
    return Untouched.of(received(market(seed, hours)))


def in_longer_market(seed: int, hours: float) -> Untouched:
    kinds = STREAMS if seed == 1 else ["XT", "XA"]
    return Untouched.of(received(frames_of(seed, LONG_SYMBOLS, LONG, hours), kinds), kinds)


def in_file(path: Path) -> Untouched:
    return Untouched.of(read_frames(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="seeds of each")
    parser.add_argument("--minutes", type=float, default=20, help="of the simulator's market with anomalies put in")
    parser.add_argument("--hours", type=float, default=19.2, help="of the longer market that is left alone, each seed")
    parser.add_argument("--burst-hours", type=float, default=24, help="of the market with bursts of volume")
    parser.add_argument("--frames", type=Path, nargs="*", default=[], help="recordings that are judged as they are")
    parser.add_argument("--quick", action="store_true", help="one seed, half the minutes, an eighth of the hours")
    options = parser.parse_args()
    runs, half, eighth = (1, 1 / 2, 1 / 8) if options.quick else (options.runs, 1.0, 1.0)
    seeds = range(1, runs + 1)
    hours = [options.minutes / 60 * half] * runs
    console = Console(width=120)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        longer = pool.map(in_longer_market, seeds, [options.hours * eighth] * runs)
        rows = pool.submit(bursts.rows, 1, options.burst_hours * eighth)
        scores = [
            ("simulator", pool.map(of_market, seeds, hours)),
            ("simulator, longer market, trades", pool.map(of_longer_market, seeds, [6 * each for each in hours])),
        ]
        alone = [("simulator", pool.map(in_market, seeds, hours)), ("simulator, longer market", longer)]
        if BINANCE.exists():
            scores.insert(0, ("recording", pool.map(of_recording, seeds)))
            alone.insert(0, ("recording", iter([Untouched.of(recording())])))
        else:
            console.print("no recording at ../shared/data: only the simulator's market is scored")
        alone += [(path.name, pool.map(in_file, [path])) for path in options.frames]
        for name, tallies in scores:
            show(console, name, list(tallies))
        bursts.show(console, rows.result(), options.burst_hours * eighth)
        for name, found in alone:
            show_untouched(console, name, list(found))
    sources = [source("simulator", received(market(1, min(hours[0], 1 / 6))))]
    if BINANCE.exists():
        sources.append(source("recording", recording()))
    cost(console, sources, runs)


if __name__ == "__main__":
    main()
