"""The archive and the replay on a real Kafka: whatever dies, each record is archived once, and history played again
gives what it gave."""

import asyncio
import json
import math
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from conftest import Process, Spawn, until
from pydantic import SecretStr
from sinking import says, sinking, unmake
from test_processor import disturbed, send_in_transaction

from bench.market import write_frames
from processors.compute import FILES, compute
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.replay import Wanted, replay
from producers.slicer import SlicerSettings
from schemas import rest, topics
from schemas.frames import read_frames
from schemas.raw import RawRecord, record_of
from sinks import assignment, service
from sinks.assignment import Assignment, member
from sinks.merging import Hour, merge, mergeable
from tapedeck import kafka as clients
from tapedeck import metrics
from tapedeck.archive import Archive, table_of
from tapedeck.dump import dump
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.history import Entry, Source, open_history, timestamp_at
from tapedeck.settings import Settings
from tapedeck.shell import Shell
from tapedeck.spans import HOUR_MS, Span

MINUTE_MS = 60_000
NO_SYMBOLS: frozenset[str] = frozenset()
ROLLUPS = {topic.name for topic in topics.ROLLUPS.values()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "archive"


@pytest.fixture
def settings(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(
        update={"archive_url": SecretStr(str(folder)), "archive_seconds": 0.3, "connect_timeout_s": 30.0}
    )


@pytest.fixture
def hour_ms() -> int:
    """The full hour before this one."""
    now = int(time.time() * 1000)
    return now - now % HOUR_MS - HOUR_MS


@pytest.fixture
def records(tmp_path: Path, hour_ms: int) -> list[RawRecord]:
    """A raw log from a minute before the hour to one after it, in which some from before it come again after it."""
    frames = tmp_path / "market.ndjson"
    write_frames(frames, 200, 120, per_frame=5, begin_ms=hour_ms - MINUTE_MS)
    made = list(records_of(disturbed(read_frames(frames), 1), SlicerSettings(), ["XT", "XQ", "XA"], ["*"]))
    at = next(number for number, record in enumerate(made) if record.timestamp_ms > hour_ms + 1000)
    return [*made[:at], *made[at - 1500 : at - 1400], *made[at:]]


@pytest.fixture
async def publisher(settings: Settings) -> AsyncIterator[clients.Publisher]:
    await clients.prepare(settings)
    publisher = clients.Publisher(settings)
    await publisher.start()
    yield publisher
    await publisher.stop()


async def send(settings: Settings, publisher: clients.Publisher, records: Iterable[RawRecord]) -> None:
    topic = settings.topic_prefix + topics.RAW.name
    await publisher.publish(
        clients.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers()) for r in records
    )


async def send_repairs(settings: Settings, publisher: clients.Publisher, minute_ms: int) -> None:
    """Groups without trades, of two pairs in two partitions."""
    await publisher.publish(
        clients.Message(settings.topic_prefix + topics.RAW_REST.name, place, b"key", value, minute_ms, headers)
        for place, pair in enumerate(("BTC-USD", "ETH-USD"))
        for headers, value in rest.records_of(1, pair, minute_ms * 10**6, "trades", [], minute_ms * 10**6)
    )


async def read(settings: Settings, source: Source, topic: topics.Topic = topics.RAW) -> list[Entry]:
    entries: list[Entry] = []
    for number in range(topic.partitions):
        async with open_history(settings, source, topic, number) as log:
            async for some in log.batches(log.begin, log.end):
                entries += some
    return entries


async def deleted(settings: Settings, place: TopicPartition, before: int) -> None:
    """Retention took the records before an offset."""
    admin = AIOKafkaAdminClient(**settings.kafka_options())
    await admin.start()
    await admin.delete_records({place: RecordsToDelete(before_offset=before)})
    await admin.close()


async def archived(settings: Settings, *sinks: Process) -> None:
    """The archive is as long as Kafka's log."""
    names = [settings.topic_prefix + topic.name for topic in topics.ARCHIVED]
    places = [TopicPartition(name, number) for name in names for number in range(topics.PARTITIONS)]
    reader = await clients.consumer(settings, *places)
    ends = await reader.end_offsets(places)
    await reader.stop()

    async def whole() -> bool:
        for sink in sinks:
            assert sink.popen.poll() is None, sink.log.read_text()
        found = dict.fromkeys(places, 0)
        for span in (span for name in names for span in Archive(settings).spans(name)):
            place = TopicPartition(span.topic, span.partition)
            found[place] = max(found[place], span.end)
        return found == ends

    await until(whole, 60)


async def stopped(*sinks: Process) -> None:
    for sink in sinks:
        sink.popen.send_signal(signal.SIGTERM)
    for sink in sinks:
        assert await asyncio.to_thread(sink.ended, 60) == 0, sink.log.read_text()


async def test_killed_sinks_leave_neither_holes_nor_doubles(
    settings: Settings, publisher: clients.Publisher, spawn: Spawn, records: list[RawRecord], folder: Path, hour_ms: int
) -> None:
    seed = int(time.time())
    rng = random.Random(seed)
    sinks = [spawn("sink", "archive", worker_id=f"w{number}") for number in range(2)]
    await send_repairs(settings, publisher, hour_ms)
    pieces, files = 12, 0

    def count() -> int:
        return len(list(folder.rglob("*.parquet")))

    async def more() -> bool:
        return count() > files

    for piece in range(pieces):
        await send(settings, publisher, records[piece * len(records) // pieces : (piece + 1) * len(records) // pieces])
        if piece % 2:
            await until(more, 60)
            await asyncio.sleep(rng.random() / 2)
            number = rng.randrange(2)
            sinks[number].popen.kill()
            sinks[number].popen.wait()
            files = count()
            sinks[number] = spawn("sink", "archive", worker_id=f"w{number}")
    await archived(settings, *sinks)
    for sink in sinks:
        sink.popen.kill()
        sink.popen.wait()
    original = await read(settings, "kafka")

    # The files as they are, once what was small is merged: nothing twice, and every byte.
    compact = spawn("archive", "compact")
    assert await asyncio.to_thread(compact.ended, 60) == 0, compact.log.read_text()
    assert await read(settings, "archive") == original, seed
    name = settings.topic_prefix + topics.RAW.name
    rows = duckdb.sql(
        f"""SELECT partition, "offset", epoch_ms("timestamp"), key, value, headers['kind'], headers['recv'], hour::int
        FROM read_parquet('{folder}/*/*/*/*.parquet', hive_partitioning = true) WHERE topic = '{name}'"""
    ).fetchall()
    assert sorted(rows) == sorted(
        (e.partition, e.offset, e.timestamp_ms, e.key, e.value, h["kind"], h["recv"], e.timestamp_ms // HOUR_MS % 24)
        for e in original
        for h in [dict(e.headers)]
    ), seed


async def test_the_range_played_again_gives_the_same_outputs(
    settings: Settings,
    publisher: clients.Publisher,
    spawn: Spawn,
    records: list[RawRecord],
    hour_ms: int,
    tmp_path: Path,
) -> None:
    await send(settings, publisher, records)
    await send_repairs(settings, publisher, hour_ms)
    sink = spawn("sink", "archive")
    await archived(settings, sink)
    await stopped(sink)
    since, until_ms = hour_ms - 45_500, hour_ms + 40_250
    original = cut(await read(settings, "kafka"), since, until_ms)
    wanted = computed(original, tmp_path / "original")
    assert wanted["trades.v1"]
    assert wanted["bars.1m.v1"]

    for source in ("archive", "kafka"):
        prefix = f"{settings.topic_prefix}{source}."
        target = settings.model_copy(update={"topic_prefix": prefix})
        count = await replay(settings, source, prefix, Wanted(since, until_ms, NO_SYMBOLS, math.inf))
        played = await read(target, "kafka")
        assert count == len(played) + 2
        assert [e[2:4] + e[5:] for e in played] == [e[2:4] + e[5:] for e in original]
        assert computed(played, tmp_path / source) == wanted
        rest_records = [await read(each, "kafka", topics.RAW_REST) for each in (settings, target)]
        assert rest_records[0] == rest_records[1]
        with pytest.raises(UsageError, match="hold records already"):
            await replay(settings, source, prefix, Wanted(since, until_ms, NO_SYMBOLS, math.inf))

    # The line itself, on what was played.
    worker = spawn("process", topic_prefix=target.topic_prefix)

    async def through() -> bool:
        assert worker.popen.poll() is None, worker.log.read_text()
        return len(await read(target, "kafka", topics.TRADES)) >= len(wanted["trades.v1"])

    await until(through, 60)
    await stopped(worker)
    for topic in (topics.TRADES, topics.QUOTES, topics.BARS_1M, topics.VENDOR_BARS, topics.GAPS):
        published = [entry.value or b"" for entry in await read(target, "kafka", topic)]
        live = [value for value in published if b'"repair":1,' not in value]  # what REST gave is beside it
        assert Counter(live) == Counter(wanted[topic.name]), topic.name


async def test_a_replay_of_some_pairs_keeps_their_identities_and_the_pace(
    settings: Settings,
    publisher: clients.Publisher,
    spawn: Spawn,
    records: list[RawRecord],
    hour_ms: int,
    tmp_path: Path,
) -> None:
    await send(settings, publisher, records)
    await send_repairs(settings, publisher, hour_ms)
    prefix = f"{settings.topic_prefix}some."
    since, until_ms = hour_ms - MINUTE_MS + 1_000, hour_ms + 15_000
    times = ["--from", str(since), "--to", f"{until_ms / 1000:.0f}"]
    began = time.monotonic()
    player = spawn("replay", *times, "--symbols", "BTC-USD,XRP-USD", "--speed", "20", "--prefix", prefix)
    assert await asyncio.to_thread(player.ended, 60) == 0, player.log.read_text()
    assert time.monotonic() - began > (until_ms - since - 1_000) / 1000 / 20
    target = settings.model_copy(update={"topic_prefix": prefix})
    whole = computed(cut(await read(settings, "kafka"), since, until_ms), tmp_path / "whole")
    some = computed(await read(target, "kafka"), tmp_path / "some")
    for name in ("trades.v1", "quotes.v1", "bars.1m.v1", "bars.vendor.v1"):
        mine = [line for line in whole[name] if json.loads(line).get("symbol", "BTC-USD") in ("BTC-USD", "XRP-USD")]
        assert mine
        assert some[name] == mine, name
    assert len(some["trades.v1"]) < len(whole["trades.v1"])
    assert some["deadletters.v1"] == []
    assert [e.partition for e in await read(target, "kafka", topics.RAW_REST)] == [0]

    none = f"{settings.topic_prefix}none."
    with pytest.raises(TapedeckError, match="is of NOPE-USD, so nothing is played"):
        await replay(settings, "kafka", none, Wanted(since, until_ms, frozenset({"NOPE-USD"}), math.inf))
    assert await replay(settings, "kafka", none, Wanted(since, until_ms, frozenset({"ETH-USD"}), math.inf))


def cut(entries: list[Entry], since_ms: int, until_ms: int) -> list[Entry]:
    """A range by its definition."""
    found = []
    for number in range(topics.PARTITIONS):
        mine = [entry for entry in entries if entry.partition == number]
        first, end = (
            next((place for place, e in enumerate(mine) if e.timestamp_ms >= time_ms), len(mine))
            for time_ms in (since_ms, until_ms)
        )
        found += mine[first:end]
    return found


def computed(entries: Iterable[Entry], folder: Path) -> dict[str, list[bytes]]:
    """What the pipeline makes of raw records, by topic."""
    records = ((e.offset, record_of(e.partition, e.timestamp_ms, e.headers, e.value, e.offset)) for e in entries)
    compute(records, folder, PipelineSettings(), False)
    return {name: (folder / file).read_bytes().splitlines() for name, file in FILES.items() if name not in ROLLUPS}


async def test_a_full_disk_is_said_and_loses_nothing(
    settings: Settings, publisher: clients.Publisher, spawn: Spawn, records: list[RawRecord]
) -> None:
    # No file may grow beyond a kilobyte: what a full disk is to a process, but for the number of the error.
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))"
    sink = spawn("sink", "archive", patch=small + "; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)")
    await send(settings, publisher, records)

    async def said() -> bool:
        return b"trouble with the archive's storage" in sink.log.read_bytes()

    await until(said, 60)
    assert await read(settings, "archive") == []
    resource.prlimit(sink.popen.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await archived(settings, sink)
    await stopped(sink)
    assert await read(settings, "archive") == await read(settings, "kafka")


async def test_what_retention_took_is_a_hole_that_is_said(
    settings: Settings, publisher: clients.Publisher, spawn: Spawn, records: list[RawRecord]
) -> None:
    place = TopicPartition(settings.topic_prefix + topics.RAW.name, 1)
    mine = [record for record in records if record.partition == 1]
    await send(settings, publisher, mine[:300])
    sink = spawn("sink", "archive")
    await archived(settings, sink)
    await stopped(sink)
    await send(settings, publisher, mine[300:])
    await deleted(settings, place, 350)
    sink = spawn("sink", "archive")
    await archived(settings, sink)
    await stopped(sink)
    assert b"overtaken by retention" in sink.log.read_bytes()
    assert b"300, 350" in sink.log.read_bytes()
    async with open_history(settings, "archive", topics.RAW, 1) as log:
        after = [entry async for entries in log.batches(350, log.end) for entry in entries]
        assert [entry.value for entry in after] == [record.value for record in mine[350:]]
        with pytest.raises(TapedeckError, match="no records 300 to 349"):
            _ = [entries async for entries in log.batches(0, log.end)]
    want = Wanted(mine[200].timestamp_ms, mine[-1].timestamp_ms, NO_SYMBOLS, math.inf)
    with pytest.raises(TapedeckError, match="no records 300 to 349"):
        await replay(settings, "archive", f"{settings.topic_prefix}again.", want)


@pytest.mark.parametrize(
    ("shift_ms", "begin", "refused"),
    [(0, 0, False), (1, 0, True), (1, 15, False), (-HOUR_MS - 1_000, 15, True)],
    ids=["the same", "another", "retention took it", "retention took it and time goes back"],
)
async def test_a_log_that_began_anew_and_has_grown_past_the_archive_is_refused(
    settings: Settings, publisher: clients.Publisher, shift_ms: int, begin: int, refused: bool
) -> None:
    records = [entry._replace(timestamp_ms=2 * HOUR_MS + entry.offset) for entry in made(0, 20)]
    topic = settings.topic_prefix + topics.RAW.name
    archive = Archive(settings)
    archive.put(Span(0, 10, 2, topic, 3), [table_of(records[:10])])
    await publisher.publish(
        clients.Message(topic, 3, e.key, e.value, e.timestamp_ms + shift_ms, e.headers)  # type: ignore[arg-type]
        for e in records
    )
    await deleted(settings, TopicPartition(topic, 3), begin)
    async with asyncio.timeout(60):
        if refused:
            with pytest.raises(UsageError, match=r"\[3\] has another record at offset .* began anew.*ARCHIVE_URL"):
                await service.run(Shell(settings, "sink"), "archive")
        else:
            async with sinking(settings, "archive"):
                await archived(settings)
    assert (len(archive.spans(topic)) == 1) == refused


async def test_a_loss_is_told_once_however_often_the_group_rebalances(
    settings: Settings, publisher: clients.Publisher
) -> None:
    place = TopicPartition(settings.topic_prefix + topics.RAW.name, 3)
    await publisher.publish(clients.Message(*place, None, b"%d" % n, n, []) for n in range(30))
    await deleted(settings, place, 10)
    lost = metrics.SINK_LOST.labels("archive")
    before = lost._value.get()
    async with sinking(settings.model_copy(update={"archive_seconds": 3600.0}), "archive"):
        for begin in (10, 20, 30):
            await deleted(settings, place, begin)
            other = member(settings, "archive", 200, 1_000)
            await other.start()
            other.subscribe([place.topic], listener=(joined := Assignment()))

            async def given(joined: Assignment = joined) -> bool:
                return joined.places is not None

            await until(given, 60)
            await other.stop()

            async def counted(begin: int = begin) -> bool:
                return bool(lost._value.get() - before >= begin)

            await until(counted, 60)
            assert lost._value.get() - before == begin


async def test_a_sink_without_partitions_waits_for_some(
    settings: Settings, publisher: clients.Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "METADATA_MS", 500)
    async with sinking(settings, "archive") as shell:
        await until(lambda: says(shell, None), 60)
        await unmake(settings, *topics.ARCHIVED)
        await asyncio.sleep(3)
        await clients.prepare(settings)
        await publisher.publish([clients.Message(settings.topic_prefix + topics.RAW.name, 3, None, b"0", 0, [])])
        await archived(settings)


class Dying(Archive):
    """It is killed after so many steps."""

    steps = 1_000

    def put(self, span: Span, tables: Iterable[Any]) -> int:
        self._step()
        return super().put(span, tables)

    def remove(self, span: Span) -> None:
        self._step()
        super().remove(span)

    def _step(self) -> None:
        if not self.steps:
            raise KeyboardInterrupt
        self.steps -= 1


def made(begin: int, end: int) -> list[Entry]:
    headers = [("kind", b"slice"), ("recv", b"[[\xff\x00,1]]"), ("kind", b"again")]
    return [
        Entry(3, offset, offset, b"k" if offset % 2 else None, headers, b"\x00" * offset if offset % 3 else None)
        for offset in range(begin, end)
    ]


@pytest.mark.parametrize("steps", range(5))
async def test_a_merge_cut_short_anywhere_loses_nothing_and_is_finished_later(settings: Settings, steps: int) -> None:
    archive = Dying(settings)
    topic = settings.topic_prefix + topics.RAW.name
    hour: Hour = (topic, 3, 0)
    for begin, end in ((0, 100), (100, 250), (100, 300), (300, 310), (400, 410), (410, 2_000)):
        archive.put(Span(begin, end, 0, topic, 3), [table_of(made(begin, end))])

    async def held() -> list[Entry]:
        async with open_history(settings, "archive", topics.RAW, 3) as log:
            halves = [log.batches(0, 310), log.batches(400, log.end)]
            return [entry for half in halves async for entries in half for entry in entries]

    archive.steps = steps
    with pytest.raises(KeyboardInterrupt):
        merge(archive, hour)
    assert await held() == [*made(0, 310), *made(400, 2_000)]
    archive.steps = 1_000
    assert mergeable(archive.spans(topic)) == {hour}
    merge(archive, hour)
    assert sorted(span[:2] for span in archive.spans(topic)) == [(0, 310), (400, 2_000)]
    assert await held() == [*made(0, 310), *made(400, 2_000)]


async def test_a_reader_goes_on_when_a_merge_takes_its_file(settings: Settings) -> None:
    archive = Archive(settings)
    topic = settings.topic_prefix + topics.RAW.name
    for begin in range(0, 40, 10):
        archive.put(Span(begin, begin + 10, 0, topic, 3), [table_of(made(begin, begin + 10))])
    async with open_history(settings, "archive", topics.RAW, 3) as log:
        batches = log.batches(5, 38)
        read = await anext(batches)
        merge(archive, (topic, 3, 0))
        read += [entry async for entries in batches for entry in entries]
        assert read == made(5, 38)
        assert await log.first_since(17) == 17
        assert await timestamp_at(log, 39) == 39
        assert await log.first_since(40) == log.end == 40


@pytest.mark.parametrize("left", [1, 0])
async def test_who_reads_what_retention_just_took_is_told_so(
    settings: Settings, publisher: clients.Publisher, left: int
) -> None:
    place = TopicPartition(settings.topic_prefix + topics.RAW.name, 3)
    await publisher.publish(clients.Message(*place, None, b"%d" % n, n, []) for n in range(10))
    async with open_history(settings, "kafka", topics.RAW, 3) as log:
        await deleted(settings, place, 10 - left)
        with pytest.raises(TapedeckError, match=rf"\[3\] lost records 2 to {9 - left} to retention"):
            await anext(log.batches(2, log.end))


async def test_what_ends_a_transaction_takes_an_offset_and_is_no_record_that_is_missing(
    settings: Settings, publisher: clients.Publisher
) -> None:
    """As where somebody copies a log in transactions."""
    for first in (0, 2):
        await send_in_transaction(
            settings, [RawRecord(3, n, "tick", 1, n, [(n, 1)], b"%d" % n) for n in (first, first + 1)]
        )
    async with open_history(settings, "kafka", topics.RAW, 3) as log:
        assert log.end == 6
        read = [entry async for entries in log.batches(0, log.end) for entry in entries]
        assert [(entry.offset, entry.value) for entry in read] == [(0, b"0"), (1, b"1"), (3, b"2"), (4, b"3")]
        assert [await timestamp_at(log, offset) for offset in range(6)] == [0, 1, 1, 2, 3, 3]
    assert await dump(settings, Path("/dev/null")) == 4
