"""TCP ports that stay the same over restarts, so that clients find the service again."""

import json
import random
import socket
from contextlib import ExitStack
from pathlib import Path

from tapedeck.embedded.errors import EmbeddedError

HOST = "127.0.0.1"
LISTENING = range(12_000, 32_000)
_given: set[int] = set()  # by this process, which may not have bound them yet


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


def free_ports(count: int) -> list[int]:
    """That many free ports, all different."""
    with ExitStack() as held:
        return [_free_port(0, held) for _ in range(count)]


def _free_port(wanted: int, held: ExitStack) -> int:
    """`wanted` if it is free, else one at random.

    Never one that the kernel gives to outgoing connections: a client that tries again and again to reach
    a server that is restarting may connect to itself on such a port, and keep the server from it.
    """
    for port in (wanted, *random.sample(LISTENING, 100)):
        listener = held.enter_context(socket.socket())
        # As the services do: connections of the last run that linger in TIME_WAIT don't count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if port and (port == wanted or port not in _given):
                listener.bind((HOST, port))
                _given.add(port)
                return port
        except OSError:
            continue
    raise EmbeddedError("100 ports at random were all taken: something on this machine holds far too many.")
