"""Tables compared with what the log makes of them, and put right.

The recomputed records are staged in temporary tables, in the sinks' own columns. A full join with the rows that stand
in the same stretch notes every difference with what is due; putting them right is one transaction with that.
"""

import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import asyncpg

from schemas.topics import Topic
from sinks.tables import BARS, QUOTES, TRADES, VENDOR_BARS, Table
from tapedeck import database
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

LONG_S = 24 * 3600.0  # a month of quotes takes its time
WRONG = ("missing", "extra", "changed")
LEFT_ALONE = ("foreign", "beyond")


def _quoted(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _row(of: str, columns: Iterable[str]) -> str:
    return "(" + ", ".join(f'{of}."{column}"' for column in columns) + ")"


class Target(NamedTuple):
    """A table to mend. `due` selects what ought to stand in it, `standing` what does; `either`: another record of the
    same key may stand there as well. `foreign` and `beyond` are what is left alone, of t that stands and r that is due:
    what another pipeline made, and what the log that was read cannot tell of."""

    table: Table
    name: str
    keys: tuple[str, ...]
    due: str
    standing: str
    foreign: str
    beyond: str
    either: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return ("time", *self.table.columns)


# A row came with or after the first event that was not read, or from REST, which has said more since.
_NOT_READ = """(r.time IS NULL AND (t.time < b.begins OR t.epoch < 0 AND b.repairs_move OR EXISTS (
    SELECT FROM taken x WHERE x.partition = t.partition AND (t.epoch, t.n) >= (x.epoch, x.n) AND t.ts_recv >= x.recv
)))"""
# What a bar says of the trades, whatever is known of gaps.
_OF_TRADES = ("open", "high", "low", "close", "volume", "vwap", "notional", "trade_count", "buy_volume", "sell_volume")
_SUMMED = ("symbol", "interval", "time", "repair", *_OF_TRADES)
# It has a higher order than the log gives it, and there is, may be, or was, more of the log. A word about a gap may
# come days later, and revises longer bars, but for what they say of the trades.
_NOT_SETTLED = f"""((r.time IS NULL OR (t.repair, t.revision) > (r.repair, r.revision)) AND (
    t."end" <= b.begins_ns
    OR b.moves AND (t."end" > b.settled OR t.interval <> '1m' AND {_row("t", _SUMMED)} IN (
        SELECT {_quoted(_SUMMED)} FROM made_crypto_aggregates WHERE interval <> '1m'
    ))
    OR b.repairs_move AND t.repair > coalesce(r.repair, 0)
))"""
_ORDER = "symbol, interval, time, repair DESC, revision DESC"
_NEWEST = f"SELECT DISTINCT ON (symbol, interval, time) * FROM made_crypto_aggregates ORDER BY {_ORDER}"
# Lower orders of longer bars go by when their minutes came: of those only the highest is a function of the log.
_NOT_LOWER = (
    f"SELECT o.* FROM {{}} o LEFT JOIN ({_NEWEST}) h USING (symbol, interval, time) "
    "WHERE o.interval = '1m' OR h.time IS NULL OR (o.repair, o.revision) >= (h.repair, h.revision)"
)
_ANOTHER = "t.fingerprint <> b.fingerprint"


def _first(table: Table, *keys: str, either: bool = False) -> Target:
    """Of each key the first of the feed's stands, then the first of REST's. With the time as the first of the keys they
    are sorted in a fifth of the time: it is a number, and nearly tells them apart."""
    key = ", ".join(keys)
    due = f"SELECT DISTINCT ON ({key}) * FROM made_{table.name} ORDER BY {key}, epoch < 0, abs(epoch), n"
    return Target(table, table.name, keys, due, f"SELECT * FROM {table.name}", "false", _NOT_READ, either)


_BAR = ("symbol", "interval", "time")
_HISTORY = "crypto_aggregates_history"
TARGETS = {
    # A trade may come over the socket and over REST, or again when its minute is forgotten.
    "trades": (_first(TRADES, "time", "symbol", "exchange", "trade_id", either=True),),
    "quotes": (_first(QUOTES, "time", "epoch", "partition", "n"),),
    "bars": (
        Target(
            BARS,
            BARS.name,
            _BAR,
            _NEWEST,
            f"SELECT * FROM {BARS.name}",
            _ANOTHER,
            _NOT_SETTLED,
        ),
        Target(
            BARS,
            _HISTORY,
            (*_BAR, "repair", "revision"),
            _NOT_LOWER.format(f"made_{BARS.name}"),
            _NOT_LOWER.format(_HISTORY),
            _ANOTHER,
            _NOT_SETTLED,
        ),
        _first(VENDOR_BARS, "time", "epoch", "partition", "n"),
    ),
}


class Bounds(NamedTuple):
    """What is compared, and what is known of it; times in ns. Rows of [since, until), of a log that `begins` there.
    `moves`: it has, or may have, more than was read; then bars that end after `settled` may change, and longer ones.
    `repairs_move`: so may what REST said. `taken`: by partition the epoch, the number and the receive time of the first
    event that was not read."""

    since: int
    until: int
    begins: int
    settled: int
    moves: bool
    repairs_move: bool
    fingerprint: str
    taken: dict[int, tuple[int, int, int]]


class Difference(NamedTuple):
    """A row as it stands and as it ought to, as JSON objects; None where it does not."""

    table: str
    kind: str
    standing: str | None
    due: str | None


class Mending:
    """The recomputed rows of the tables of one kind, in a session of their own."""

    def __init__(self, connection: asyncpg.Connection, kind: str, since: int, until: int) -> None:
        self._connection = connection
        self._targets = TARGETS[kind]
        self._tables = {topic.name: target.table for target in self._targets for topic in target.table.topics}
        self._since, self._until = since, until

    @property
    def topics(self) -> list[Topic]:
        """Those whose values it wants."""
        return [topic for table in set(self._tables.values()) for topic in table.topics]

    async def prepare(self) -> None:
        """The session's tables, and all the time and memory that a sort of a day's rows takes."""
        await self._run("SET idle_in_transaction_session_timeout = 0; SET work_mem = '256MB'; SET jit = off")
        for table in set(self._tables.values()):
            await self._run(
                f"CREATE TEMP TABLE staged_{table.name} AS "
                f"SELECT {_quoted(table.columns)} FROM {table.name} WITH NO DATA;"
                f"CREATE TEMP VIEW made_{table.name} AS SELECT {table.selected} FROM staged_{table.name}"
            )
        await self._run(
            "CREATE TEMP TABLE bounds (since timestamptz, until timestamptz, until_ns bigint, begins timestamptz, "
            "begins_ns bigint, settled bigint, moves bool, repairs_move bool, fingerprint text);"
            "CREATE TEMP TABLE taken (partition int, epoch bigint, n bigint, recv bigint)"
        )
        for target in self._targets:
            await self._run(
                f"CREATE TEMP TABLE found_{target.name} AS SELECT ''::text AS kind, {_quoted(target.columns)}, "
                f"''::text AS standing, ''::text AS due FROM {target.name} WITH NO DATA"
            )

    async def stage(self, topic: str, rows: bytes) -> None:
        """Rows of a topic (tables.copied), also from outside the stretch."""
        table = self._tables[topic]
        if rows:
            await self._connection.copy_to_table(
                f"staged_{table.name}", source=io.BytesIO(rows), columns=list(table.columns), timeout=LONG_S
            )

    async def compare(
        self, bounds: Callable[[], Awaitable[Bounds]], apply: bool, listed: int | None
    ) -> dict[tuple[str, str], int]:
        """How many differences there are, by table and kind. With `apply` nobody else writes meanwhile, and afterwards
        there are none but those that are left alone. `bounds` is asked when nobody does. Of each table's differences
        `listed` can be told afterwards, all where it is None."""
        for table in set(self._tables.values()):
            await self._run(f"ANALYZE staged_{table.name}")
        counts = {}
        async with self._connection.transaction(isolation="read_committed" if apply else "repeatable_read"):
            if apply:
                for target in self._targets:
                    await self._run(f"LOCK TABLE {target.name} IN SHARE ROW EXCLUSIVE MODE")
            await self._bound(await bounds())
            for target in self._targets:
                await self._find(target, listed)
            if apply:
                for target in self._targets:
                    await self._mend(target)
        for target in self._targets:
            for row in await self._connection.fetch(f"SELECT kind, count(*) FROM found_{target.name} GROUP BY 1"):
                counts[target.name, row["kind"]] = row["count"]
        return counts

    async def differences(self) -> AsyncIterator[Difference]:
        """What `compare` found, as it stood then."""
        async with self._connection.transaction():
            for target in self._targets:
                query = f"SELECT kind, standing, due FROM found_{target.name} WHERE num_nonnulls(standing, due) > 0"
                async for row in self._connection.cursor(f"{query} ORDER BY time, kind", prefetch=1_000):
                    yield Difference(target.name, *row)

    async def _bound(self, bounds: Bounds) -> None:
        await self._run(
            "INSERT INTO bounds VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            timestamp(bounds.since),
            timestamp(bounds.until),
            bounds.until,
            timestamp(bounds.begins),
            bounds.begins,
            bounds.settled,
            bounds.moves,
            bounds.repairs_move,
            bounds.fingerprint,
        )
        await self._connection.executemany(
            "INSERT INTO taken VALUES ($1, $2, $3, $4)", [(number, *at) for number, at in bounds.taken.items()]
        )

    async def _find(self, target: Target, listed: int | None) -> None:
        columns, keys = _quoted(target.columns), _quoted(target.keys)
        due = ", ".join(f'"{column}"' if column in target.keys else f'r."{column}"' for column in target.columns)
        within = "time >= (SELECT since FROM bounds) AND time < (SELECT until FROM bounds)"
        if "end" in target.columns:
            within += ' AND "end" <= (SELECT until_ns FROM bounds)'
        await self._run(
            f"""
            INSERT INTO found_{target.name}
            SELECT CASE
                WHEN t.time IS NULL THEN 'missing'
                WHEN {target.foreign} THEN 'foreign'
                WHEN {target.beyond} THEN 'beyond'
                WHEN r.time IS NULL THEN 'extra'
                ELSE 'changed' END,
                {due},
                CASE WHEN row_number() OVER () <= $1 AND t.time IS NOT NULL THEN to_jsonb(t)::text END,
                CASE WHEN row_number() OVER () <= $1 AND r.time IS NOT NULL THEN to_jsonb(r)::text END
            FROM bounds b CROSS JOIN (
                (SELECT {columns} FROM ({target.standing}) x WHERE {within}) t
                FULL JOIN (SELECT {columns} FROM ({target.due}) x WHERE {within}) r USING ({keys})
            )
            WHERE t.time IS NULL OR r.time IS NULL
                OR {_row("t", target.columns)} IS DISTINCT FROM {_row("r", target.columns)}
            """,
            2**62 if listed is None else listed,
        )
        if target.either:
            await self._run(
                f"DELETE FROM found_{target.name} f USING {target.name} t, made_{target.table.name} s "
                f"WHERE f.kind = 'changed' AND {_equal('f', 't', target.keys)} AND {_equal('f', 's', target.keys)} "
                f"AND {_row('s', target.columns)} IS NOT DISTINCT FROM {_row('t', target.columns)}"
            )

    async def _mend(self, target: Target) -> None:
        """Where TimescaleDB has packed the rows, every chunk that the time does not rule out is unpacked whole; and of
        a key no column may be set, not even to what it is."""
        columns, found = _quoted(target.columns), f"found_{target.name}"
        new = ", ".join(f'"{column}" = n."{column}"' for column in target.columns if column not in target.keys)
        same = f"{_equal('t', 'n', target.keys)} AND t.time >= $1 AND t.time < $2"
        stretch = timestamp(self._since), timestamp(self._until)
        kinds = {row[0] for row in await self._connection.fetch(f"SELECT DISTINCT kind FROM {found}")}
        if "extra" in kinds:
            await self._run(f"DELETE FROM {target.name} t USING {found} n WHERE n.kind = 'extra' AND {same}", *stretch)
        if "changed" in kinds:
            await self._run(
                f"UPDATE {target.name} t SET {new} FROM {found} n WHERE n.kind = 'changed' AND {same}",
                *stretch,
            )
        if "missing" in kinds:
            await self._run(
                f"INSERT INTO {target.name} ({columns}) SELECT {columns} FROM {found} WHERE kind = 'missing'"
            )

    async def _run(self, query: str, *values: object) -> None:
        await self._connection.execute(query, *values, timeout=LONG_S)


@asynccontextmanager
async def mending(settings: Settings, kind: str, since: int, until: int) -> AsyncIterator[Mending]:
    """For `trades`, `quotes` or `bars` with a time in [since, until), ns. Raises TapedeckError, UsageError."""
    await database.prepare(settings)
    connection = await database.connect(settings)
    try:
        mend = Mending(connection, kind, since, until)
        await mend.prepare()
        yield mend
    except (*database.AWAY, asyncpg.PostgresError) as error:
        raise TapedeckError(
            f"PostgreSQL at {database.where(settings)} gave up: {error!r}. Nothing was changed: run it again"
        ) from error
    finally:
        connection.terminate()


def timestamp(ns: int) -> datetime:
    """ns since the epoch as PostgreSQL can hold it: whole microseconds, rounded down."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1000)


def _equal(one: str, other: str, columns: Iterable[str]) -> str:
    return f"{_row(one, columns)} = {_row(other, columns)}"
