"""The processor beside its peers: events/s on one core with the bars checked, what each operator costs, recovery,
memory, latency.

One program at a time on one core; the broker, and whoever measures, on the other. Where somebody else had a part of the
core, the rates by CPU time are the ones to read. `--only` takes some of: speed, costs, recovery, memory, latency.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench import costs, recovery
from bench.producer import broker
from bench.speed import (
    BARS_ONLY,
    CRC32,
    PEERS_ALL,
    SINGLE,
    CannotBeHad,
    Input,
    Peer,
    Run,
    input_of,
    load_peers,
    ours,
    peer,
)
from bench.stand import Stand, on_core
from bench.tape import Tape
from producers.slicer import SlicerSettings

PARTS = ("speed", "costs", "recovery", "memory", "latency")
SLOW_SHARE = 5  # of the tape for programs so slow that the whole would take minutes


class Scale(NamedTuple):
    """How much of everything. A tape of fewer events is shorter, not thinner: as many fall between two ticks, and the
    slices stay as large."""

    events: int = 1_000_000
    minutes: int = 60
    single: int = 200_000
    runs: int = 3
    backlog: int = 10_000_000
    live_s: int = 60
    latency_s: int = 120


QUICK = Scale(100_000, 6, 20_000, 1, 400_000, 10, 40)


def span(values: list[float | None], unit: float = 1, digits: int = 0) -> str:
    """min - max of what there is."""
    found = [value / unit for value in values if value is not None]
    if not found:
        return "-"
    low, high = f"{min(found):,.{digits}f}", f"{max(found):,.{digits}f}"
    return low if low == high else f"{low} - {high}"


def _digits(values: list[float | None]) -> int:
    return 0 if min((v for v in values if v), default=0) >= 20_000 else 1


class Speeds:
    """Runs in the order in which they are made, shown as one row a program and input."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._runs: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
        self._paused: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
        self._missing: dict[str, str] = {}

    def add(self, name: str, what: str, run: Run, paused: bool) -> None:
        (self._paused if paused else self._runs)[name, what].append(run)
        rate = f"{run.rate:,.0f}/s, {run.cpu_rate:,.0f} a CPU s" if run.rate and run.cpu_rate else run.note
        more = " (paused)" if paused else ""
        right = f"{run.right} of {run.wanted} bars"
        self._console.log(f"{name}, {what}{more}: {rate}, {right}, others {run.used.others:.0%}")

    def lacks(self, name: str, why: str) -> None:
        self._missing[name] = why
        self._console.log(f"{name}: cannot be had: {why}")

    def table(self) -> Table:
        table = Table(title="one-minute bars on one core; k events/s (min - max of the runs)")
        table.add_column("program")
        table.add_column("input")
        for name in ("all", "2nd half", "a CPU s", "2nd half", "CPU s", "MB", "right bars", "paused", "others"):
            table.add_column(name, justify="right")
        for (name, what), runs in self._runs.items():
            paused = self._paused[name, what]
            rates = [[getattr(r, field) for r in runs] for field in ("rate", "warm", "cpu_rate", "cpu_warm")]
            notes = sorted({run.note for run in runs if run.note})
            table.add_row(
                name + "".join(f"\n({note})" for note in notes),
                what,
                *(span(values, 1000, _digits(values)) for values in rates),
                span([run.used.cpu_s for run in runs], digits=1),
                span([run.used.peak_mb for run in runs]),
                f"{span([run.right for run in runs])} of {runs[0].wanted:,}",
                span([run.right for run in paused]),
                span([run.used.others * 100 for run in runs]) + " %",
            )
        for name, why in self._missing.items():
            table.add_row(name, f"cannot be had: {why}")
        return table


