"""The processor on a real Kafka, with everything done to it that can be: what it publishes is what `compute` says."""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
import tracemalloc
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord
from conftest import Process, Servers, Spawn, until
from faust.types import TP

from bench.market import write_frames
from processors.compute import FILES, compute
from processors.rollups import BarRecord, Rollups
from processors.service import faust_app
from processors.settings import PipelineSettings
from processors.stages import ALL
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import topics
from schemas.frames import Frame, read_frames
from schemas.raw import RawRecord, read_log
from tapedeck import kafka as clients
from tapedeck.dump import dump
from tapedeck.settings import Settings

SETTINGS = PipelineSettings()


def disturbed(frames: Iterable[Frame], seed: int) -> Iterator[Frame]:
    """Some trades come late, by seconds or by most of an hour, and some come twice."""
    rng = random.Random(seed)
    held: list[tuple[int, bytes]] = []
    for frame in frames:
        events = [event for due, event in held if due <= frame.recv_ns]
        held = [(due, event) for due, event in held if due > frame.recv_ns]
        for event in json.loads(frame.data):
            data = json.dumps(event).encode()
            luck = rng.random() if event["ev"] == "XT" else 1
            if luck < 0.02:
                held.append((frame.recv_ns + int(rng.choice((2, 60, 600, 2_000)) * rng.random() * 10**9), data))
            else:
                events += [data] * (2 if luck < 0.03 else 1)
        yield Frame(frame.recv_ns, b"[" + b",".join(events) + b"]")


def market_log(folder: Path, rate: int, seconds: float) -> list[RawRecord]:
    """A raw log that ends about now: for records older than a day a broker that was killed no longer knows what it
    has of a producer."""
    frames = folder / "market.ndjson"
    begin_ms = int((time.time() - seconds) * 1000)
    write_frames(frames, rate, seconds, per_frame=10, begin_ms=begin_ms - begin_ms % 60_000)
    streams = ["XT", "XQ", "XA"]
    return list(records_of(disturbed(read_frames(frames), 1), SlicerSettings(), streams, ["*"]))


async def send_in_transaction(settings: Settings, records: Iterable[RawRecord]) -> None:
    """As somebody does who copies a log and wants each record once."""
    topic = settings.topic_prefix + topics.RAW.name
    copier = AIOKafkaProducer(**settings.kafka_options(), transactional_id=topic)
    await copier.start()
    async with copier.transaction():
        for r in records:
            place = {"partition": r.partition, "timestamp_ms": r.timestamp_ms}
            await copier.send_and_wait(topic, r.value, headers=r.headers(), **place)
    await copier.stop()


POISON = (
    b"",
    b"\xff\xfe\x00",
    b"\x00" * 1_000_000,
    random.Random(1).randbytes(2_000_000),
    b'{"kind":"slice"}',
    b'[{"ev":"XT"}]',
    b"null",
)


