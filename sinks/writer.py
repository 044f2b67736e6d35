"""One batch and the offsets it came from, in one transaction, guarded. What makes a sink exactly once."""

from collections.abc import Mapping
from typing import Any

import asyncpg

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


async def offsets(connection: asyncpg.Connection, table: Table, topic: str, partitions: list[int]) -> dict[int, int]:
    """Where to read on in each partition: the database knows, Kafka's own offsets are for display."""
    await connection.executemany(
        "INSERT INTO sink_offsets VALUES ($1, $2, $3, 0) ON CONFLICT DO NOTHING",
        [(table.name, topic, partition) for partition in partitions],
    )
    found = await connection.fetch(
        "SELECT partition, next_offset FROM sink_offsets WHERE sink = $1 AND topic = $2 AND partition = ANY($3)",
        table.name,
        topic,
        partitions,
    )
    return {row["partition"]: row["next_offset"] for row in found}


async def stage(connection: asyncpg.Connection, table: Table) -> None:
    """The session's staging table, empty at each commit; once for each connection."""
    await connection.execute(
        f"CREATE TEMP TABLE IF NOT EXISTS staged ON COMMIT DELETE ROWS AS SELECT * FROM {table.name} WITH NO DATA"
    )


async def write(
    connection: asyncpg.Connection,
    table: Table,
    topic: str,
    rows: list[tuple[Any, ...]],
    moves: Mapping[int, tuple[int, int]],
) -> int:
    """Writes rows and moves offsets (partition to expected and new) together; returns the rows changed.

    Raises Fenced when any offset is not the expected one, and what asyncpg raises; either way nothing is
    written and nothing moved. The offsets are touched, and so locked, only when the rows have arrived: from
    then on a process that freezes is idle in its transaction, and the server ends that (database.py).
    """
    async with connection.transaction():
        if rows:
            await connection.copy_records_to_table("staged", records=rows, columns=list(table.columns))
        moved = await connection.fetch(
            "UPDATE sink_offsets AS o SET next_offset = m.new "
            "FROM unnest($3::int[], $4::bigint[], $5::bigint[]) AS m(partition, expected, new) "
            "WHERE o.sink = $1 AND o.topic = $2 AND o.partition = m.partition AND o.next_offset = m.expected "
            "RETURNING o.partition",
            table.name,
            topic,
            list(moves),
            [expected for expected, _ in moves.values()],
            [new for _, new in moves.values()],
        )
        if len(moved) != len(moves):
            raise Fenced(f"{topic}: offsets of {sorted(set(moves) - {r['partition'] for r in moved})} are not ours")
        status: str = await connection.execute(table.insert) if rows else "INSERT 0 0"
        return int(status.rsplit(" ", 1)[1])
