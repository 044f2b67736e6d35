"""The worker when it dies, when much is open, and when a bar is due: recovery, memory, latency."""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from rich.table import Table

from bench.line import span
from bench.speed import ALL_OUTPUTS, Worker, input_of
from bench.stand import Stand, until
from bench.tape import BEGIN_MS, Tape
from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from producers.slicer import SlicerSettings
from schemas import topics
from schemas.partition import partition_of
from schemas.raw import RawRecord
from tapedeck import kafka as clients

PATIENCE_S = 600
STEADY_S = 2.0


def message(prefix: str, record: RawRecord) -> clients.Message:
    name = prefix + topics.RAW.name
    return clients.Message(name, record.partition, None, record.value, record.timestamp_ms, record.headers())


async def steady(stand: Stand, worker: Worker, names: list[str]) -> int:
    """Waits until it has nothing more to say; how many records that made."""
    count, since = 0, time.monotonic()
    deadline = since + PATIENCE_S
    while count == 0 or time.monotonic() < since + STEADY_S:
        worker.alive()
        if time.monotonic() > deadline:
            raise SystemExit(f"the worker is not done after {PATIENCE_S} s")
        now = await stand.count(names)
        if now != count:
            count, since = now, time.monotonic()
        await asyncio.sleep(0.05)
    return count


# -- recovery ------------------------------------------------------------------------------------------


async def recover(stand: Stand, folder: Path, runs: int, sizes: tuple[int, ...]) -> Table:
    """Killed when all is acknowledged and started at once, while the log goes on."""
    table = Table(title=f"recovery: kill -9, started again at once (min - max of {runs} runs)")
    for name in (
        "events in the horizon",
        "kill to first new output, s",
        "rebuild of a partition, mean s",
        "s per million",
    ):
        table.add_column(name, justify="right")
    memory_ms = Pipeline(0, PipelineSettings()).memory_ns // 10**6
    for size in sizes:
        tape = input_of(Tape(size), SlicerSettings())
        cut = len(tape.records) * 4 // 5
        begin_ms = tape.records[cut - 1].timestamp_ms - memory_ms
        held = sum(r.events for r in tape.records[:cut] if r.kind == "slice" and r.timestamp_ms >= begin_ms)
        found: list[tuple[float, float]] = []
        for run in range(runs):
            prefix = f"recover{size}-{run}."
            names = [prefix + name for name in ALL_OUTPUTS]
            await stand.load_raw(prefix, tape.records[:cut])
            worker = Worker(stand, prefix, folder, worker_id="one")
            before = await steady(stand, worker, names)
            worker.child.kill()
            killed = time.monotonic()
            worker.child.end()
            worker = Worker(stand, prefix, folder, worker_id="one")
            await stand.load(message(prefix, record) for record in tape.records[cut : cut + 2_000])

            async def more(names: list[str] = names, before: int = before) -> bool:
                return await stand.count(names) > before

            if not await until(more, PATIENCE_S, 0.01):
                raise SystemExit("the worker did not recover")
            whole = time.monotonic() - killed
            await steady(stand, worker, names)
            metrics = await asyncio.to_thread(worker.metrics)
            worker.child.end()
            name = "tapedeck_processor_rebuild_seconds"
            found.append((whole, metrics[f"{name}_sum"] / max(1, metrics[f"{name}_count"])))
            await stand.drop(prefix)
        table.add_row(
            f"{held:,}",
            span([whole for whole, _ in found], 1),
            span([rebuilding for _, rebuilding in found], 1),
            span([whole / held * 1e6 for whole, _ in found], 1),
        )
    return table


# -- latency -------------------------------------------------------------------------------------------