class Line:
    """The raw topic, the workers that read it, and what they made of it."""

    def __init__(self, settings: Settings, spawn: Spawn) -> None:
        self.settings = settings
        self._spawn = spawn
        self.workers: dict[str, Process] = {}
        self._publisher = clients.Publisher(settings)
        self._reader = AIOKafkaConsumer(**settings.kafka_options())

    async def start(self) -> None:
        await clients.prepare(self.settings)
        await self._publisher.start()
        await self._reader.start()

    async def stop(self) -> None:
        await self._publisher.stop()
        await self._reader.stop()

    def work(self, name: str, patch: str = "") -> Process:
        """A worker; one of the same name takes up at once what the one before it had."""
        self.workers[name] = self._spawn("process", connect_timeout_s=60, worker_id=name, patch=patch)
        return self.workers[name]

    async def send(self, records: Iterable[RawRecord]) -> None:
        """As a producer does: again from the same mark when a round failed."""
        topic = self.settings.topic_prefix + topics.RAW.name
        messages = [clients.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers()) for r in records]
        for first in range(0, len(messages), 500):
            while True:
                try:
                    await self._publisher.publish(messages[first : first + 500])
                    break
                except (KafkaError, AssertionError):
                    await asyncio.sleep(0.5)
                    with contextlib.suppress(KafkaError, OSError):
                        await self._publisher.restart()

    async def poison(
        self, partition: int, value: bytes, headers: list[tuple[str, bytes]], topic: topics.Topic = topics.RAW
    ) -> None:
        name, now = self.settings.topic_prefix + topic.name, int(time.time() * 1000)
        await self._publisher.publish([clients.Message(name, partition, None, value, now, headers)])

    async def trades(self) -> int:
        """How many records stand in trades.v1."""
        places = [TopicPartition(self.settings.topic_prefix + topics.TRADES.name, n) for n in range(topics.PARTITIONS)]
        return sum((await self._reader.end_offsets(places)).values())

    async def done(self, timeout_s: float = 180) -> None:
        """Waits until the group has committed all there is, of every stage's topic."""
        group = self.settings.topic_prefix + "tapedeck-processor"
        names = [self.settings.topic_prefix + stage.topic.name for stage in ALL]
        places = [TopicPartition(name, number) for name in names for number in range(topics.PARTITIONS)]
        admin = AIOKafkaAdminClient(**self.settings.kafka_options())
        await admin.start()

        async def committed() -> bool:
            with contextlib.suppress(KafkaError):
                ends = await self._reader.end_offsets(places)
                found = await admin.list_consumer_group_offsets(group)
                return all(
                    not ends[place] or (place in found and found[place].offset == ends[place]) for place in places
                )
            return False

        try:
            await until(committed, timeout_s)
        finally:
            await admin.close()

    async def published(self) -> dict[str, dict[bytes, int]]:
        """By topic, each value and how often it stands there."""
        found: dict[str, dict[bytes, int]] = {}
        for name in FILES:
            counts: dict[bytes, int] = defaultdict(int)
            async for record in self._records(name):
                counts[record.value] += 1
            found[name] = counts
        return found

    async def _records(self, name: str) -> AsyncIterator[Any]:
        """In order within each partition."""
        places = [TopicPartition(self.settings.topic_prefix + name, number) for number in range(topics.PARTITIONS)]
        reader = await clients.consumer(self.settings, *places)
        try:
            ends = await reader.end_offsets(places)
            while any([await reader.position(place) < ends[place] for place in places]):
                for records in (await reader.getmany(timeout_ms=500)).values():
                    for record in records:
                        yield record
        finally:
            await reader.stop()

    async def computed(self, folder: Path) -> dict[str, set[bytes]]:
        """What `tapedeck compute --log` makes of the raw topic as it stands."""
        await dump(self.settings, folder / "raw.ndjson")
        with (folder / "raw.ndjson").open("rb") as lines:
            compute(((line.offset, record) for line, record in read_log(lines)), folder / "out", SETTINGS, False)
        made = {name: set((folder / "out" / file).read_bytes().splitlines()) for name, file in FILES.items()}
        return made | await self._rolled_up()

    async def _rolled_up(self) -> dict[str, set[bytes]]:
        """Rollups are a function of the bars as they stand in their topic: a worker may publish a revised bar before
        the marker that it came after."""
        stages = {number: Rollups(number) for number in range(topics.PARTITIONS)}
        made: dict[str, set[bytes]] = {topic.name: set() for topic in topics.ROLLUPS.values()}
        async for record in self._records(topics.BARS_1M.name):
            bar = BarRecord(record.timestamp, record.value, record.offset)
            for output in stages[record.partition].process(bar):
                made[output.topic].add(output.value)
        return made


@pytest.fixture
async def line(settings: Settings, spawn: Spawn) -> AsyncIterator[Line]:
    line = Line(settings, spawn)
    await line.start()
    yield line
    await line.stop()


def assert_same(published: dict[str, dict[bytes, int]], computed: dict[str, set[bytes]]) -> None:
    for name, values in computed.items():
        missing, extra = values - published[name].keys(), published[name].keys() - values
        assert not missing, (name, len(missing), sorted(missing)[:2])
        assert not extra, (name, len(extra), sorted(extra)[:2])


async def strike(kind: str, line: Line, servers: Servers, rng: random.Random) -> None:
    """What may befall workers and the broker."""
    alive = [name for name, worker in line.workers.items() if worker.popen.poll() is None]
    name = rng.choice(alive)
    worker = line.workers[name].popen
    match kind:
        case "kill":
            worker.kill()
            await asyncio.sleep(rng.choice((0, 0.5, 2)))
            line.work(name)
        case "join":
            line.work(f"joined{len(line.workers)}")
        case "leave":
            worker.send_signal(signal.SIGTERM)
        case "freeze":  # for longer than the session lasts, and then it goes on where it was
            worker.send_signal(signal.SIGSTOP)
            await asyncio.sleep(12)
            worker.send_signal(signal.SIGCONT)
        case "broker":
            assert servers.broker is not None
            servers.broker.kill()
            await asyncio.to_thread(servers.broker.restart)
            await asyncio.sleep(1)
    for name in alive:  # who gave up, for want of a broker, is started again
        if line.workers[name].popen.poll():
            line.work(name)


# Eight of them in each run of the tests, for each costs seconds; all with TAPEDECK_MISFORTUNES=20.
MISFORTUNES = ["kill", "broker", "kill", "freeze", "join", "kill", "leave", "kill"]
MISFORTUNES += ["kill"] * 4 + ["join", "kill", "kill", "freeze", "kill", "broker", "kill", "kill"]
HOW_MANY = int(os.environ.get("TAPEDECK_MISFORTUNES", "8"))


