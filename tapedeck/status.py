"""What `tapedeck status` knows of a line: from Kafka, PostgreSQL and the archive, each of which may be away."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import asyncpg
import msgspec
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from schemas import topics
from tapedeck import database, kafka, logdirs
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings

PATIENCE_S = 15.0
DAY = "INTERVAL '24 hours'"


class Topic(msgspec.Struct):
    """Records that it holds now, and that were ever in it; `bytes` None where the broker does not say. `lag` is how
    many records each consumer group has not worked off."""

    name: str
    records: int
    end: int
    bytes: int | None
    lag: dict[str, int]


class Newest(msgspec.Struct):
    """The newest row of a symbol in a table."""

    table: str
    symbol: str
    time_ns: int
    age_s: float


class Gap(msgspec.Struct):
    """A gap, once for all its partitions."""

    reason: str
    since_ns: int | None
    until_ns: int
    streams: list[str]
    pairs: list[str]


class Size(msgspec.Struct):
    """A table, indexes included; `rows` is PostgreSQL's own estimate."""

    table: str
    rows: int
    bytes: int


class Tables(msgspec.Struct):
    """`gaps` are those still open, by reason, each once for all its partitions. `minutes_with_gap` are 1m bars of the
    day before the newest gap that no repair has replaced. `anomalies` is by kind, of the day before the newest one."""

    newest: list[Newest]
    gaps: dict[str, int]
    recent_gaps: list[Gap]
    minutes_with_gap: int
    kept_aside: dict[str, int]
    anomalies: dict[str, int]
    sizes: list[Size]


class Archived(msgspec.Struct):
    """A topic in the archive."""

    topic: str
    files: int
    bytes: int


class Status(msgspec.Struct):
    """Of a part that could not be asked, `trouble` says why."""

    topics: list[Topic] | None = None
    tables: Tables | None = None
    archive: list[Archived] | None = None
    trouble: dict[str, str] = {}


