"""The producer beside its peers, in one run: events/s onto Kafka, CPU per event, latency, memory.

Client on one core, Kafka and the feed on the other; every frame is encoded beforehand, so the feed is never the
limit. Ours includes the journal, ticks, identities and idempotent acks=all; the peers send each event as a record
of its own with acks=all. Clock: first event handed to the client's code until all are acknowledged.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.line import span
from tapedeck.embedded import prepare_kafka
from tapedeck.embedded.ports import free_ports

MODES = ("tapedeck", "massive-aiokafka", "massive-confluent", "ws-aiokafka", "ws-confluent", "ws-null")
BASE = "massive-aiokafka"
EVENTS = {1: 200_000, 20: 600_000}
RATES = (1_000, 10_000)
LATENCY_S, PAIRS = 30, 500

Run = dict[str, float]


def pinned(core: int) -> dict[str, object]:
    """Arguments of a child that runs on this core only."""
    cores = sorted(os.sched_getaffinity(0))
    return {"preexec_fn": lambda: psutil.Process().cpu_affinity([cores[core % len(cores)]])}


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """host:port of a Kafka with a topic for the peers."""
    with tempfile.TemporaryDirectory() as folder:
        service = prepare_kafka(Path(folder))
        options = {**service.options, **pinned(0)}
        process = subprocess.Popen(service.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        try:
            if not service.ready(60):
                raise SystemExit(f"Kafka does not start:\n{service.log_tail()}")
            yield service.addresses["KAFKA_BOOTSTRAP_SERVERS"]
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def feed(*arguments: object) -> Iterator[int]:
    """The port of a feed that sends everything to whoever subscribes."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "bench.saturate", str(port), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, **pinned(0))  # type: ignore[call-overload]
    try:
        process.stdout.readline()
        yield port
    finally:
        process.kill()
        process.wait()


def measure(mode: str, port: int, kafka: str, topic: str, events: int, *more: str) -> Run:
    """One run of a client."""
    command = [sys.executable, "-m", "bench.feed_client", mode, "--port", str(port), "--broker", kafka]
    command += ["--topic", topic, "--events", str(events), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **pinned(1))  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run


def make_topic(kafka: str, name: str) -> None:
    """Eight partitions, as ours."""
    import asyncio

    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        await admin.create_topics([NewTopic(name, 8, 1)])
        await admin.close()

    asyncio.run(make())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=110)
    speed = Table(title="onto Kafka, one core (min - max of the runs)")
    for name in ("events a frame", "client", "k events/s", f"x {BASE}", "CPU µs/event", "MB"):
        speed.add_column(name, justify="left" if name == "client" else "right")
    latency = Table(title=f"tapedeck, socket to acknowledged by Kafka, ms, {PAIRS} pairs, {LATENCY_S} s")
    for name in ("events/s", "events a frame", "p50", "p99", "MB"):
        latency.add_column(name, justify="right")
    number = 0
    with broker() as kafka:
        make_topic(kafka, "peers")
        for per_frame, events in EVENTS.items():
            runs: defaultdict[str, list[Run]] = defaultdict(list)
            with feed("--events", events, "--per-frame", per_frame) as port:
                order = [mode for _ in range(options.runs) for mode in MODES]
                for mode in track(order, f"frames of {per_frame}", console=console, transient=True):
                    number += 1
                    topic = f"run{number}." if mode == "tapedeck" else "peers"
                    runs[mode].append(measure(mode, port, kafka, topic, events))
            base = [run["events_per_s"] for run in runs[BASE]]
            for mode in MODES:
                rates = [run["events_per_s"] for run in runs[mode]]
                speed.add_row(
                    str(per_frame),
                    mode,
                    span([rate / 1000 for rate in rates], 1),
                    span([rate / other for rate, other in zip(rates, base, strict=True)], 1),
                    span([run["cpu_us"] for run in runs[mode]], 1),
                    span([run["rss_mb"] for run in runs[mode]]),
                )
        for rate in RATES:
            for per_frame in (1, 20):
                events = rate * LATENCY_S
                arguments = ("--events", events, "--per-frame", per_frame, "--rate", rate, "--pairs", PAIRS)
                found = []
                for _ in track(range(options.runs), f"{rate} events/s", console=console, transient=True):
                    with feed(*arguments) as port:
                        number += 1
                        found.append(measure("tapedeck", port, kafka, f"run{number}.", events, "--latency"))
                latency.add_row(
                    f"{rate:,}",
                    str(per_frame),
                    span([run["p50_ms"] for run in found], 1),
                    span([run["p99_ms"] for run in found], 1),
                    span([run["rss_mb"] for run in found]),
                )
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    console.print(speed)
    console.print(latency)


if __name__ == "__main__":
    main()