@pytest.mark.timeout(60 * HOW_MANY)
async def test_no_misfortune_changes_a_byte(line: Line, servers: Servers, tmp_path: Path) -> None:
    """Each strikes while somebody is at work on a backlog."""
    if servers.broker is None:
        pytest.skip("the broker is not ours to kill")
    rng = random.Random(1)
    kinds = MISFORTUNES[:HOW_MANY]
    records = market_log(tmp_path, rate=5 * HOW_MANY, seconds=3_600)
    size = -(-len(records) // (len(kinds) + 1))
    pieces = [records[first : first + size] for first in range(0, len(records), size)]
    await line.send(pieces.pop(0))
    line.work("first")
    line.work("second")
    for kind, piece in zip(kinds, pieces, strict=True):
        before = await line.trades()
        sending = asyncio.create_task(line.send(piece))

        async def at_work(before: int = before) -> bool:
            return await line.trades() > before

        await until(at_work, 120)
        await strike(kind, line, servers, rng)
        await sending
    await line.done()
    published = await line.published()
    assert_same(published, await line.computed(tmp_path))
    repeats = sum(count - 1 for counts in published.values() for count in counts.values())
    assert published[topics.ROLLUPS["30m"].name]
    assert repeats > 0, "nothing was done twice: the kills hit nothing"


async def test_poison_stops_no_partition(line: Line, tmp_path: Path) -> None:
    records = market_log(tmp_path, rate=80, seconds=120)
    worker = line.work("only")
    good = records[5].headers()
    for number, value in enumerate(POISON * 3):
        await line.send(records[number * 100 : number * 100 + 100])
        headers = ([], [("kind", b"slice"), ("n", b"x")], good)[number % 3]
        await line.poison(number % topics.PARTITIONS, value, headers)
    await line.send(records[100 * 3 * len(POISON) :])
    await line.done(60)
    assert worker.popen.poll() is None, worker.log.read_text()
    published = await line.published()
    computed = await line.computed(tmp_path)
    assert_same(published, computed)
    reasons = [json.loads(value)["reason"] for value in published[topics.DEAD_LETTERS.name]]
    assert sum("not a record of the raw topic" in reason for reason in reasons) == 2 * len(POISON)


async def test_a_backlog_of_small_records_is_committed_as_fast_as_it_is_worked_through(line: Line) -> None:
    """Faust's own count of what may be committed went forward by one bundle in half a second: five minutes for these."""
    now_ms = int(time.time() * 1000)
    ticks = range(now_ms - now_ms % 1000 - 40_000_000, now_ms, 1_000)
    await line.send(RawRecord(0, ms, "tick", 1, n, [(ms * 10**6, 1)], b"{}") for n, ms in enumerate(ticks))
    worker = line.work("only")
    await line.done(120)
    assert worker.popen.poll() is None, worker.log.read_text()


STUCK = """
import asyncio
from processors import service

async def nothing(self, batches):
    while sum(map(len, batches.values())) > 200:
        await asyncio.sleep(1)
    await publish(self, batches)

service.STALLED_S = 2
publish = service.kafka.Publisher.publish_batches
service.kafka.Publisher.publish_batches = nothing
"""


async def test_a_worker_that_does_not_move_though_records_wait_ends_and_an_idle_one_does_not(
    line: Line, tmp_path: Path
) -> None:
    records = market_log(tmp_path, rate=80, seconds=60)
    worker = line.work("only", patch=STUCK)
    for first in range(0, 60, 5):
        await line.send(records[first : first + 5])
    await line.done(60)
    await send_in_transaction(line.settings, records[60:61])  # whose end is never committed
    await asyncio.sleep(12)
    assert worker.popen.poll() is None, worker.log.read_text()
    await line.send(records[61:])
    assert await asyncio.to_thread(worker.ended, 30) == 1
    assert "no progress for 2 s though" in worker.log.read_text()


SLOW = """
import asyncio
from processors import service

async def slow(*arguments):
    await asyncio.sleep(3)
    return await rebuild(*arguments)

service.WAITING_RECORDS = 50
rebuild, service.rebuild = service.rebuild, slow
"""


async def test_what_waits_for_a_long_rebuild_is_held_back_and_nothing_of_it_is_lost(line: Line, tmp_path: Path) -> None:
    """Nor when another worker joins in the middle of it."""
    records = market_log(tmp_path, rate=80, seconds=300)
    half = len(records) // 2
    await line.send(records[:half])
    worker = line.work("first")
    await line.done(60)
    worker.popen.kill()
    worker.popen.wait()
    await line.send(records[half : half + 2_000])
    line.work("first", patch=SLOW)
    await asyncio.sleep(2)
    line.work("second", patch=SLOW)
    await line.send(records[half + 2_000 :])
    await line.done(60)
    assert_same(await line.published(), await line.computed(tmp_path))


async def test_a_log_that_was_overtaken_by_retention_is_a_gap_and_its_bars_are_partial(
    line: Line, tmp_path: Path
) -> None:
    records = market_log(tmp_path, rate=40, seconds=600)
    third = len(records) // 3
    await line.send(records[:third])
    for number in range(topics.PARTITIONS):
        for topic in (topics.GAPS, topics.BARS_1M):  # which tell how far it had come
            await line.poison(number, b'{"kind":"none of ours","reason":""}', [], topic)
    worker = line.work("only")
    await line.done(60)
    worker.popen.kill()
    worker.popen.wait()
    before = await line.published()
    await line.send(records[third : 2 * third])
    await _delete_all(line.settings)
    await line.send(records[2 * third :])
    line.work("only")
    await line.done(60)
    published = await line.published()
    gaps = [json.loads(value) for value in published[topics.GAPS.name]]
    lost = [gap for gap in gaps if gap["reason"] == "log"]
    assert sorted(gap["partition"] for gap in lost) == list(range(topics.PARTITIONS))
    for gap in lost:
        until_ns = next(r.timestamp_ms for r in records[2 * third :] if r.partition == gap["partition"]) * 10**6
        assert gap["to"] == until_ns
        assert records[third - 250].timestamp_ms - 60_000 <= gap["from"] // 10**6 <= records[third].timestamp_ms
    new = published[topics.BARS_1M.name].keys() - before[topics.BARS_1M.name].keys()
    bars = [bar for value in new if (bar := json.loads(value))["kind"] == "bar"]
    torn = {gap["partition"]: gap["to"] for gap in lost}
    first = [bar for bar in bars if any(bar["start"] <= to < bar["end"] for to in torn.values())]
    assert first
    assert all({"partial", "gap"} <= set(bar["flags"]) for bar in first)
    assert any(bar["flags"] == [] for bar in bars)


async def test_a_commit_goes_up_to_the_first_bundle_not_acknowledged_and_lists_no_offsets_that_retention_took(
    settings: Settings,
) -> None:
    rng = random.Random(7)
    consumer: Any = faust_app(settings).consumer
    for committed in range(1, 200):
        place, offset = TP("raw", committed), committed
        consumer._committed_offset[place] = committed
        flying: list[int] = []
        bundles: list[int] = []
        acked: set[int] = set()
        for _ in range(30):
            last = offset + rng.choice((1, 2, 3, 3, 8))
            await consumer._add_gap(place, offset + (offset == committed), last)
            offset = last + 1
            flying.append(last)
            bundles.append(last)
            for done in rng.sample(flying, rng.randrange(len(flying))):
                flying.remove(done)
                acked.add(done)
                consumer._acked[place].append(done)
                consumer._acked_index[place].add(done)
            new = consumer._new_offset(place) or consumer._committed_offset[place]
            reached = list(takewhile(acked.__contains__, bundles))
            assert new == (reached[-1] + 1 if reached else committed)
            consumer._committed_offset[place] = new

    place, far = TP("raw", 1_000), 10_000_000
    consumer._committed_offset[place] = 7
    await consumer._add_gap(place, 8, far)
    consumer._acked[place].append(far)
    tracemalloc.start()
    assert consumer._new_offset(place) == far + 1
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


async def test_a_commit_does_not_stand_still_before_a_hole_behind_the_very_first_record(settings: Settings) -> None:
    consumer: Any = faust_app(settings).consumer
    place = TP("raw", 0)
    consumer.resume_flow()
    for offset in (0, 5):
        record = ConsumerRecord("raw", 0, offset, 0, 0, None, b"", None, 0, 0, ())
        consumer._wait_next_records = AsyncMock(return_value=({place: [record]}, None))
        async for _ in consumer.getmany(0):
            consumer._read_offset[place] = offset
        consumer._acked[place].append(offset)
        consumer._acked_index[place].add(offset)
        assert consumer._new_offset(place) == offset + 1
        consumer._committed_offset[place] = offset + 1


async def _delete_all(settings: Settings) -> None:
    """Everything that the raw topic has, as retention would."""
    name = settings.topic_prefix + topics.RAW.name
    places = [TopicPartition(name, number) for number in range(topics.PARTITIONS)]
    reader = AIOKafkaConsumer(**settings.kafka_options())
    admin = AIOKafkaAdminClient(**settings.kafka_options())
    await reader.start()
    await admin.start()
    ends: dict[TopicPartition, Any] = await reader.end_offsets(places)
    await admin.delete_records({place: _records_to_delete(end) for place, end in ends.items()})
    await reader.stop()
    await admin.close()


def _records_to_delete(before: int) -> Any:
    from aiokafka.admin import RecordsToDelete

    return RecordsToDelete(before_offset=before)