async def look(settings: Settings) -> Status:
    """Asks all of them at once."""
    status = Status(trouble={})

    async def part(name: str, asked: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asked
        except TimeoutError:
            status.trouble[name] = f"no answer within {PATIENCE_S:g} s"
        except (TapedeckError, KafkaError, *database.AWAY, *database.WRONG, asyncpg.PostgresError) as error:
            status.trouble[name] = str(error) or type(error).__name__
        return None

    brokers = part(f"Kafka at {settings.kafka_bootstrap_servers}", _topics(settings))
    tables = part(f"PostgreSQL at {database.where(settings)}", _tables(settings))
    archive = part("the archive", _archive(settings))
    status.topics, status.tables, status.archive = await asyncio.gather(brokers, tables, archive)
    return status


# -- Kafka ----------------------------------------------------------------------------------------


async def _topics(settings: Settings) -> list[Topic]:
    async with kafka.admin_client(settings) as admin:
        reader = await kafka.consumer(settings)
        try:
            names = [settings.topic_prefix + topic.name for topic in topics.ALL if topic is not topics.LEASE]
            there = set(await admin.list_topics())
            places = [
                TopicPartition(found["topic"], partition["partition"])
                for found in await admin.describe_topics([name for name in names if name in there])
                for partition in found["partitions"]
            ]
            begins, ends = await reader.beginning_offsets(places), await reader.end_offsets(places)
            lags = await _lags(admin, settings.topic_prefix, begins, ends)
            sizes = await _sizes(admin, places)
        finally:
            await reader.stop()
    return [
        Topic(
            name,
            sum(ends[place] - begins[place] for place in places if place.topic == name),
            sum(ends[place] for place in places if place.topic == name),
            sizes.get(name),
            lags.get(name, {}),
        )
        for name in names
        if name in there
    ]


async def _lags(
    admin: AIOKafkaAdminClient, prefix: str, begins: dict[TopicPartition, int], ends: dict[TopicPartition, int]
) -> dict[str, dict[str, int]]:
    """By topic and group. A group reads a topic if it has ever committed a place in it."""
    lags: dict[str, dict[str, int]] = {}
    for group, *_ in await admin.list_consumer_groups():
        if not group.startswith(f"{prefix}tapedeck-"):
            continue
        committed = await admin.list_consumer_group_offsets(group)
        for topic in sorted({place.topic for place in committed}):
            lags.setdefault(topic, {})[group.removeprefix(f"{prefix}tapedeck-")] = sum(
                max(0, end - (committed[place].offset if place in committed else begins[place]))
                for place, end in ends.items()
                if place.topic == topic
            )
    return lags


async def _sizes(admin: AIOKafkaAdminClient, places: list[TopicPartition]) -> dict[str, int]:
    """None where this user may not ask."""
    wanted: dict[str, list[int]] = {}
    for place in places:
        wanted.setdefault(place.topic, []).append(place.partition)
    try:
        return dict(await logdirs.sizes(admin, wanted))
    except KafkaError:
        return {}


# -- PostgreSQL -----------------------------------------------------------------------------------

NEWEST = {
    "crypto_trades": ("ts_event", "true"),
    "crypto_quotes": ("ts_event", "true"),
    "vendor_bars": ("start", "true"),
    "crypto_aggregates": ("start", "interval = '1m'"),
}
# From symbol to symbol by the index: the rows between are not looked at.
_NEWEST = """
    WITH RECURSIVE s AS (
        (SELECT symbol FROM {table} ORDER BY symbol LIMIT 1)
        UNION ALL
        SELECT (SELECT symbol FROM {table} WHERE symbol > s.symbol ORDER BY symbol LIMIT 1) FROM s
        WHERE symbol IS NOT NULL
    )
    SELECT s.symbol, n.at FROM s CROSS JOIN LATERAL (
        SELECT {ns} AS at FROM {table} t WHERE t.symbol = s.symbol AND {only} ORDER BY t.time DESC LIMIT 1
    ) n ORDER BY 1
"""
_KEPT_ASIDE = ("dead_letters", "sink_dead_letters", "sink_losses", "quarantine")
_SIZES = """
    SELECT c.relname, {rows}, {size}
    FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname !~ 'yoyo'
    ORDER BY 3 DESC, 1
"""


async def _tables(settings: Settings) -> Tables | None:
    """None where there are no tables yet."""
    try:
        db = await database.open_connection(settings)
    except ValueError:  # its text may quote the password
        raise UsageError(database.NOT_PLAIN) from None
    try:
        if await db.fetchval("SELECT to_regclass('open_gaps')") is None:
            return None
        now_ns = time.time_ns()
        newest = []
        for table, (ns, only) in NEWEST.items():
            for symbol, at in await db.fetch(_NEWEST.format(table=table, ns=ns, only=only)):
                newest.append(Newest(table, symbol, at, round((now_ns - at) / 1e9, 3)))
        gaps = await db.fetch(
            'SELECT reason, count(DISTINCT ("from", "to", streams, pairs)) FROM open_gaps GROUP BY 1 ORDER BY 1'
        )
        recent = await db.fetch(
            'SELECT DISTINCT reason, "from", "to", streams, pairs FROM open_gaps WHERE reason <> \'start\' '
            'ORDER BY "to" DESC LIMIT 5'
        )
        flagged = await db.fetchval(
            "SELECT count(*) FROM crypto_aggregates WHERE interval = '1m' AND 'gap' = ANY(flags) AND repair = 0 "
            f"AND time > (SELECT max(time) - {DAY} FROM gaps)"
        )
        anomalies = await db.fetch(
            f"SELECT kind, count(*) FROM anomalies WHERE time > (SELECT max(time) - {DAY} FROM anomalies) "
            "GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        aside = {name: await db.fetchval(f"SELECT count(*) FROM {name}") for name in _KEPT_ASIDE}
        hypertables = await db.fetchval("SELECT to_regproc('hypertable_size') IS NOT NULL")
        rows, size = "greatest(c.reltuples, 0)::bigint", "pg_total_relation_size(c.oid)"
        if hypertables:  # their rows are in others
            rows, size = "approximate_row_count(c.oid)", f"coalesce(hypertable_size(c.oid), {size})"
        sizes = await db.fetch(_SIZES.format(rows=rows, size=size))
        return Tables(
            newest,
            dict(gaps),
            [Gap(*row) for row in recent],
            flagged,
            aside,
            dict(anomalies),
            [Size(*row) for row in sizes],
        )
    finally:
        db.terminate()


# -- archive --------------------------------------------------------------------------------------


async def _archive(settings: Settings) -> list[Archived] | None:
    """None where there is none."""
    if not settings.archive_url:
        return None
    from tapedeck.archive import Archive  # pyarrow takes its time to load

    archive = await asyncio.to_thread(Archive, settings)
    found = []
    for topic in topics.ARCHIVED:
        sizes = await asyncio.to_thread(archive.sizes, settings.topic_prefix + topic.name)
        found.append(Archived(settings.topic_prefix + topic.name, len(sizes), sum(sizes.values())))
    return found
