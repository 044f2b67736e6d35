"""What a rebuild takes for wrong in tables, and how it puts it right, on a PostgreSQL without a log."""

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from decimal import Decimal

import asyncpg
import pytest
from aiokafka import TopicPartition
from sinking import START_NS, bar, trade

from schemas import events, topics
from schemas.events import MINUTE_NS
from sinks import tables, writer
from sinks.mend import Bounds, mending
from tapedeck import database
from tapedeck.settings import Settings
from tapedeck.storage import LOADED

UNTIL_NS = START_NS + MINUTE_NS
BOUNDS = Bounds(START_NS, UNTIL_NS, 0, UNTIL_NS, False, False, "f", {})
PLACE = TopicPartition("any", 0)


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """As a sink has it, with its tables."""
    await database.prepare(settings)
    connection = await database.open_connection(settings)
    yield connection
    connection.terminate()


async def store(db: asyncpg.Connection, table: tables.Table, made: Iterable[events.Trade | events.Bar]) -> int:
    """As a sink does; how many rows it changed."""
    await writer.stage(db, table)
    at = (await writer.offsets(db, table, [PLACE]))[PLACE]
    lines = [table.line(events.encode(event)) or b"" for event in made]
    return await writer.write(db, table, lines, {PLACE: (at, at + len(lines))})


async def compared(
    settings: Settings, due: Sequence[events.Trade | events.Bar], bounds: Bounds, apply: bool
) -> dict[str, int]:
    """How many trades, or bars of an hour, by difference."""

    async def known() -> Bounds:
        return bounds

    kind, topic = ("bars", topics.ROLLUPS["1h"]) if isinstance(due[0], events.Bar) else ("trades", topics.TRADES)
    async with mending(settings, kind, bounds.since, bounds.until) as mend:
        await mend.stage(topic.name, tables.copied(topic.name, map(events.encode, due)))
        found: Counter[str] = Counter()
        for (_, difference), count in (await mend.compare(known, apply, 0)).items():
            found[difference] += count
        return found


async def test_what_rest_has_said_since_the_log_was_read_is_not_taken_for_wrong(
    settings: Settings, db: asyncpg.Connection
) -> None:
    live, repaired = trade(0), trade(1, epoch=-3, flags=["repaired"])
    await store(db, tables.TRADES, [live, repaired])
    moves = BOUNDS._replace(moves=True, repairs_move=True)
    assert await compared(settings, [live], moves, apply=True) == {"beyond": 1}
    assert await compared(settings, [live], BOUNDS._replace(moves=True), apply=True) == {"extra": 1}
    assert await compared(settings, [live], BOUNDS, apply=False) == {}


async def test_a_longer_bar_that_a_late_word_revised_stands_where_the_log_goes_on(
    settings: Settings, db: asyncpg.Connection
) -> None:
    """A word about a gap, which came later than the log was read."""
    end = START_NS + 60 * MINUTE_NS
    hour = [bar(0, order, interval="1h", end=end) for order in (4, 5)]
    await store(db, tables.BARS, hour)
    bounds = BOUNDS._replace(until=START_NS + 60 * MINUTE_NS, settled=START_NS + 90 * MINUTE_NS)
    assert await compared(settings, hour[:1], bounds._replace(moves=True), apply=True) == {"beyond": 2}
    assert await compared(settings, hour[:1], bounds, apply=False) == {"changed": 1, "extra": 1}
    await store(
        db, tables.BARS, [bar(0, 6, interval="1h", end=end, close=Decimal(3))]
    )  # which no word about a gap does
    found = await compared(settings, hour[:1], bounds._replace(moves=True), apply=True)
    assert found == {"changed": 1, "extra": 1, "beyond": 1}


@pytest.fixture
async def timescale(db: asyncpg.Connection) -> asyncpg.Connection:
    if await db.fetchval(LOADED) is None:
        pytest.skip("this PostgreSQL has no TimescaleDB")
    return db


async def pack(db: asyncpg.Connection, table: str) -> None:
    """Puts all chunks into the columnstore."""
    for (chunk,) in await db.fetch("SELECT show_chunks($1)::text", table):
        await db.execute(f"CALL convert_to_columnstore('{chunk}')")


async def packed(db: asyncpg.Connection) -> list[bool]:
    """By day of trades, whether all rows are in the columnstore."""
    chunks = await db.fetch("SELECT show_chunks('crypto_trades')::text AS name ORDER BY name")
    return [await db.fetchval(f"SELECT pg_relation_size('{chunk['name']}') = 0") for chunk in chunks]


# On the two days after: more than TimescaleDB unpacks in one transaction by itself.
MANY = """
    INSERT INTO crypto_trades SELECT (jsonb_populate_record(
        t, jsonb_build_object('time', t.time + day * INTERVAL '1 day', 'trade_id', more, 'n', more)
    )).* FROM crypto_trades t, generate_series(1, 2) day, generate_series(1, 55000) more
"""
DAMAGE = """
    DELETE FROM crypto_trades WHERE trade_id = '0-1'; UPDATE crypto_trades SET price = 3 WHERE trade_id = '0-2';
    INSERT INTO crypto_trades SELECT (jsonb_populate_record(t, '{"trade_id": "x"}')).* FROM crypto_trades t
    WHERE trade_id = '0-3'
"""


async def test_rows_in_the_columnstore_are_put_right_and_of_no_other_day_unpacked(
    settings: Settings, timescale: asyncpg.Connection
) -> None:
    due = [trade(n) for n in range(9)]
    await store(timescale, tables.TRADES, due[:1])
    await timescale.execute(MANY)
    await store(timescale, tables.TRADES, due[1:])
    await timescale.execute(DAMAGE)
    await pack(timescale, "crypto_trades")
    assert await compared(settings, due, BOUNDS, apply=True) == {"missing": 1, "changed": 1, "extra": 1}
    assert await compared(settings, due, BOUNDS, apply=True) == {}
    assert await packed(timescale) == [False, True, True]


async def test_bars_of_many_symbols_in_the_columnstore_are_replaced_by_higher_orders(
    timescale: asyncpg.Connection,
) -> None:
    symbols = [f"{number}-USD" for number in range(120)]
    minutes = [START_NS + number * MINUTE_NS for number in range(900)]
    for symbol in symbols:
        await store(
            timescale, tables.BARS, [bar(symbol=symbol, start=start, end=start + MINUTE_NS) for start in minutes]
        )
    await pack(timescale, "crypto_aggregates")
    await pack(timescale, "crypto_aggregates_history")
    again = [bar(1, symbol=symbol, start=minutes[7], end=minutes[8], close=Decimal(3)) for symbol in symbols]
    assert await store(timescale, tables.BARS, again) == len(symbols)
