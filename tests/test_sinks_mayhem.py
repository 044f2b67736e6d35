"""Kill -9 of sinks, database and broker under load, with two instances of each sink: each record is written by one
transaction, and every event that was sent is accounted for, with nothing in gaps.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import psutil
import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from conftest import Process, Publish, Servers, Spawn, until
from sinking import quote, row_of, texts
from test_processor import disturbed

from bench.market import write_frames
from processors.compute import run
from processors.pipeline import Output
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import events, topics
from schemas.frames import read_frames
from schemas.raw import bytes_of
from sinks import tables
from tapedeck import database
from tapedeck import kafka as clients
from tapedeck.demo.reconcile import Reconciler
from tapedeck.demo.run import _fetch
from tapedeck.settings import Settings

# So many in each run of the tests, for each costs seconds, and all sinks in one process. By hand TAPEDECK_KILLS=50 and
# --timeout 0: then each sink is a process of its own.
HOW_MANY = int(os.environ.get("TAPEDECK_KILLS", "6"))
SINKS = ["all"] if HOW_MANY < 10 else ["trades", "quotes", "bars", "audit"]
IN_TURN = [kind for name in SINKS for kind in (name, "database", name, "broker", name)]

# A key lets the table hold a row once whoever writes it; this also counts the rows that it refused.
OFFERED = """
CREATE TABLE offered (name text);
CREATE FUNCTION offer() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO offered VALUES (TG_TABLE_NAME); RETURN NEW; END';
"""
KEPT = {table: table.name for table in tables.ALL} | {tables.BARS: "crypto_aggregates_history"}  # of bars, every order
READ = {topic.name for table in tables.ALL for topic in table.topics}


async def count_offered(db: asyncpg.Connection) -> None:
    await db.execute(OFFERED)
    for name in KEPT.values():
        await db.execute(f"CREATE TRIGGER offers BEFORE INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION offer()")


async def offered(db: asyncpg.Connection) -> dict[str, int]:
    return dict(await db.fetch("SELECT name, count(*) FROM offered GROUP BY 1"))  # type: ignore[arg-type]


async def open_db(settings: Settings) -> asyncpg.Connection:
    return await asyncpg.connect(settings.database_url.get_secret_value())


class Line:
    """Two processes of each sink and who publishes for them; both are started again when they die."""

    def __init__(self, settings: Settings, spawn: Spawn) -> None:
        self.settings = settings
        self._spawn = spawn
        self._publisher = clients.Publisher(settings)
        self.sinks: dict[tuple[str, str], Process] = {}

    async def start(self) -> None:
        await clients.prepare(self.settings)
        await self._publisher.start()
        for name in SINKS:
            for instance in ("a", "b"):
                self.start_sink(name, instance)

    async def stop(self) -> None:
        await self._publisher.stop()

    def start_sink(self, name: str, instance: str) -> None:
        """One of the same name takes up at once what the one before it had."""
        process = self._spawn("sink", name, worker_id=f"{name}-{instance}", connect_timeout_s=60, sink_batch_rows=500)
        self.sinks[name, instance] = process

    def supervise(self) -> None:
        """Who gave up is started again, as by any supervisor."""
        for (name, instance), process in self.sinks.items():
            if process.popen.poll() is not None:
                self.start_sink(name, instance)

    async def send(self, outputs: Iterable[tuple[int, Output]]) -> None:
        """As a worker does that is killed now and then: some of it twice, and all of a round that failed."""
        batches: dict[tuple[str, int], list[Output]] = defaultdict(list)
        for partition, output in outputs:
            batches[self.settings.topic_prefix + output.topic, partition].append(output)
        for first in range(0, max(map(len, batches.values()), default=0), 100):
            some = {place: records[max(0, first - 2) : first + 100] for place, records in batches.items()}
            while True:
                try:
                    await self._publisher.publish_batches(some)
                    break
                except (KafkaError, AssertionError):
                    await asyncio.sleep(0.5)
                    with contextlib.suppress(KafkaError, OSError):
                        await self._publisher.restart()
            await asyncio.sleep(0.05)

    async def records(self) -> dict[tables.Table, list[bytes]]:
        """The values that stand in the topics of each table."""
        found: dict[tables.Table, list[bytes]] = {}
        for table in tables.ALL:
            names = [self.settings.topic_prefix + topic.name for topic in table.topics]
            places = [TopicPartition(name, number) for name in names for number in range(topics.PARTITIONS)]
            values: list[bytes] = []
            reader = await clients.consumer(self.settings, *places)
            ends = await reader.end_offsets(places)
            while any([await reader.position(place) < ends[place] for place in places]):
                for records in (await reader.getmany(timeout_ms=500)).values():
                    values += [record.value for record in records]
            await reader.stop()
            found[table] = values
        return found

    async def moved(self) -> dict[str, int]:
        """By table, the sum of its offsets."""
        db = await open_db(self.settings)
        try:
            found = await db.fetch("SELECT sink, sum(next_offset)::bigint FROM sink_offsets GROUP BY 1")
            return dict(found)  # type: ignore[arg-type]
        finally:
            await db.close()


def market(folder: Path, events_wanted: int) -> tuple[list[bytes], list[tuple[int, Output]]]:
    """What a feed sent, as the reconciler reads it, and what the pipeline makes of it."""
    frames = folder / "market.ndjson"
    write_frames(frames, 20, events_wanted / 20, per_frame=10)
    sent = list(disturbed(read_frames(frames), 1))
    records = records_of(sent, SlicerSettings(), ["XT", "XQ", "XA"], ["*"])
    made = run(((record.n, record) for record in records), PipelineSettings())
    return [b'{"frame":%b}' % frame.data for frame in sent], [made for made in made if made[1].topic in READ]


def misfortunes() -> Iterator[str]:
    """In turn, then at random."""
    yield from IN_TURN[:HOW_MANY]
    yield from random.Random(1).choices(IN_TURN, k=max(0, HOW_MANY - len(IN_TURN)))


async def strike(kind: str, line: Line, servers: Servers, rng: random.Random) -> None:
    server = {"database": servers.database, "broker": servers.broker}.get(kind)
    if server is not None:
        server.kill()
        await asyncio.sleep(rng.choice((0, 0.5)))
        await asyncio.to_thread(server.restart)
    else:
        instance = rng.choice("ab")
        line.sinks[kind, instance].popen.kill()
        await asyncio.sleep(rng.choice((0, 0.5, 1)))
    line.supervise()


async def assert_each_once(
    db: asyncpg.Connection, records: dict[tables.Table, list[bytes]], outputs: list[tuple[int, Output]]
) -> None:
    """Every record that makes a row was written by one transaction, also those that a key then refused, and the rows
    are those that the pipeline made."""
    made: dict[str, set[bytes]] = defaultdict(set)
    for _, output in outputs:
        made[output.topic].add(output.value)
    times = await offered(db)
    for table, values in records.items():
        assert times.get(KEPT[table], 0) == sum(table.line(value) is not None for value in values), table.name
        found = map(decoded(table), set().union(*(made[topic.name] for topic in table.topics)))
        expected = [event for event in found if not isinstance(event, events.MinuteClosed)]
        assert await rows(db, KEPT[table]) == Counter(canonical(row_of(event)) for event in expected), table.name
        if table is tables.BARS:
            assert await rows(db, table.name) == Counter(canonical(row_of(bar)) for bar in highest(expected))


def decoded(table: tables.Table) -> Any:
    """The decoder of its records, whatever the sink makes of them."""
    types = [kind for topic in table.topics for kind in topic.values]
    return msgspec.json.Decoder(reduce(or_, types)).decode


async def rows(db: asyncpg.Connection, name: str) -> Counter[str]:
    return Counter(canonical(dict(row)) for row in await db.fetch(f"SELECT * FROM {name}"))


def canonical(row: dict[str, Any]) -> str:
    """A row digit by digit, whatever the order of the columns; not when it was stored."""
    return repr(sorted((name, value) for name, value in texts(row).items() if name != "stored_at"))


def highest(bars: list[events.Bar]) -> Iterable[events.Bar]:
    """Of each bar the highest order."""
    ordered = sorted(bars, key=lambda bar: (bar.repair, bar.revision))
    return {(bar.symbol, bar.interval, bar.start): bar for bar in ordered}.values()


async def assert_accounted_for(db: asyncpg.Connection, sent: list[bytes], outputs: list[tuple[int, Output]]) -> None:
    """The accounting equation, by the demo's own reconciler."""
    ends: dict[int, int] = {}
    for partition, output in outputs:
        if output.vouches:
            ends[partition] = events.decode_bar(output.value).end
    dead, quarantined = [
        [bytes_of(row["encoding"], row["payload"]) for row in await db.fetch(f"SELECT encoding, payload FROM {name}")]
        for name in ("dead_letters", "quarantine")
    ]
    reconciler = Reconciler(await _fetch(db), [], dead, quarantined, min(ends.values()))
    for line in sent:
        reconciler.line(line)
    report = reconciler.report()
    print(report)
    assert report.complaints(["XT", "XQ", "XA"]) == []
    assert report.sent.total() == (report.stored + report.duplicates + report.quarantined + report.deadletters).total()
    assert report.duplicates["XT"]
    assert report.bars_checked


