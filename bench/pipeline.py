"""The pure pipeline's events/s on one core, beside a bare loop that makes float bars with no guarantees.

The same raw records go through both, in turn, several times. The bare loop (orjson, dicts, floats) is what
a quick script would do: no identities, no repeats, no lateness, no decimals, no outputs for trades.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from bench.line import span
from bench.market import write_frames
from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas.frames import read_frames
from schemas.raw import RawRecord


def ours(records: list[RawRecord]) -> int:
    pipelines: dict[int, Pipeline] = {}
    for record in records:
        pipeline = pipelines.get(record.partition)
        if pipeline is None:
            pipeline = pipelines[record.partition] = Pipeline(record.partition, PipelineSettings())
        pipeline.process(record)
    return sum(record.events for record in records if record.kind == "slice")


def bare(records: list[RawRecord]) -> int:
    bars: dict[tuple[str, int], list[float]] = {}
    count = 0
    for record in records:
        if record.kind != "slice":
            continue
        for event in orjson.loads(record.value):
            count += 1
            if event["ev"] != "XT":
                continue
            key, price, size = (event["pair"], event["t"] // 60_000), event["p"], event["s"]
            bar = bars.get(key)
            if bar is None:
                bars[key] = [price, price, price, price, size, price * size, 1]
                continue
            bar[1], bar[2], bar[3] = max(bar[1], price), min(bar[2], price), price
            bar[4] += size
            bar[5] += price * size
            bar[6] += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--events", type=int, default=200_000)
    options = parser.parse_args()
    table = Table(title=f"{options.events:,} events, one core (min - max of {options.runs} runs)")
    for name in ("what", "events a slice", "k events/s of CPU time"):
        table.add_column(name, justify="left" if name == "what" else "right")
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "frames.ndjson"
        for per_frame in (1, 100):
            write_frames(frames, 5_000, options.events / 5_000, per_frame)
            slicer = SlicerSettings(linger_ns=0 if per_frame == 1 else 20_000_000)
            records = list(records_of(read_frames(frames), slicer, ["XT", "XQ", "XA"], ["*"]))
            slices = [record.events for record in records if record.kind == "slice"]
            rates: dict[str, list[float]] = {"pipeline": [], "bare loop": []}
            for _ in range(options.runs):
                work: tuple[tuple[str, Callable[[list[RawRecord]], int]], ...]
                work = (("pipeline", ours), ("bare loop", bare))
                for name, run in work:
                    begin = time.process_time()
                    count = run(records)
                    rates[name].append(count / (time.process_time() - begin) / 1000)
            for name, values in rates.items():
                table.add_row(name, f"{sum(slices) / len(slices):.1f}", span(values))
    Console().print(table)


if __name__ == "__main__":
    main()