async def speed(stand: Stand, folder: Path, console: Console, scale: Scale, names: set[str]) -> None:
    """Ours and the peers in turn, `runs` times, and once more on a backlog with pauses."""
    speeds = Speeds(console)
    wants: Callable[[str], bool] = lambda name: not names or any(part in name.lower() for part in names)  # noqa: E731
    tape = Tape(scale.events, scale.minutes)
    console.log(f"making the tapes: {scale.minutes} minutes of {len(tape.pairs)} pairs, a bar of each")
    trades = input_of(tape, SlicerSettings())
    slow = Tape(max(10_000, scale.events // SLOW_SHARE), scale.minutes)
    slow_input = input_of(slow, SlicerSettings())
    if wants("tapedeck"):
        rows: list[tuple[str, str, Input, list[str] | None]] = []
        short = max(2, scale.events // 300_000)
        busy = input_of(Tape(scale.events, short), SlicerSettings())
        for minutes, ordinary in ((scale.minutes, trades), (short, busy)):
            mixed = input_of(Tape(scale.events, minutes, quotes=3), SlicerSettings())
            market = f"{scale.events / minutes / 60:,.0f} events/s, slices of"
            rows += [
                ("tapedeck, bars alone", f"{market} {ordinary.per_slice:.0f}", ordinary, BARS_ONLY),
                ("tapedeck, whole chain", f"{market} {ordinary.per_slice:.0f}", ordinary, None),
                ("tapedeck, whole chain", f"1 trade: 3 quotes, {market} {mixed.per_slice:.0f}", mixed, None),
            ]
        single = input_of(Tape(scale.single, scale.minutes), SINGLE)
        rows.append(("tapedeck, whole chain", "slices of 1", single, None))
        number = 0
        for round_ in range(scale.runs + 1):
            for name, what, tape_input, outputs in rows:
                paused = round_ == scale.runs
                number += 1
                run = await ours(stand, folder, f"ours{number}.", tape_input, outputs, paused)
                speeds.add(name, what, run, paused)
    sources = {"single": "single", "arrays": "arrays", CRC32: "arrays-crc32"}
    await load_peers(stand, tape, sources)
    slow_sources = {"single": "slow-single"}
    await load_peers(stand, slow, slow_sources)
    await stand.load_raw("slices.", trades.records)
    sources["slices"] = "slices.raw.crypto.v1"
    commands: list[tuple[Peer, list[str]]] = []
    for each in PEERS_ALL:
        if wants(each.name.lower()):
            try:
                commands.append((each, await asyncio.to_thread(each.command)))
            except CannotBeHad as error:
                speeds.lacks(each.name, str(error))
    number = 0
    for round_ in range(scale.runs + 1):
        for each, command in commands:
            for shape in each.shapes:
                paused = round_ == scale.runs
                number += 1
                source = (slow_sources if each.slow else sources)[shape]
                bars, events = (slow_input.bars, slow.total) if each.slow else (trades.bars, tape.total)
                run = await peer(stand, folder, command, f"peer{number}", source, shape, events, bars, paused)
                speeds.add(each.name, shape if not each.slow else f"{shape}, {events:,}", run, paused)
    console.print(speeds.table())


async def main_async(options: argparse.Namespace, folder: Path, address: str) -> None:
    console = Console(width=150)
    scale = QUICK if options.quick else Scale()
    if options.runs:
        scale = scale._replace(runs=options.runs)
    if options.events:
        minutes = max(1, Scale().minutes * options.events // Scale().events)
        scale = scale._replace(events=options.events, minutes=minutes, single=max(10_000, options.events // 5))
    parts = options.only.split(",")
    stand = Stand(address)
    await stand.start()
    try:
        if "speed" in parts:
            await speed(stand, folder, console, scale, set(filter(None, options.programs.lower().split(","))))
        if "costs" in parts:
            console.print(await costs.table(stand, folder, scale.events // 2, scale.minutes // 2, scale.runs))
        if "recovery" in parts:
            sizes = (scale.events // 4, scale.events)
            console.print(await recovery.recover(stand, folder, scale.runs, sizes))
        if "latency" in parts:
            console.print(await recovery.latency(stand, folder, 1_000, scale.latency_s))
        if "memory" in parts:
            console.print(await recovery.memory(stand, folder, scale.backlog, scale.live_s))
        load = os.getloadavg()[0]
        console.print(f"{os.cpu_count()} cores, load {load:.1f}")
    finally:
        await stand.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, help="of each program; default: 3")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, the bars too, once")
    parser.add_argument("--events", type=int, help="of the tape; default: 1,000,000")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma separated")
    parser.add_argument("--programs", default="", help="of the part speed only those with these words in their names")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the broker with us
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics come and go here
    with broker() as address, tempfile.TemporaryDirectory() as folder, on_core(0):
        asyncio.run(main_async(options, Path(folder), address))


if __name__ == "__main__":
    main()
