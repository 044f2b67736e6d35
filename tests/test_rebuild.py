"""Tables damaged by hand are found out, and made whole again from the raw log."""

import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from conftest import Spawn, until
from pydantic import SecretStr
from sinking import row_of
from test_processor import Line, market_log
from test_sinks_mayhem import canonical

from processors.compute import FILES, compute
from processors.settings import PipelineSettings
from schemas import events, rest, topics
from schemas.events import MINUTE_NS
from schemas.partition import partition_of
from schemas.raw import RawRecord, read_log
from sinks import tables
from tapedeck import cli
from tapedeck import kafka as clients
from tapedeck.dump import dump
from tapedeck.errors import TapedeckError
from tapedeck.history import Source, open_history
from tapedeck.settings import Settings

TABLES = ["crypto_trades", "crypto_quotes", "crypto_aggregates", "crypto_aggregates_history", "vendor_bars"]
KINDS = ["bars", "trades", "quotes"]
Rows = dict[str, list[tuple[Any, ...]]]
Found = dict[str, Counter[str]]


class Tape:
    """A line that has worked off its log, and its tables."""

    def __init__(self, settings: Settings, folder: Path, db: asyncpg.Connection, records: list[RawRecord]) -> None:
        self.settings = settings
        self.folder = folder
        self.db = db
        self.begin = datetime.fromtimestamp(records[0].timestamp_ms // 1000, UTC)
        self.end = datetime.fromtimestamp(records[-1].timestamp_ms // 1000 + 60, UTC)

    async def rebuild(self, kind: str, apply: bool = False, source: Source = "kafka", **others: Any) -> Found:
        """What `tapedeck rebuild` found: how many of each difference in each table. What it cannot tell is told."""
        out = self.folder / "differences.ndjson"
        settings = self.settings.model_copy(update=others)
        day = self.begin.replace(hour=0, minute=0, second=0)  # longer bars must lie whole in the stretch
        since, until = (round(time.timestamp() * 10**9) for time in (day, self.end))
        with pytest.MonkeyPatch.context() as patch:  # either way, without starting processes too often
            patch.setattr(cli, "PROCESSES", 2 if kind == "bars" else 1)
            code = await cli._rebuild(settings, kind, since, until, source, not apply, out)
        found: Found = {}
        for text in out.read_text().splitlines():
            entry = json.loads(text)
            assert (entry["standing"] is None) is (entry["difference"] == "missing")
            found.setdefault(entry["table"], Counter())[entry["difference"]] += 1
        wrong = sum(count[kind] for count in found.values() for kind in ("missing", "extra", "changed"))
        assert code == (0 if apply or not wrong else 1)
        return found

    async def rows(self) -> Rows:
        """All of them, but for when a bar's history came."""
        found: Rows = {}
        for name in TABLES:
            (columns,) = await self.db.fetchrow(
                "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute "
                "WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attname <> 'stored_at'",
                name,
            )
            found[name] = sorted((tuple(row) for row in await self.db.fetch(f"SELECT {columns} FROM {name}")), key=repr)
        return found


@pytest.fixture
async def tape(settings: Settings, spawn: Spawn, tmp_path: Path) -> AsyncIterator[Tape]:
    """Forty minutes of a market, with repairs of some of its minutes."""
    archive: dict[str, Any] = {"archive_url": SecretStr(str(tmp_path / "archive")), "archive_seconds": 0.5}
    settings = settings.model_copy(update=archive)
    records = market_log(tmp_path, rate=5, seconds=2_400)
    line = Line(settings, spawn)
    await line.start()
    await line.send(records)
    await send_repairs(line, records)
    worker, sink = line.work("only"), spawn("sink", "all", connect_timeout_s=60, **archive)
    await line.done(120)
    await line.stop()
    db = await asyncpg.connect(settings.database_url.get_secret_value())
    names = [settings.topic_prefix + topic.name for table in tables.ALL for topic in table.topics]
    places = [TopicPartition(name, number) for name in names for number in range(topics.PARTITIONS)]
    ends = await clients.ends(settings, places)
    raw = {
        topic: sum((await clients.ends(settings, raw_places(settings, topic))).values()) for topic in topics.ARCHIVED
    }

    async def stored() -> bool:
        return bool(await db.fetchval("SELECT sum(next_offset) FROM sink_offsets") == sum(ends.values()))

    await until(stored, 60)

    async def archived() -> bool:
        return all([await in_archive(settings, topic) == count for topic, count in raw.items()])

    await until(archived, 60)
    for process in (worker, sink):
        process.popen.kill()
    yield Tape(settings, tmp_path, db, records)
    await db.close()


def raw_places(settings: Settings, topic: topics.Topic) -> list[TopicPartition]:
    return [TopicPartition(settings.topic_prefix + topic.name, number) for number in range(topics.PARTITIONS)]


async def in_archive(settings: Settings, topic: topics.Topic) -> int:
    count = 0
    for number in range(topics.PARTITIONS):
        async with open_history(settings, "archive", topic, number) as log:
            count += log.end
    return count


async def send_repairs(line: Line, records: list[RawRecord]) -> None:
    """What REST says of some minutes: two trades, of which the feed brought one as well; of others that it was empty,
    or an aggregate."""
    publisher = clients.Publisher(line.settings)
    await publisher.start()
    first = records[0].timestamp_ms * 10**6
    for number, (pair, back) in enumerate([("BTC-USD", 5), ("ETH-USD", 6), ("SOL-USD", 7), ("BTC-USD", 5)], 1):
        minute = first - first % MINUTE_NS + back * MINUTE_NS
        trades = [
            b'{"participant_timestamp":%d,"price":%d.5,"size":1.25,"exchange":1,"id":"r%d","conditions":[1]}'
            % (minute + place * 10**9 + 123, 100 + number, place)
            for place in range(number % 3 * 2)
        ]
        for headers, value in rest.records_of(number, pair, minute, "trades", trades, minute + MINUTE_NS):
            message = clients.Message(
                line.settings.topic_prefix + topics.RAW_REST.name,
                partition_of(pair),
                None,
                value,
                records[-1].timestamp_ms,
                headers,
            )
            await publisher.publish([message])
    await publisher.stop()


DAMAGE = """
DELETE FROM crypto_trades WHERE n % 7 = 0;
UPDATE crypto_trades SET price = price * 2 WHERE n % 11 = 0;
INSERT INTO crypto_trades SELECT (jsonb_populate_record(t, jsonb_build_object('trade_id', trade_id || 'x'))).*
    FROM crypto_trades t WHERE n % 13 = 0;
DELETE FROM crypto_quotes WHERE n % 7 = 0;
UPDATE crypto_quotes SET bid_size = NULL WHERE n % 11 = 0;
INSERT INTO crypto_quotes SELECT (jsonb_populate_record(t, jsonb_build_object('n', n + 10000000))).*
    FROM crypto_quotes t WHERE n % 13 = 0;
DELETE FROM crypto_aggregates WHERE start / 60000000000 % 10 = 0;
DELETE FROM crypto_aggregates_history WHERE start / 60000000000 % 10 = 1;
UPDATE crypto_aggregates SET revision = revision + 50, close = 1 WHERE start / 60000000000 % 10 = 2;
UPDATE crypto_aggregates_history SET flags = '{late}' WHERE start / 60000000000 % 10 = 3 AND flags = '{}';
INSERT INTO crypto_aggregates SELECT (jsonb_populate_record(t, jsonb_build_object('symbol', 'NO-USD'))).*
    FROM crypto_aggregates t WHERE start / 60000000000 % 10 = 4 AND symbol = 'BTC-USD';
INSERT INTO crypto_aggregates_history
    SELECT (jsonb_populate_record(t, jsonb_build_object('revision', revision + 1000))).*
    FROM crypto_aggregates_history t WHERE start / 60000000000 % 10 = 5;
UPDATE vendor_bars SET vwap = NULL WHERE n % 3 = 0;
INSERT INTO vendor_bars SELECT (jsonb_populate_record(t, jsonb_build_object('n', n + 10000000))).*
    FROM vendor_bars t WHERE n % 5 = 0;
DELETE FROM vendor_bars WHERE n % 2 = 0;
"""


ALL = {
    name: {"missing", "extra", "changed"}
    for name in ("crypto_trades", "crypto_quotes", "crypto_aggregates", "crypto_aggregates_history", "vendor_bars")
}


@pytest.mark.timeout(600)  # a line at work, and twenty rebuilds
async def test_tables_are_what_the_log_and_the_archive_make_and_damaged_by_hand_become_so_again(
    tape: Tape, tmp_path: Path
) -> None:
    before = await tape.rows()
    assert all(before.values())
    await assert_computed(tape, tmp_path)
    for kind in KINDS:
        assert await tape.rebuild(kind) == {}
        assert await tape.rebuild(kind, source="archive") == {}
    await tape.db.execute(DAMAGE)
    damaged = await tape.rows()
    found = {name: set(count) for kind in KINDS for name, count in (await tape.rebuild(kind)).items()}
    assert found == ALL
    assert await tape.rows() == damaged
    for kind in KINDS:
        assert await tape.rebuild(kind, apply=True)
    assert await tape.rows() == before
    await tape.db.execute(DAMAGE)
    for kind in KINDS:
        await tape.rebuild(kind, apply=True, source="archive")
    assert await tape.rows() == before
    await assert_others_bars_are_left_alone(tape, before)
    await assert_nothing_is_deleted_on_the_word_of_a_log_that_retention_cut(tape, before)


async def assert_computed(tape: Tape, folder: Path) -> None:
    """By `tapedeck compute`, which knows nothing of REST."""
    await dump(tape.settings, folder / "raw.ndjson")
    with (folder / "raw.ndjson").open("rb") as lines:
        read = ((line.offset, record) for line, record in read_log(lines))
        compute(read, folder / "out", PipelineSettings(), close=False)
    live = {
        "trades.v1": ("crypto_trades", "epoch >= 0"),
        "quotes.v1": ("crypto_quotes", "true"),
        "bars.vendor.v1": ("vendor_bars", "true"),
        "bars.1m.v1": ("crypto_aggregates_history", "interval = '1m' AND repair = 0"),
    }
    for topic, (table, which) in live.items():
        decode = msgspec.json.Decoder(reduce(or_, next(t.values for t in topics.ALL if t.name == topic))).decode
        made = map(decode, (folder / "out" / FILES[topic]).read_bytes().splitlines())
        rows = [dict(row) for row in await tape.db.fetch(f"SELECT * FROM {table} WHERE {which}")]
        expected = {canonical(row_of(event)) for event in made if not isinstance(event, events.MinuteClosed)}
        assert set(map(canonical, rows)) == expected, topic


async def assert_others_bars_are_left_alone(tape: Tape, before: Rows) -> None:
    """Bars that were made with other settings are told apart from wrong ones, and stay."""
    others = {"anomalies": {"price_spike": {"deviations": 8}}}
    found = await tape.rebuild("bars", apply=True, **others)
    assert {name: set(count) for name, count in found.items()} == {
        "crypto_aggregates": {"foreign"},
        "crypto_aggregates_history": {"foreign"},
    }
    assert await tape.rows() == before


async def assert_nothing_is_deleted_on_the_word_of_a_log_that_retention_cut(tape: Tape, before: Rows) -> None:
    """What is left is shorter than the pipeline's memory, then nothing is."""
    places = raw_places(tape.settings, topics.RAW)
    ends = await clients.ends(tape.settings, places)
    admin = AIOKafkaAdminClient(**tape.settings.kafka_options())
    await admin.start()
    for share in (40, 1):
        await admin.delete_records({place: RecordsToDelete(before_offset=end // share) for place, end in ends.items()})
        for kind in ("bars", "trades"):
            with pytest.raises(TapedeckError, match="deleted up to there" if share > 1 else "holds nothing"):
                await tape.rebuild(kind, apply=True)
        assert await tape.rows() == before
    await admin.close()
