"""The WebSocket's listening socket, which can be shut, so that connections are refused, and opened again."""

import asyncio
import contextlib
import http
import socket
from collections.abc import Awaitable, Callable

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from simulator.connections import CLOSE_S, Connection
from simulator.faults import Faults

PATH = "/crypto"


class Listener:
    """Keeps its port while it is shut: nobody else gets it, not even as the port of an outgoing connection."""

    def __init__(
        self, host: str, port: int, faults: Faults, converse: Callable[[ServerConnection], Awaitable[None]]
    ) -> None:
        """Raises OSError if the port is taken."""
        self._host = host
        self._faults = faults
        self._converse = converse
        self._server: Server | None = None
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._holder = socket.socket(family, socket.SOCK_STREAM)
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._holder.bind(address)
        except OSError:
            self._holder.close()
            raise
        self.port: int = self._holder.getsockname()[1]

    async def open(self) -> None:
        """Accept connections; raises OSError."""
        # No compression, for speed, and no pings of our own: a client that does not read is not cut off.
        self._server = await serve(
            self._converse,
            self._host,
            self.port,
            process_request=self._answer,
            create_connection=Connection,
            compression=None,
            ping_interval=None,
            open_timeout=None,
            close_timeout=CLOSE_S,
        )

    async def shut(self) -> None:
        """Refuse connections; those that are open are closed with 1001, or cut after CLOSE_S."""
        if self._server is None:
            return
        server, self._server = self._server, None
        connections = list(server.all_connections)
        server.close(code=CloseCode.GOING_AWAY)
        try:
            async with asyncio.timeout(CLOSE_S):
                await server.wait_closed()
        except TimeoutError:
            for connection in connections:
                connection.transport.abort()
            await server.wait_closed()

    async def close(self) -> None:
        """Shut it and give up the port."""
        with contextlib.closing(self._holder):
            await self.shut()

    async def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        if any(self._faults.of("half-open")):
            await connection.wait_closed()  # the client gets no answer, ever
        if request.path.partition("?")[0] == PATH:
            return None
        return connection.respond(http.HTTPStatus.NOT_FOUND, f"The feed is at {PATH}.\n")
