"""PostgreSQL as every part uses it: connecting with patience, migrating to the newest schema."""

import asyncio
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psycopg
import structlog
import yoyo

import schemas
from tapedeck import storage
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.kafka import retrying
from tapedeck.settings import Settings

log = structlog.get_logger()

MIGRATIONS = Path(schemas.__file__).parent / "migrations"
LOCK = 7_263_544_911  # any number, the same in every process: one migrates, the others wait

COMMAND_S = 60.0  # what takes longer has failed

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
UNREADABLE = "(an address that is not plain)"
NOT_PLAIN = (
    "DATABASE_URL is not an address like postgresql://user:password@host:5432/name; "
    "in user and password write / as %2F, # as %23, ? as %3F, @ as %40"
)


def where(settings: Settings) -> str:
    """Host, port and database, without user and password; nothing of an address that is not plain."""
    try:
        url = urlsplit(settings.database_url.get_secret_value())
        host, port, name = url.hostname, url.port or 5432, url.path
    except ValueError:
        return UNREADABLE
    plain = url.scheme in ("postgresql", "postgres") and host and re.fullmatch(r"/[\w-]*", name)
    return f"{host}:{port}{name}" if plain else UNREADABLE


async def connect(settings: Settings) -> asyncpg.Connection:
    """One connection, tried until `connect_timeout_s` has passed; raises UsageError, TapedeckError."""
    try:
        async for attempt in retrying(settings, "PostgreSQL", _passing):
            with attempt:
                return await open_connection(settings)
    except ValueError:  # its text may quote the password
        raise UsageError(NOT_PLAIN) from None
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

    The server ends it when it pauses inside a transaction: a process that froze holds nobody up for longer. And
    TimescaleDB sets no limit to how many old rows one transaction may look at; anywhere else that setting is a name.
    """
    return await asyncpg.connect(
        settings.database_url.get_secret_value(),
        timeout=10,
        command_timeout=COMMAND_S,
        server_settings={
            "application_name": "tapedeck",
            "idle_in_transaction_session_timeout": "5s",
            "timescaledb.max_tuples_decompressed_per_dml_transaction": "0",
        },
    )


async def prepare(settings: Settings) -> None:
    """Waits for PostgreSQL and migrates it to the newest schema, which takes a user that may only where there is
    something to migrate; raises UsageError, TapedeckError."""
    connection = await connect(settings)
    try:
        await _migrate(connection, settings)
    except psycopg.errors.InsufficientPrivilege as error:
        raise UsageError(
            f"PostgreSQL at {where(settings)} lacks tables of this version, and this user may not make them "
            f"(DATABASE_URL): run it, or a sink, once with a user that may. {error}"
        ) from error
    except (*AWAY, asyncpg.PostgresError, psycopg.Error) as error:
        raise TapedeckError(f"PostgreSQL at {where(settings)} cannot be migrated: {error!r}") from error
    finally:
        connection.terminate()


async def _migrate(connection: asyncpg.Connection, settings: Settings) -> None:
    """One process migrates, the others wait for it. The lock goes with the session."""
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
        log.info("another process migrates the database, waiting for it")
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK, timeout=storage.MIGRATION_S)
    if await _lacking(connection):
        await asyncio.to_thread(_apply, settings.database_url.get_secret_value())
    await storage.apply(connection, settings)


async def _lacking(connection: asyncpg.Connection) -> set[str]:
    """The migrations that it has not had: looking at yoyo's table takes no right to write, yoyo's own look does."""
    applied = set()
    if await connection.fetchval("SELECT to_regclass('_yoyo_migration')") is not None:
        applied = {row[0] for row in await connection.fetch("SELECT migration_id FROM _yoyo_migration")}
    return {file.stem for file in MIGRATIONS.glob("*.sql")} - applied


def _apply(url: str) -> None:
    _, _, rest = url.partition("://")
    backend = yoyo.get_backend(f"postgresql+psycopg://{rest}")
    # yoyo asks for a name, and a bare user id in a container has none.
    os.environ.setdefault("LOGNAME", str(os.getuid()))
    try:
        backend.break_lock()  # its own lock is a row, and a process killed with it leaves it behind
        backend.apply_migrations(backend.to_apply(yoyo.read_migrations(str(MIGRATIONS))))
    finally:
        backend.connection.close()
