"""How the tables are kept: applied at each start, for settings change, and TimescaleDB may have come since.

With TimescaleDB the large tables are hypertables with columnstore and retention, and hours and days are continuous
aggregates; without it plain tables, which keep everything, and views with the same names and columns.
"""

from typing import NamedTuple

import asyncpg
import structlog

from tapedeck.settings import Settings

log = structlog.get_logger()

MIGRATION_S = 3600.0  # an index on a year of quotes takes its time, and so does moving it into chunks

# A setting that is there when the library is loaded; shared_preload_libraries only superusers may read.
LOADED = "SELECT current_setting('timescaledb.disable_load', true)"


class Kept(NamedTuple):
    """Of a hypertable. A chunk should be a part of memory: a busy day has millions of trades and quotes."""

    table: str
    chunk: str
    segment: str
    expires: bool = False


HYPERTABLES = (
    Kept("crypto_trades", "1 day", "symbol", expires=True),
    Kept("crypto_quotes", "1 day", "symbol", expires=True),
    Kept("crypto_aggregates", "30 days", "symbol, interval"),
    Kept("crypto_aggregates_history", "30 days", "symbol, interval"),
    Kept("vendor_bars", "30 days", "symbol, interval"),
    Kept("anomalies", "30 days", "symbol"),
)
AGGREGATES = {"bars_hourly": "1 hour", "bars_daily": "1 day"}
REFRESH = "5 minutes"
OURS = """
    SELECT string_agg(oid::regclass::text, ', ') FROM pg_class WHERE relnamespace = 'public'::regnamespace
    AND relkind IN ('r', 'v') AND relowner = (SELECT relowner FROM pg_class WHERE oid = 'crypto_trades'::regclass)
"""
RIGHTS = {"tapedeck_writer": "SELECT, INSERT, UPDATE, DELETE", "tapedeck_reader": "SELECT"}


async def apply(connection: asyncpg.Connection, settings: Settings) -> None:
    """Only the tables' owner can; anybody else finds them as they are. Raises what asyncpg raises."""
    if not await connection.fetchval(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'crypto_trades'::regclass"
    ):
        return
    await _roles(connection)
    if await connection.fetchval(LOADED) is None:
        await _views(connection)
        return
    await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
    for kept in HYPERTABLES:
        await _hypertable(connection, kept)
    if await connection.fetchval("SELECT current_setting('timescaledb.license')") != "timescale":
        log.warning("this TimescaleDB is the Apache edition: no columnstore, no retention, no continuous aggregates")
        await _views(connection)
        return
    for kept in HYPERTABLES:
        await _columnstore(connection, kept, settings.columnstore_after_days)
        if kept.expires:
            await _retention(connection, kept, settings.trades_keep_days)
    for name, bucket in AGGREGATES.items():
        await _aggregate(connection, name, bucket)


async def _roles(connection: asyncpg.Connection) -> None:
    """They may have come since the migration that makes them, which could not: from the server's administrator, or from
    another database that made the same ones at that moment. Others' tables are none of theirs."""
    lacking = "SELECT NOT has_table_privilege(rolname, 'crypto_trades', 'SELECT') FROM pg_roles WHERE rolname = $1"
    for role, rights in RIGHTS.items():
        if await connection.fetchval(lacking, role):
            ours = await connection.fetchval(OURS)
            await connection.execute(
                f"GRANT USAGE ON SCHEMA public TO {role}; GRANT {rights} ON {ours} TO {role}; "
                f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {rights} ON TABLES TO {role}"
            )


async def _hypertable(connection: asyncpg.Connection, kept: Kept) -> None:
    known = "SELECT count(*) FROM timescaledb_information.hypertables WHERE hypertable_name = $1"
    if not await connection.fetchval(known, kept.table):
        log.info("making a hypertable", table=kept.table)
        await connection.execute(
            f"SELECT create_hypertable('{kept.table}', by_range('time', INTERVAL '{kept.chunk}'), "
            "create_default_indexes => false, migrate_data => true)",
            timeout=MIGRATION_S,
        )
    # Made by itself, and of no use where chunks and a BRIN index bound the time: each row would pay for it.
    await connection.execute(f"DROP INDEX IF EXISTS {kept.table}_time_idx")


