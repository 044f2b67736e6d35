"""One batch and the offsets it came from, in one transaction, guarded. What makes a sink exactly once."""

from collections.abc import Iterable, Mapping
from typing import Any

import asyncpg
from aiokafka import TopicPartition

from sinks.tables import Table

#: The rows themselves are at fault, not the database: writing them again will not help.
REFUSED = (
    ValueError,
    OverflowError,
    RecursionError,
    asyncpg.DataError,
    asyncpg.NotNullViolationError,
    asyncpg.CheckViolationError,
    asyncpg.ProgramLimitExceededError,
)


class Fenced(Exception):
    """Another sink owns a partition: its offset is not where we left it. Nothing was written."""


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


async def stage(connection: asyncpg.Connection, table: Table) -> None:
    """The session's staging table, empty at each commit; once for each connection."""
    await connection.execute(
        f"CREATE TEMP TABLE IF NOT EXISTS staged ON COMMIT DELETE ROWS AS SELECT * FROM {table.name} WITH NO DATA"
    )


async def write(
    connection: asyncpg.Connection,
    table: Table,
    rows: list[tuple[Any, ...]],
    moves: Mapping[TopicPartition, tuple[int, int]],
) -> int:
    """Writes rows and moves offsets (place to expected and new) together; returns the rows changed.

    Raises Fenced when any offset is not the expected one, and what asyncpg raises; either way nothing is
    written and nothing moved. The offsets are touched, and so locked, only when the rows have arrived: from
    then on a process that freezes is idle in its transaction, and the server ends that (database.py).
    """
    async with connection.transaction():
        if rows:
            await connection.copy_records_to_table("staged", records=rows, columns=list(table.columns))
        moved = await connection.fetch(
            "UPDATE sink_offsets AS o SET next_offset = m.new "
            "FROM unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[]) AS m(topic, partition, expected, new) "
            "WHERE o.sink = $1 AND o.topic = m.topic AND o.partition = m.partition AND o.next_offset = m.expected "
            "RETURNING o.topic, o.partition",
            table.name,
            [place.topic for place in moves],
            [place.partition for place in moves],
            [expected for expected, _ in moves.values()],
            [new for _, new in moves.values()],
        )
        if len(moved) != len(moves):
            lost = set(moves) - {TopicPartition(row["topic"], row["partition"]) for row in moved}
            raise Fenced(f"the offsets of {', '.join(f'{t}[{p}]' for t, p in sorted(lost))} are not ours")
        status: str = await connection.execute(table.insert) if rows else "INSERT 0 0"
        return int(status.rsplit(" ", 1)[1])
