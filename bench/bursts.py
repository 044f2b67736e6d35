"""Bursts of volume put into the simulator's market, by size and by how much a pair trades, and what could be found of
them at all.

A burst is a minute whose trades are together so many times the pair's usual minute, the median of those with trades.
It is found if the detector says so until 20 s after its end; all else that it says is false. Precision is that of one
size beside all that is false of the pair.

The oracle knows the pair's usual minute and every label. It says a burst where the volume of a minute exceeds the
threshold that finds most at a precision of 0.95; once with all trades, once without the largest of each ten seconds.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from random import Random
from statistics import median
from typing import NamedTuple
from unittest import mock

import orjson
from rich.console import Console
from rich.table import Table

from processors.detectors.registry import thresholds
from processors.detectors.volume_spike import OF_A_MINUTE, WINDOW_NS, VolumeSpike
from processors.operators import anomalies as operator
from schemas.events import MINUTE_NS, NS_PER_S
from simulator.market import publish
from simulator.pair import Activity

RATES = (6.0, 3.0, 2.0, 1.0, 0.5, 0.1)  # trades/s
TIMES = (3, 5, 10, 30)
EVERY_NS = 20 * MINUTE_NS  # a burst of each pair: more would be its usual
FIRST_NS = 30 * MINUTE_NS
FOUND_NS = MINUTE_NS + 20 * NS_PER_S
BEGIN_NS = 1_723_161_240 * NS_PER_S
PRECISION = 0.95


class Trade(NamedTuple):
    ns: int  # received
    price: float
    size: float


class Burst(NamedTuple):
    ns: int
    times: int


def trades_of(seed: int, hours: float) -> dict[str, list[Trade]]:
    found: dict[str, list[Trade]] = {f"{rate:g}": [] for rate in RATES}
    end_ns = BEGIN_NS + hours * 3600 * NS_PER_S
    for ns, event in publish(seed, list(found), BEGIN_NS, [Activity(rate) for rate in RATES], seconds=False):
        if ns > end_ns:
            break
        if event.topic and event.topic[0] == "XT":
            message = orjson.loads(event.data)
            found[event.topic[1]].append(Trade(ns, message["p"], message["s"]))
    return found


def minutes_of(trades: Sequence[Trade], trimmed: bool) -> dict[int, float]:
    """The volume of the minute that ends with each window."""
    sizes: dict[int, list[float]] = defaultdict(list)
    for trade in trades:
        sizes[trade.ns // WINDOW_NS].append(trade.size)
    windows = {window: sum(of) - trimmed * max(of) for window, of in sizes.items()}
    ends = range(min(windows) + OF_A_MINUTE, max(windows) + 1)
    return {end: sum(windows.get(end - back, 0.0) for back in range(OF_A_MINUTE)) for end in ends}


def put_in(trades: Sequence[Trade], rng: Random) -> tuple[list[Trade], list[Burst]]:
    """Every twenty minutes one."""
    usual = median(volume for volume in minutes_of(trades, trimmed=False).values() if volume)
    changed, bursts = list(trades), list[Burst]()
    due = trades[0].ns + FIRST_NS
    while due < trades[-1].ns - FOUND_NS:
        ns = due + rng.randrange(EVERY_NS // 3)
        places = range(bisect_left(trades, (ns,)), bisect_left(trades, (ns + MINUTE_NS,)))
        if places:
            burst = Burst(ns, TIMES[len(bursts) % len(TIMES)])
            bursts.append(burst)
            for place in places:
                changed[place] = trades[place]._replace(size=burst.times * usual / len(places))
        due += EVERY_NS
    return changed, bursts


def detected(trades: Sequence[Trade]) -> list[int]:
    """When the detector says so: at ticks of a second."""
    with mock.patch.object(operator, "DETECTORS", (VolumeSpike,)):
        anomalies = operator.Anomalies(0, thresholds(), "")
    said: list[int] = []
    last = trades[0].ns // NS_PER_S * NS_PER_S
    for n, trade in enumerate(trades):
        tick = trade.ns // NS_PER_S * NS_PER_S
        if tick > last:
            said += [anomaly.detected for anomaly in anomalies.tick(last, tick, ["XT"], ())]
            last = tick
        anomalies.trade("PAIR", trade.ns, trade.price, trade.size, 1, 1, n)
    return said


class Score(NamedTuple):
    labels: int
    recall: float
    precision: float


def judged(said: Sequence[int], bursts: Sequence[Burst]) -> dict[int, Score]:
    """By size."""
    hit: dict[Burst, bool] = dict.fromkeys(bursts, False)
    false = 0
    for ns in said:
        near = [burst for burst in bursts if burst.ns <= ns <= burst.ns + FOUND_NS]
        if near:
            hit[near[0]] = True
        else:
            false += 1
    scores = {}
    for times in TIMES:
        found = [hit[burst] for burst in bursts if burst.times == times]
        true = sum(found)
        scores[times] = Score(len(found), true / max(1, len(found)), true / max(1, true + false))
    return scores


def oracle(minutes: dict[int, float], bursts: Sequence[Burst]) -> dict[int, float]:
    """The best recall of each size."""
    best = dict.fromkeys(TIMES, 0.0)
    peaks = sorted({max(minutes.get(end, 0.0) for end in ends_of(burst)) for burst in bursts})
    for threshold in peaks:
        hot = [end for end, volume in minutes.items() if volume >= threshold]
        said = [
            (end + 1) * WINDOW_NS for end, before in zip(hot, [0, *hot], strict=False) if end > before + OF_A_MINUTE
        ]
        for times, score in judged(said, bursts).items():
            if score.precision >= PRECISION:
                best[times] = max(best[times], score.recall)
    return best


def ends_of(burst: Burst) -> range:
    return range(burst.ns // WINDOW_NS, (burst.ns + FOUND_NS) // WINDOW_NS)


class Row(NamedTuple):
    rate: str
    scores: dict[int, Score]
    oracles: list[dict[int, float]]
    alone: int  # said of the same trades without a burst


def rows(seed: int, hours: float) -> list[Row]:
    found = []
    for rate, trades in trades_of(seed, hours).items():
        changed, bursts = put_in(trades, Random(seed))
        scores = judged(detected(changed), bursts)
        oracles = [oracle(minutes_of(changed, trimmed), bursts) for trimmed in (False, True)]
        found.append(Row(rate, scores, oracles, len(detected(trades))))
    return found


def show(console: Console, found: Sequence[Row], hours: float) -> None:
    table = Table(title=f"bursts of a minute, {hours:g} h of each pair (the oracle's recall at a precision of 0.95)")
    columns = ("trades/s", "times the usual", "labels", "recall", "precision", "oracle", "without the largest")
    for column in (*columns, "untouched: a day"):
        table.add_column(column, justify="right")
    for rate, scores, oracles, alone in found:
        for times, score in scores.items():
            best = [f"{each[times]:.2f}" for each in oracles]
            numbers = (str(score.labels), f"{score.recall:.2f}", f"{score.precision:.2f}")
            table.add_row(rate, str(times), *numbers, *best, f"{24 * alone / hours:.1f}" if times == TIMES[0] else "")
        table.add_section()
    console.print(table)
