"""Kafka and PostgreSQL as a pair that outlives the command that started it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tapedeck.embedded.folder import data_folder, exclusive
from tapedeck.embedded.kafka import describe_kafka, prepare_kafka
from tapedeck.embedded.postgres import describe_postgres, end_orphans, prepare_postgres
from tapedeck.embedded.service import Service, await_ready, find, spawn, terminate

_START_S = 120.0
"""Ample: after a crash Kafka first reads what it wrote last."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    name: str
    prepare: Callable[[Path], Service]
    describe: Callable[[Path], Service | None]


# In the order to start and to stop: who writes to the tables reads from Kafka.
_KINDS = (
    _Kind("kafka", prepare_kafka, describe_kafka),
    _Kind("postgres", prepare_postgres, describe_postgres),
)


@dataclass(frozen=True)
class Status:
    """What one of the two services is doing."""

    name: str
    pid: int | None
    """None: it doesn't run."""
    addresses: Mapping[str, str] = field(repr=False)
    """Environment variables for its clients, empty before the first start; PostgreSQL's has the password."""
    log: Path | None = None
    started: bool = False
    """True in the answer of the `start` that started it."""


def start(data_dir: Path, *, timeout_s: float = _START_S) -> list[Status]:
    """Start what doesn't run yet and return when both services answer.

    Raises EmbeddedError, and stops again what it started, if one doesn't come up.
    """
    data_dir = data_folder(data_dir)
    with exclusive(data_dir, timeout_s):
        started: list[Service] = []
        running = []
        try:
            for kind in _KINDS:  # Kafka boots while PostgreSQL is being prepared
                service = kind.describe(data_dir)
                process = find(service) if service else None
                if service is None or process is None:
                    service = kind.prepare(data_dir)
                    started.append(service)
                    process = spawn(service)
                else:
                    log.info("%s already runs, as process %d", service.name, process.pid)
                running.append((service, process))
            for service, process in running:
                await_ready(service, process, timeout_s)
        except BaseException:  # Ctrl-C as well
            for service in started:
                terminate(service)
            raise
        return [
            Status(service.name, process.pid, service.addresses, service.log, service in started)
            for service, process in running
        ]


def stop(data_dir: Path) -> None:
    """Stop both services, Kafka first; by force what takes longer than 10 s. Fine if they don't run."""
    data_dir = data_dir.expanduser().resolve()
    if not data_dir.is_dir():
        return
    with exclusive(data_dir, _START_S):
        for kind in _KINDS:
            if service := kind.describe(data_dir):
                terminate(service)
        end_orphans(data_dir)


def status(data_dir: Path) -> list[Status]:
    """Whether each service runs, as which process, and where."""
    return [_status(kind, data_dir.expanduser().resolve()) for kind in _KINDS]


def environment(data_dir: Path) -> dict[str, str]:
    """The environment variables that lead clients to both services, as they were last started."""
    return {name: value for each in status(data_dir) for name, value in each.addresses.items()}


def _status(kind: _Kind, data_dir: Path) -> Status:
    service = kind.describe(data_dir)
    if service is None:
        return Status(kind.name, None, {})
    process = find(service)
    return Status(service.name, process.pid if process else None, service.addresses, service.log)
