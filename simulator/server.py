"""The simulator's sockets: accepts clients, lets a Session answer them, and the Feed send to them."""

import asyncio
import contextlib
import http
import math
import time
from collections.abc import Callable, Iterator

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from simulator import metrics
from simulator.config import SimulatorConfig
from simulator.feed import Feed
from simulator.frame import Frame
from simulator.market import market
from simulator.playback import play_file
from simulator.protocol import AUTH_TIMEOUT, CONNECTED, Session, status_frame
from simulator.record import Recorder
from simulator.tape import Tape

PATH = "/crypto"
DAY_NS = 86_400 * 1_000_000_000

# A client that does not read cannot take a close frame either: these two and some slack make up the second
# within which serve() ends.
LAST_BATCH_S = 0.3
CLOSE_S = 0.4


async def serve(config: SimulatorConfig, stop: asyncio.Event, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve until `stop` is set, then close the clients with 1001 and return within a second.

    `on_ready` is called with the bound port. Raises OSError (port taken, a file that cannot be read or
    written) and schemas.frames.NotAFramesFile.
    """
    tape = Tape(_source(config), config.speed)
    recorder = Recorder(config.record) if config.record is not None else None
    feed = Feed(recorder)
    metrics.FINISHED.set(0)
    with contextlib.closing(recorder) if recorder is not None else contextlib.nullcontext():
        # No compression, for speed, and no pings of our own: a client that does not read is not cut off.
        async with listen(
            lambda connection: _converse(connection, config, feed),
            config.host,
            config.port,
            process_request=_only_crypto,
            compression=None,
            ping_interval=None,
            close_timeout=CLOSE_S,
        ) as server:
            playing = asyncio.create_task(
                feed.play(tape, wait_for_clients=math.isinf(config.speed), seconds=config.seconds)
            )
            stopping = asyncio.create_task(stop.wait())
            try:
                if on_ready is not None:
                    on_ready(server.sockets[0].getsockname()[1])
                await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if playing.done():
                    playing.result()  # raises if the market broke; if it is just over, clients may stay
                await stopping
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(feed.publishing.acquire(), LAST_BATCH_S)
            finally:
                playing.cancel()
                stopping.cancel()
                await _close(server)


def _source(config: SimulatorConfig) -> Iterator[Frame]:
    if config.frames is not None:
        return play_file(config.frames)
    start_ns = time.time_ns() - DAY_NS if config.start_ns is None else config.start_ns
    return market(config.seed, config.symbols, start_ns)


def _only_crypto(connection: ServerConnection, request: Request) -> Response | None:
    if request.path.partition("?")[0] == PATH:
        return None
    return connection.respond(http.HTTPStatus.NOT_FOUND, f"The feed is at {PATH}.\n")


async def _converse(connection: ServerConnection, config: SimulatorConfig, feed: Feed) -> None:
    session = Session(config.keys)
    try:
        await connection.send(status_frame(CONNECTED), text=True)
        async with asyncio.timeout(config.auth_timeout_s) as patience:
            async for message in connection:
                await connection.send(session.receive(message), text=True)
                if session.refused:
                    break
                if session.authenticated:
                    patience.reschedule(None)
                if session.subscribed:
                    feed.join(connection, session)
    except TimeoutError:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(status_frame(AUTH_TIMEOUT), text=True)
    except ConnectionClosed:
        pass
    finally:
        feed.leave(connection)
    await connection.close(CloseCode.POLICY_VIOLATION)


async def _close(server: Server) -> None:
    connections = list(server.connections)
    server.close(code=CloseCode.GOING_AWAY)
    try:
        async with asyncio.timeout(CLOSE_S):
            await server.wait_closed()
    except TimeoutError:
        for connection in connections:
            connection.transport.abort()
        await server.wait_closed()
