"""PostgreSQL as every part uses it: connecting with patience, migrating to the newest schema."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psycopg
import yoyo

import schemas
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.kafka import retrying
from tapedeck.settings import Settings

MIGRATIONS = Path(schemas.__file__).parent / "migrations"
LOCK = 7_263_544_911  # any number, the same in every process: one migrates, the others wait

#: Passing troubles of a server that is away or restarting; anything else is told at once.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.InterfaceError,
)
WRONG = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    ValueError,
)


def where(settings: Settings) -> str:
    """Host, port and database, without user and password."""
    url = urlsplit(settings.database_url.get_secret_value())
    return f"{url.hostname}:{url.port or 5432}{url.path}"


async def connect(settings: Settings) -> asyncpg.Connection:
    """One connection, tried until `connect_timeout_s` has passed; raises UsageError, TapedeckError."""
    try:
        async for attempt in retrying(settings, "PostgreSQL", lambda error: isinstance(error, AWAY)):
            with attempt:
                return await open_connection(settings)
    except WRONG as error:
        raise UsageError(f"PostgreSQL at {where(settings)} refuses us (DATABASE_URL): {error}") from error
    except AWAY as error:
        raise TapedeckError(
            f"PostgreSQL at {where(settings)} cannot be reached after "
            f"{settings.connect_timeout_s:g} s (DATABASE_URL): {error}"
        ) from error
    raise AssertionError("retrying ends by returning or raising")


async def open_connection(settings: Settings) -> asyncpg.Connection:
    """One attempt; raises what asyncpg raises."""
    return await asyncpg.connect(settings.database_url.get_secret_value(), timeout=10, command_timeout=60)


async def prepare(settings: Settings) -> None:
    """Waits for PostgreSQL and migrates it to the newest schema; raises UsageError, TapedeckError."""
    connection = await connect(settings)
    await connection.close()
    try:
        await asyncio.to_thread(_migrate, settings.database_url.get_secret_value())
    except psycopg.Error as error:
        raise TapedeckError(f"PostgreSQL at {where(settings)} cannot be migrated: {error}") from error


def _migrate(url: str) -> None:
    """yoyo's own lock is a row that a killed process leaves behind; an advisory lock goes with its session."""
    with psycopg.connect(url) as session:
        session.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        backend = yoyo.get_backend(
            url.replace("postgres://", "postgresql://").replace("postgresql://", "postgresql+psycopg://", 1)
        )
        try:
            backend.apply_migrations(backend.to_apply(yoyo.read_migrations(str(MIGRATIONS))))
        finally:
            backend.connection.close()
