"""The archive and the replay: rows/s into Parquet, bytes per trade there, events/s from there onto topics.

Each is a process of its own on one core, Kafka on the other, timed whole: start, connecting and making topics included.
What those take of a replay is that of one of the tape's first second.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.line import span
from bench.producer import broker, pinned
from bench.tape import BEGIN_MS, Tape
from producers.slicer import SlicerSettings
from schemas import topics
from schemas.raw import RawRecord
from tapedeck import kafka as clients
from tapedeck.archive import Archive
from tapedeck.settings import Settings
from tapedeck.spans import parts_of

EVENTS = 1_000_000
END_MS = 2_000_000_000_000  # behind all of it
PATIENCE_S = 300


class Kind(NamedTuple):
    """How a tape comes: events/s and events a frame, and the minutes they are of, decide how many are in a record."""

    name: str
    rate: int
    per_frame: int
    minutes: int


KINDS = (Kind("busy", 100_000, 20, 60), Kind("one by one", 1_000, 1, 240))
Run = dict[str, float]


def measured(arguments: list[str], environment: dict[str, str], folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "tapedeck", *arguments],
            env=os.environ | environment,
            cwd=folder,
            stdout=file,
            stderr=file,
            **pinned(1),  # type: ignore[arg-type]
        )
    return child, log


async def load(settings: Settings, records: list[RawRecord]) -> None:
    await clients.prepare(settings)
    publisher = clients.Publisher(settings)
    await publisher.start()
    name = settings.topic_prefix + topics.RAW.name
    for first in range(0, len(records), 20_000):
        await publisher.publish(
            clients.Message(name, r.partition, None, r.value, r.timestamp_ms, r.headers())
            for r in records[first : first + 20_000]
        )
    await publisher.stop()


def replayed(prefix: str, until_ms: int, environment: dict[str, str], folder: Path) -> tuple[float, float, int]:
    """Wall and CPU seconds of a replay from the tape's beginning, and its records."""
    began = time.monotonic()
    stretch = ["--from", str(BEGIN_MS), "--to", str(until_ms), "--prefix", prefix, "--source", "archive"]
    player, log = measured(["replay", *stretch], environment, folder)
    _, status, usage = os.wait4(player.pid, 0)
    took, said = time.monotonic() - began, re.search(r"([\d,]+) records onto", log.read_text())
    if status or not said:
        raise SystemExit(log.read_text())
    return took, usage.ru_utime + usage.ru_stime, int(said[1].replace(",", ""))


def run(kafka: str, records: list[RawRecord], number: int, folder: Path) -> Run:
    where = folder / f"archive{number}"
    settings = Settings(
        _env_file=None,
        kafka_bootstrap_servers=kafka,
        topic_prefix=f"run{number}.",
        archive_url=SecretStr(str(where)),
        connect_timeout_s=60,
    )
    environment = {"KAFKA_BOOTSTRAP_SERVERS": kafka, "TOPIC_PREFIX": settings.topic_prefix, "HTTP_PORT": "0"}
    environment |= {"ARCHIVE_URL": str(where), "ARCHIVE_SECONDS": "5"}
    asyncio.run(load(settings, records))
    topic = settings.topic_prefix + topics.RAW.name

    began = time.monotonic()
    sink, log = measured(["sink", "archive"], environment, folder)
    process = psutil.Process(sink.pid)
    archive, wrote = Archive(settings), began
    held: set[object] = set()
    count = 0
    while count < len(records):
        time.sleep(0.1)
        if sink.poll() is not None or time.monotonic() > began + PATIENCE_S:
            raise SystemExit(f"the sink does not get through:\n{log.read_text()}")
        spans = set(archive.spans(topic))
        if spans != held:
            held, wrote = spans, time.monotonic()
        # Each offset once: a merged file stands beside those it was made of for a moment.
        parts = [parts_of(span for span in spans if span.partition == place) for place in range(topics.PARTITIONS)]
        count = sum(part.end - part.first for each in parts for part in each)
    times = process.cpu_times()
    # A sink that has read everything waits for more before its last files: that is no work of its own.
    found = {"archive_s": wrote - began, "archive_us": (times.user + times.system) / EVENTS * 1e6}
    sink.terminate()
    sink.wait()
    found["small_bytes"] = sum(archive.sizes(topic).values()) / EVENTS
    compact, log = measured(["archive", "compact"], environment, folder)
    if compact.wait():
        raise SystemExit(log.read_text())
    found["bytes"] = sum(archive.sizes(topic).values()) / EVENTS

    found["start_s"], _, _ = replayed(f"start{number}.", records[0].timestamp_ms + 1000, environment, folder)
    found["replay_s"], cpu_s, count = replayed(f"again{number}.", END_MS, environment, folder)
    found["replay_us"] = cpu_s / EVENTS * 1e6
    if count != len(records):
        raise SystemExit(f"{count} of {len(records)} records were replayed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=160)
    table = Table(title=f"archive and replay, one core (min - max of {options.runs} runs)")
    for name in ("tape", "events", "in a record", "archived k/s", "CPU µs/event", "bytes/event", "merged"):
        table.add_column(name, justify="right")
    for name in ("replayed k/s", "CPU µs/event", "start s", "k/s after it"):
        table.add_column(name, justify="right")
    number = 0
    with tempfile.TemporaryDirectory() as folder, broker() as kafka:
        for kind in KINDS:
            tape = Tape(EVENTS, kind.minutes)
            records = list(tape.records(SlicerSettings(), kind.rate, kind.per_frame))
            runs: defaultdict[str, list[float]] = defaultdict(list)
            for _ in range(options.runs):
                number += 1
                for name, value in run(kafka, records, number, Path(folder)).items():
                    runs[name].append(value)
            table.add_row(
                kind.name,
                f"{EVENTS:,}",
                f"{EVENTS / len(records):.1f}",
                span([EVENTS / s / 1000 for s in runs["archive_s"]]),
                span(runs["archive_us"], 1),
                span(runs["small_bytes"], 1),
                span(runs["bytes"], 1),
                span([EVENTS / s / 1000 for s in runs["replay_s"]]),
                span(runs["replay_us"], 1),
                span(runs["start_s"], 1),
                span([EVENTS / (s - start) / 1000 for s, start in zip(runs["replay_s"], runs["start_s"], strict=True)]),
            )
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