async def test_no_kill_loses_or_doubles_an_event(
    settings: Settings, spawn: Spawn, servers: Servers, tmp_path: Path
) -> None:
    """Each strikes while the sinks are at work. What stands in the tables then is what the pipeline made, value by
    value, and what was sent, by code that shares nothing with it."""
    if servers.broker is None or servers.database is None:
        pytest.skip("broker and database are not ours to kill")
    rng = random.Random(1)
    sent, outputs = market(tmp_path, 6_000 * (HOW_MANY + 1))
    await database.prepare(settings)
    db = await open_db(settings)
    await count_offered(db)
    await db.close()
    line = Line(settings, spawn)
    await line.start()
    kinds = list(misfortunes())
    size = -(-len(outputs) // (len(kinds) + 1))
    pieces = [outputs[first : first + size] for first in range(0, len(outputs), size)]
    await line.send(pieces.pop(0))
    for kind, piece in zip(kinds, pieces, strict=True):
        table = next((table for table in tables.ALL if table.sink == kind), tables.QUOTES)
        before = (await line.moved()).get(table.name, 0)
        sending = asyncio.create_task(line.send(piece))

        async def at_work(name: str = table.name, before: int = before) -> bool:
            line.supervise()
            return (await line.moved()).get(name, 0) > before

        await until(at_work, 60)
        await strike(kind, line, servers, rng)
        await sending

    records = await line.records()
    ends = {table.name: len(values) for table, values in records.items()}

    async def all_taken() -> bool:
        line.supervise()
        moved = await line.moved()
        return all(moved.get(name, 0) >= end for name, end in ends.items())

    await until(all_taken, 120)
    assert await line.moved() == ends
    db = await open_db(settings)
    try:
        await assert_each_once(db, records, outputs)
        await assert_accounted_for(db, sent, outputs)
    finally:
        await db.close()
    await line.stop()


FREEZES = """
import os, signal
from pathlib import Path
from sinks import writer

async def freezing(*arguments):
    if Path("freeze").exists():
        Path("freeze").unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
    return await write(*arguments)

write, writer.write = writer.write, freezing
"""
UNGUARDED = """
from sinks import writer
guard = " AND o.next_offset = m.expected"
assert guard in writer._MOVE
writer._MOVE = writer._MOVE.replace(guard, "")
"""


@pytest.mark.parametrize("guarded", [True, False])
async def test_a_batch_that_was_frozen_while_another_took_over_is_written_twice_only_without_the_guard(
    settings: Settings, publish: Publish, spawn: Spawn, tmp_path: Path, guarded: bool
) -> None:
    """The smallest misfortune that the guard is for: a sink freezes with a batch in hand for longer than its session
    lasts, its twin writes that batch and more, and then it goes on where it was."""
    await database.prepare(settings)
    db = await open_db(settings)
    await count_offered(db)
    sink = ["sink", "quotes"]
    first = spawn(*sink, patch=FREEZES if guarded else UNGUARDED + FREEZES, connect_timeout_s=60)
    numbers = iter(range(10**6))
    sent = 0

    async def burst() -> None:
        nonlocal sent
        for partition in range(topics.PARTITIONS):
            await publish(topics.QUOTES, partition, [quote(next(numbers), partition)])
            sent += 1

    async def taken() -> bool:
        return bool(await db.fetchval("SELECT sum(next_offset) FROM sink_offsets") == sent)

    await burst()
    await until(taken, 60)
    (tmp_path / "freeze").touch()
    await burst()

    async def frozen() -> bool:
        return psutil.Process(first.popen.pid).status() == psutil.STATUS_STOPPED

    await until(frozen, 60)
    spawn(*sink, connect_timeout_s=60)
    await burst()
    await until(taken, 60)  # the twin has taken over
    first.popen.send_signal(signal.SIGCONT)

    async def awake() -> bool:
        fenced = "another sink has taken over" in first.log.read_text()
        return fenced or (await offered(db))["crypto_quotes"] > sent

    await until(awake, 60)
    await burst()
    await until(taken, 60)
    assert await db.fetchval("SELECT count(*) FROM crypto_quotes") == sent  # that is the key's work
    assert ((await offered(db))["crypto_quotes"] == sent) is guarded
    await db.close()
