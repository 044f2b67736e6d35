"""TCP ports that stay the same over restarts, so that clients find the service again."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path

HOST = "127.0.0.1"


def stored_ports(file: Path) -> dict[str, int] | None:
    """The ports kept in `file`; None if no ports were ever chosen."""
    try:
        ports: dict[str, int] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return ports


def claim_ports(file: Path, *names: str) -> dict[str, int]:
    """A free port on this machine's loopback for each name: the one kept in `file` if it is still free.

    Nothing holds the ports until the service binds them.
    """
    before = stored_ports(file) or {}
    with ExitStack() as held:  # all at once, so that no two names get the same port
        ports = {name: _free_port(before.get(name, 0), held) for name in names}
    if ports != before:
        file.write_text(json.dumps(ports))
    return ports


def _free_port(wanted: int, held: ExitStack) -> int:
    for port in (wanted, 0):
        listener = held.enter_context(socket.socket())
        # As the services do: connections of the last run that linger in TIME_WAIT don't count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            continue
        return int(listener.getsockname()[1])
    raise AssertionError("binding port 0 always finds one")