async def _columnstore(connection: asyncpg.Connection, kept: Kept, days: int) -> None:
    enabled = "SELECT compression_enabled FROM timescaledb_information.hypertables WHERE hypertable_name = $1"
    if not await connection.fetchval(enabled, kept.table):
        await connection.execute(
            f"ALTER TABLE {kept.table} SET (timescaledb.enable_columnstore, "
            f"timescaledb.segmentby = '{kept.segment}', timescaledb.orderby = 'time')"
        )
    if await _wants(connection, "policy_compression", "compress_after", kept.table, days):
        await connection.execute(f"CALL remove_columnstore_policy('{kept.table}', if_exists => true)")
        await connection.execute(f"CALL add_columnstore_policy('{kept.table}', INTERVAL '{days} days')")


async def _retention(connection: asyncpg.Connection, kept: Kept, days: int) -> None:
    if await _wants(connection, "policy_retention", "drop_after", kept.table, days):
        await connection.execute(f"SELECT remove_retention_policy('{kept.table}', if_exists => true)")
        if days:  # not at once: who played an old recording has a day to look at it, or to set 0
            await connection.execute(
                f"SELECT add_retention_policy('{kept.table}', INTERVAL '{days} days', "
                "schedule_interval => INTERVAL '1 day', initial_start => now() + INTERVAL '1 day')"
            )


async def _wants(connection: asyncpg.Connection, job: str, key: str, table: str, days: int) -> bool:
    """Whether the table's policy is another than the one of so many days; 0: none."""
    found = await connection.fetchval(
        "SELECT (config ->> $2)::interval = make_interval(days => $4) FROM timescaledb_information.jobs "
        "WHERE proc_name = $1 AND hypertable_name = $3",
        job,
        key,
        table,
        days,
    )
    return found is not True and not (found is None and days == 0)


async def _aggregate(connection: asyncpg.Connection, name: str, bucket: str) -> None:
    """A refresh looks only at what changed since the last, however long ago that was: a repaired hour is made anew
    as soon as the newest one. What is newer than the last refresh is computed when asked for."""
    known = "SELECT count(*) FROM timescaledb_information.continuous_aggregates WHERE view_name = $1"
    if await connection.fetchval(known, name):
        return
    rows = _bars(f"time_bucket('{bucket}', time)")
    async with connection.transaction():
        await connection.execute(f"DROP VIEW IF EXISTS {name}")
        await connection.execute(
            f"CREATE MATERIALIZED VIEW {name} WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS "
            f"{rows} WITH NO DATA"
        )
        await connection.execute(
            f"SELECT add_continuous_aggregate_policy('{name}', start_offset => NULL, "
            f"end_offset => INTERVAL '{bucket}', schedule_interval => INTERVAL '{REFRESH}')"
        )
        await _comment(connection, name, bucket)


async def _views(connection: asyncpg.Connection) -> None:
    for name, bucket in AGGREGATES.items():
        if await connection.fetchval("SELECT to_regclass($1)", name) is None:
            start = f"date_bin('{bucket}', time, '2000-01-01 00:00+00')"
            await connection.execute(f"CREATE VIEW {name} AS {_bars(start)}")
            await _comment(connection, name, bucket)


def _bars(start: str) -> str:
    return f"""
        SELECT {start} AS time, symbol,
            (array_agg(open ORDER BY time))[1] AS open, max(high) AS high, min(low) AS low,
            (array_agg(close ORDER BY time DESC))[1] AS close, sum(volume) AS volume,
            sum(notional) / nullif(sum(volume) FILTER (WHERE notional IS NOT NULL), 0) AS vwap,
            sum(trade_count)::bigint AS trade_count, count(*) AS minutes
        FROM crypto_aggregates WHERE interval = '1m'
        GROUP BY 1, 2"""


async def _comment(connection: asyncpg.Connection, name: str, bucket: str) -> None:
    await connection.execute(
        f"COMMENT ON VIEW {name} IS 'One-minute bars that stand, by {bucket}: a look at them; the bars of record, with "
        "their quality, are those of that interval in crypto_aggregates'"
    )
