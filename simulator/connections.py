"""The open connections, and the ways in which a server ends them or lets them die."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from simulator.protocol import FORCE_DISCONNECT, MAX_CONNECTIONS, SLOW_CONSUMER, Status, status_frame

# A client that does not read cannot take a close frame either: after so long its connection is cut.
CLOSE_S = 0.4


class Connection(ServerConnection):
    """A client's connection; once `deaf` it is half-open: whatever comes in is ignored, pings included."""

    deaf = False
    leaving = False
    key = ""

    def data_received(self, data: bytes) -> None:
        if not self.deaf:
            super().data_received(data)


class Connections:
    """Those that passed the WebSocket handshake, oldest first."""

    def __init__(self, per_key: int | None, forget: Callable[[Connection], None]) -> None:
        """`per_key`: how many a key may have; `forget` is told at once of one that gets no more data."""
        self._per_key = per_key
        self._forget = forget
        self._open: dict[Connection, None] = {}

    @property
    def all(self) -> list[Connection]:
        """The oldest first."""
        return list(self._open)

    def add(self, connection: Connection) -> None:
        self._open[connection] = None

    def remove(self, connection: Connection) -> None:
        """It is over, or will be: it gets no more data."""
        connection.leaving = True
        self._open.pop(connection, None)
        self._forget(connection)

    async def admit(self, connection: Connection, key: str) -> None:
        """It authenticated with this key; the key's oldest connection is evicted if that is one too many."""
        connection.key = key
        same = [other for other in self._open if other.key == key]
        if self._per_key is not None and len(same) > self._per_key:
            await self.evict(same[: -self._per_key])

    def drop(self) -> None:
        """End all without a close frame."""
        for connection in self.all:
            self.remove(connection)
            connection.transport.abort()

    def deafen(self) -> None:
        """Leave all half-open, for good."""
        for connection in self._open:
            connection.deaf = True

    async def close(self, code: int) -> None:
        """Close all with this code."""
        await self._part(self.all, [], code)

    async def evict(self, connections: Iterable[Connection]) -> None:
        """What happens to a key's connection when there is one too many."""
        await self._part(connections, [MAX_CONNECTIONS], CloseCode.POLICY_VIOLATION)

    async def cut_slow(self, connections: Iterable[Connection]) -> None:
        """What happens to a client that does not read fast enough."""
        await self._part(connections, [SLOW_CONSUMER, FORCE_DISCONNECT], CloseCode.POLICY_VIOLATION)

    async def _part(self, connections: Iterable[Connection], statuses: Iterable[Status], code: int) -> None:
        """No more data for them from now on; returns when they are closed."""
        farewell = [status_frame(status) for status in statuses]
        goodbyes = []
        for connection in connections:
            self.remove(connection)
            goodbyes.append(_say_goodbye(connection, farewell, code))
        await asyncio.gather(*goodbyes)


async def _say_goodbye(connection: Connection, farewell: Iterable[bytes], code: int) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            with contextlib.suppress(ConnectionClosed):
                for message in farewell:
                    await connection.send(message, text=True)
            await connection.close(code)
    except TimeoutError:
        connection.transport.abort()