async def latency(stand: Stand, folder: Path, rate: int, seconds: int, faster: int = 6) -> Table:
    """A live log of `rate` events/s whose own time runs `faster`, so that a minute ends often."""
    prefix = "latency."
    tape = Tape(rate * seconds, minutes=max(1, seconds * faster // 60), quotes=3)
    records = list(tape.records(SlicerSettings()))
    await clients.prepare(stand.settings(prefix))
    worker = Worker(stand, prefix, folder)
    sent: dict[tuple[int, int], float] = {}
    waited: list[float] = []
    name = prefix + topics.BARS_1M.name
    reader = AIOKafkaConsumer(bootstrap_servers=stand.address, fetch_max_wait_ms=10, auto_offset_reset="earliest")
    await reader.start()
    reader.assign([TopicPartition(name, number) for number in range(topics.PARTITIONS)])

    async def read() -> None:
        while True:
            for place, found in (await reader.getmany(timeout_ms=1000)).items():
                now = time.perf_counter()
                waited.extend(now - sent[place.partition, each.timestamp] for each in found if each.key)

    def well() -> bool:
        try:
            return 'partitions": "ok' in worker.health()
        except OSError:
            return False

    await until(well, 60)
    reading = asyncio.create_task(read())
    publisher = clients.Publisher(stand.settings(prefix))
    await publisher.start()
    began, first_ms = time.perf_counter(), records[0].timestamp_ms
    due_by = itertools.groupby(records, key=lambda r: (r.timestamp_ms - first_ms) // (5 * faster))
    for step, group in due_by:
        await asyncio.sleep(max(0.0, began + step * 0.005 - time.perf_counter()))
        batch, now = list(group), time.perf_counter()
        sent.update({(r.partition, r.timestamp_ms): now for r in batch if r.kind == "tick"})
        await publisher.publish(message(prefix, record) for record in batch)
    await asyncio.sleep(1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await reader.stop()
    await publisher.stop()
    used = worker.child.end()
    await stand.drop(prefix)
    table = Table(title=f"from the tick sent to the bar read from its topic, {rate:,} events/s, ms")
    for column in ("bars", "p50", "p99", "max", "worker's CPU %", "others %"):
        table.add_column(column, justify="right")
    ordered = sorted(waited)
    if not ordered:
        raise SystemExit("no bar came")
    table.add_row(
        f"{len(ordered):,}",
        f"{statistics.median(ordered) * 1e3:.1f}",
        f"{ordered[int(len(ordered) * 0.99)] * 1e3:.1f}",
        f"{ordered[-1] * 1e3:.1f}",
        f"{used.cpu_s / (time.perf_counter() - began) * 100:.0f}",
        f"{used.others * 100:.0f}",
    )
    return table


# -- memory --------------------------------------------------------------------------------------------


def many_pairs(begin_s: int, seconds: int, rate: int, pairs: int, numbers: list[int]) -> Iterator[RawRecord]:
    """Trades of `rate` a second, as the slicer would cut them, without its work: ten million in a minute. `numbers`:
    of the next event, by partition; it is moved on."""
    rng = random.Random(begin_s)
    places = [(name := f"PAIR{number}-USD", partition_of(name)) for number in range(pairs)]
    for second in range(begin_s, begin_s + seconds):
        ms = BEGIN_MS + second * 1000
        recv = (ms + 20) * 1_000_000
        slices: dict[int, list[bytes]] = {}
        for number in range(rate):
            pair, partition = places[rng.randrange(pairs)]
            data = b'{"ev":"XT","pair":"%s","p":%d.%d,"t":%d,"s":0.%d1,"c":[%d],"i":"%d","x":%d,"r":%d}' % (
                pair.encode(),
                100 + number % 7,
                1 + number % 9,
                ms + number * 1000 // rate,
                number,
                1 + number % 2,
                second * rate + number,
                1 + number % 3,
                ms + 30,
            )
            slices.setdefault(partition, []).append(data)
        for partition in range(topics.PARTITIONS):
            for kind, count, value in (
                ("gap", 1, b'{"from":null,"to":%d,"streams":["XT"],"pairs":["*"],"reason":"start"}' % (ms * 10**6))
                if second == 0
                else ("tick", 1, b'{"fresh":["XT"]}'),
                ("slice", len(slices.get(partition, ())), b"[" + b",".join(slices.get(partition, ())) + b"]"),
            ):
                if count:
                    yield RawRecord(partition, ms, kind, 1, numbers[partition], [(recv, count)], value)
                    numbers[partition] += count


async def memory(stand: Stand, folder: Path, backlog: int, live_s: int, rate: int = 1_000, pairs: int = 500) -> Table:
    """The horizon is filled by catching up; then it goes on live."""
    table = Table(title=f"memory of the worker, {pairs} pairs, {rate:,} trades/s, a lateness of 15 minutes open")
    for column in ("what", "events", "events/s", "peak MB", "MB at the end"):
        table.add_column(column, justify="left" if column == "what" else "right")
    prefix, numbers = "memory.", [0] * topics.PARTITIONS
    names = [prefix + name for name in ALL_OUTPUTS]
    await stand.load_raw(prefix, many_pairs(0, backlog // rate, rate, pairs, numbers))
    worker = Worker(stand, prefix, folder)
    await steady(stand, worker, names)
    caught_up = time.time()
    began = await asyncio.to_thread(worker.began)
    table.add_row(
        "catching up",
        f"{backlog:,}",
        f"{backlog / (caught_up - STEADY_S - began):,.0f}",
        f"{worker.child.peak_mb:,.0f}",
        f"{worker.child.rss_mb():,.0f}",
    )
    publisher = clients.Publisher(stand.settings(prefix))
    await publisher.start()
    start = time.monotonic()
    most = 0.0
    for second in range(live_s):
        records = list(many_pairs(backlog // rate + second, 1, rate, pairs, numbers))
        await asyncio.sleep(max(0.0, start + second - time.monotonic()))
        await publisher.publish(message(prefix, record) for record in records)
        most = max(most, worker.child.rss_mb())
    await publisher.stop()
    table.add_row("live", f"{live_s * rate:,}", f"{rate:,}", f"{most:,.0f}", f"{worker.child.rss_mb():,.0f}")
    worker.child.end()
    await stand.drop(prefix)
    return table
