"""The whole line on this machine: latency at set rates, events/s at `--speed max`, memory and CPU by process.

Every figure comes from `tapedeck demo`, which also accounts for every event; a run that is not OK is no
figure. The feed, Kafka, PostgreSQL and all processes share this machine's cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.market import write_frames

RATES = (10, 1_000, 5_000)


def demo(*arguments: str) -> dict[str, Any]:
    """The JSON result of one demo; raises SystemExit when it is not OK, but for bars that a short run lacks."""
    command = [sys.executable, "-m", "tapedeck", "demo", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"complaints": ["it failed"]}
    if any(not complaint.startswith("no final bar") for complaint in result["complaints"]):
        raise SystemExit(f"{' '.join(command)} is not OK:\n{done.stderr}")
    return result


def span(values: list[float], digits: int = 0) -> str:
    """min - max of several runs."""
    return f"{min(values):,.{digits}f} - {max(values):,.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of each latency run")
    parser.add_argument("--events", type=int, default=200_000, help="of each throughput run")
    options = parser.parse_args()
    console = Console(width=110)
    latency = Table(title="receive time to seen by a consumer of trades.v1, ms (min - max of the runs)")
    for name in ("events/s", "runs", "p50", "p99"):
        latency.add_column(name, justify="right")
    whole = Table(title=f"{options.events:,} events at --speed max, frames of 20")
    for name in ("runs", "events/s, first received to last stored"):
        whole.add_column(name, justify="right")
    parts = Table(title="by process: CPU s for those events, resident MB")
    for name in ("process", "CPU s", "µs/event", "MB"):
        parts.add_column(name, justify="left" if name == "process" else "right")
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "frames.ndjson"
        for rate in RATES:
            write_frames(frames, rate, options.seconds)
            runs = [
                demo("--frames", str(frames), "--speed", "1")
                for _ in track(range(options.runs), f"{rate} events/s", console=console, transient=True)
            ]
            latency.add_row(
                f"{rate:,}",
                str(len(runs)),
                span([run["p50_ms"] for run in runs], 1),
                span([run["p99_ms"] for run in runs], 1),
            )
        count = write_frames(frames, 2_000, options.events / 2_000, per_frame=20)
        runs = [
            demo("--frames", str(frames), "--speed", "max")
            for _ in track(range(options.runs), "max", console=console, transient=True)
        ]
        whole.add_row(str(len(runs)), span([count / run["line_s"] for run in runs]))
        for name in runs[0]["processes"]:
            used = [run["processes"][name] for run in runs]
            parts.add_row(
                name,
                span([u["cpu_s"] for u in used], 1),
                span([u["cpu_s"] / count * 1e6 for u in used], 1),
                span([u["rss_mb"] for u in used]),
            )
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for table in (latency, whole, parts):
        console.print(table)


if __name__ == "__main__":
    main()
