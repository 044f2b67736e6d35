"""A real Apache Kafka and a real PostgreSQL with nothing installed but Python packages.

Detached: `start`, `status` and `stop` run both beside the caller. Supervised: `prepare_kafka` and
`prepare_postgres` give a `Service` that the caller spawns, watches and restarts as its own child.
"""

from tapedeck.embedded.errors import EmbeddedError
from tapedeck.embedded.jars import ensure_jars
from tapedeck.embedded.kafka import prepare_kafka
from tapedeck.embedded.ports import free_ports
from tapedeck.embedded.postgres import prepare_postgres
from tapedeck.embedded.service import Service
from tapedeck.embedded.services import Status, environment, start, status, stop

__all__ = [
    "EmbeddedError",
    "Service",
    "Status",
    "ensure_jars",
    "environment",
    "free_ports",
    "prepare_kafka",
    "prepare_postgres",
    "start",
    "status",
    "stop",
]
