"""PostgreSQL as every part uses it: connecting with patience, migrating to the newest schema."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import structlog

import schemas
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.kafka import retrying
from tapedeck.settings import Settings

log = structlog.get_logger()

MIGRATIONS = Path(schemas.__file__).parent / "migrations"
MIGRATION_S = 3600.0  # an index on a year of quotes takes its time
LOCK = 7_263_544_911  # any number, the same in every process: one migrates, the others wait

#: Passing troubles of a server that is away, restarting or full, and what asyncpg says of a connection that
#: it lost; anything else is told at once.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
WRONG = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    ValueError,
)


def where(settings: Settings) -> str:
    """Host, port and database, without user and password."""
    try:
        url = urlsplit(settings.database_url.get_secret_value())
        return f"{url.hostname}:{url.port or 5432}{url.path}"
    except ValueError:
        return "(several hosts, or not a URL)"


async def connect(settings: Settings) -> asyncpg.Connection:
    """One connection, tried until `connect_timeout_s` has passed; raises UsageError, TapedeckError."""
    try:
        async for attempt in retrying(settings, "PostgreSQL", _passing):
            with attempt:
                return await open_connection(settings)
    except WRONG as error:
        raise UsageError(f"PostgreSQL at {where(settings)} refuses us (DATABASE_URL): {error}") from error
    except (*AWAY, asyncpg.PostgresError) as error:
        raise TapedeckError(
            f"PostgreSQL at {where(settings)} cannot be reached after "
            f"{settings.connect_timeout_s:g} s (DATABASE_URL): {error or 'no answer'}"
        ) from error
    raise AssertionError("retrying ends by returning or raising")


def _passing(error: BaseException) -> bool:
    return isinstance(error, AWAY) and not isinstance(error, WRONG)


async def open_connection(settings: Settings) -> asyncpg.Connection:
    """One attempt; raises what asyncpg raises.

    The server ends it when it pauses inside a transaction: a process that froze holds nobody up for longer.
    """
    return await asyncpg.connect(
        settings.database_url.get_secret_value(),
        timeout=10,
        command_timeout=60,
        server_settings={"application_name": "tapedeck", "idle_in_transaction_session_timeout": "5s"},
    )


async def prepare(settings: Settings) -> None:
    """Waits for PostgreSQL and migrates it to the newest schema; raises UsageError, TapedeckError."""
    connection = await connect(settings)
    try:
        await _migrate(connection)
    except (*AWAY, asyncpg.PostgresError) as error:
        raise TapedeckError(f"PostgreSQL at {where(settings)} cannot be migrated: {error!r}") from error
    finally:
        connection.terminate()


async def _migrate(connection: asyncpg.Connection) -> None:
    """All that is missing in one transaction, and the lock goes with it: a process killed half way leaves
    nothing behind, neither a lock nor half a schema."""
    async with connection.transaction():
        if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", LOCK):
            log.info("another process migrates the database, waiting for it")
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK, timeout=MIGRATION_S)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations "
            "(name text PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now())"
        )
        applied = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
        for name, sql in await asyncio.to_thread(_migrations):
            if name not in applied:
                log.info("migrating", name=name)
                await connection.execute(sql, timeout=MIGRATION_S)
                await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)


def _migrations() -> list[tuple[str, str]]:
    return [(file.stem, file.read_text()) for file in sorted(MIGRATIONS.glob("*.sql"))]
