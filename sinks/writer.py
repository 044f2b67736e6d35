"""One batch and the offsets it came from, in one transaction, guarded. What makes a sink exactly once."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from aiokafka import TopicPartition

from sinks.tables import FIRST_STAYS, Table

#: Of more rows than this in one batch (history, or catching up) listeners learn the number alone.
TOLD_ROWS = 100

Moves = Mapping[TopicPartition, tuple[int, int]]


class Fenced(Exception):
    """Another sink owns a partition: its offset is not where we left it. Nothing was written."""


class Refused(NamedTuple):
    """A record of Kafka's that makes no row of its table, and why."""

    record: Any
    reason: str


def row_is_refused(error: BaseException) -> bool:
    """Whether the rows themselves are at fault, not the database: writing them again will not help."""
    at_fault = (
        asyncpg.DataError,
        asyncpg.NotNullViolationError,
        asyncpg.CheckViolationError,
        asyncpg.ProgramLimitExceededError,
    )
    # The limit may also be that of the queue of notifications, which a listener that hangs fills up.
    return isinstance(error, at_fault) and "NOTIFY" not in str(error)


async def offsets(
    connection: asyncpg.Connection, table: Table, places: Iterable[TopicPartition]
) -> dict[TopicPartition, int]:
    """Where to read on in each place: the database knows, Kafka's own offsets are for display."""
    wanted = list(places)
    await connection.executemany(
        "INSERT INTO sink_offsets VALUES ($1, $2, $3, 0) ON CONFLICT DO NOTHING",
        [(table.name, *place) for place in wanted],
    )
    found = await connection.fetch(
        "SELECT topic, partition, next_offset FROM sink_offsets WHERE sink = $1 AND topic = ANY($2)",
        table.name,
        list({place.topic for place in wanted}),
    )
    held = {TopicPartition(row["topic"], row["partition"]): row["next_offset"] for row in found}
    return {place: held[place] for place in wanted}


async def foreign(connection: asyncpg.Connection, table: Table, ids: Mapping[str, UUID]) -> dict[TopicPartition, int]:
    """The places, with their offsets, that were read in another topic of the same name. Notes the `ids`, by name, where
    none is noted or nothing was read yet."""
    names, found = list(ids), list(ids.values())
    await connection.execute(
        "UPDATE sink_offsets AS o SET topic_id = i.id FROM unnest($2::text[], $3::uuid[]) AS i(topic, id) "
        "WHERE o.sink = $1 AND o.topic = i.topic AND (o.topic_id IS NULL OR o.next_offset = 0 AND o.topic_id <> i.id)",
        table.name,
        names,
        found,
    )
    rows = await connection.fetch(
        "SELECT o.topic, o.partition, o.next_offset FROM sink_offsets AS o "
        "JOIN unnest($2::text[], $3::uuid[]) AS i(topic, id) USING (topic) WHERE o.sink = $1 AND o.topic_id <> i.id",
        table.name,
        names,
        found,
    )
    return {TopicPartition(row["topic"], row["partition"]): row["next_offset"] for row in rows}


async def stage(connection: asyncpg.Connection, table: Table) -> None:
    """The session's staging table, empty at each commit; once for each connection."""
    columns = ", ".join(f'"{column}"' for column in table.columns)
    await connection.execute(
        f"CREATE TEMP TABLE IF NOT EXISTS staged ON COMMIT DELETE ROWS AS SELECT {columns} FROM {table.name} "
        "WITH NO DATA"
    )


async def write(
    connection: asyncpg.Connection,
    table: Table,
    lines: Sequence[bytes],
    moves: Moves,
    refused: Sequence[Refused] = (),
    repeats: bool = False,
) -> int:
    """Writes rows and moves offsets (place to expected and new) together; returns the rows changed. Records that are
    `refused` are kept beside, whole; again after the offsets were set back, that is a no-op too. `repeats`: rows that
    stand there already are likely, which costs less where it is known.

    Raises Fenced when any offset is not the expected one, and what asyncpg raises; either way nothing is
    written and nothing moved. The offsets are touched, and so locked, only when the rows have arrived: from
    then on a process that freezes is idle in its transaction, and the server ends that (database.py).
    """
    async with connection.transaction():
        if lines:
            await connection.copy_to_table("staged", source=source(lines), columns=list(table.columns))
        await _move(connection, table, moves)
        if refused:
            await connection.executemany(
                "INSERT INTO sink_dead_letters VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
                [(table.name, r.topic, r.partition, r.offset, why, r.key, r.value) for r, why in refused],
            )
        if not lines:
            return 0
        if table.channel:
            told = [row[0] for row in await connection.fetch(table.insert)]
            await _tell(connection, table.channel, told)
            return len(told)
        return await _insert(connection, table, len(lines), repeats)


async def lose(connection: asyncpg.Connection, table: Table, place: TopicPartition, at: int, begin: int) -> None:
    """Moves past records that the log no longer has, and notes which. Raises like `write`."""
    async with connection.transaction():
        await _move(connection, table, {place: (at, begin)})
        await connection.execute(
            "INSERT INTO sink_losses VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING", table.name, *place, at, begin
        )


async def source(lines: Sequence[bytes]) -> AsyncIterator[bytes]:
    """The lines as COPY wants them."""
    yield b"".join(lines)


_MOVE = """
    UPDATE sink_offsets AS o SET next_offset = m.new
    FROM unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[]) AS m(topic, partition, expected, new)
    WHERE o.sink = $1 AND o.topic = m.topic AND o.partition = m.partition AND o.next_offset = m.expected
    RETURNING o.topic, o.partition
"""


async def _move(connection: asyncpg.Connection, table: Table, moves: Moves) -> None:
    moved = await connection.fetch(
        _MOVE,
        table.name,
        [place.topic for place in moves],
        [place.partition for place in moves],
        [expected for expected, _ in moves.values()],
        [new for _, new in moves.values()],
    )
    if len(moved) != len(moves):
        lost = set(moves) - {TopicPartition(row["topic"], row["partition"]) for row in moved}
        raise Fenced(f"the offsets of {', '.join(f'{t}[{p}]' for t, p in sorted(lost))} are not ours")


async def _insert(connection: asyncpg.Connection, table: Table, staged: int, repeats: bool) -> int:
    """Returns the rows inserted. As if none were there already, which is a quarter cheaper and nearly always so; the
    log may hold a repeat, and offsets may have been set back."""
    if not repeats:
        try:
            plain = table.insert.removesuffix(FIRST_STAYS)
            await connection.execute(f"SAVEPOINT before; {plain}; RELEASE SAVEPOINT before")
            return staged
        except asyncpg.UniqueViolationError:
            await connection.execute("ROLLBACK TO SAVEPOINT before")
    status: str = await connection.execute(table.insert)
    return int(status.rsplit(" ", 1)[1])


async def _tell(connection: asyncpg.Connection, channel: str, told: Sequence[str]) -> None:
    """Listeners hear of it when, and only if, the transaction is committed."""
    if len(told) > TOLD_ROWS:
        told = [f'{{"many" : {len(told)}}}']
    await connection.execute("SELECT pg_notify($1, row) FROM unnest($2::text[]) AS row", channel, told)
