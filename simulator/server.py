"""The simulator: joins the market, the clients' sockets, the faults and the HTTP side of it."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from aiohttp import web
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from simulator import metrics
from simulator.config import SimulatorConfig
from simulator.connections import Connection, Connections
from simulator.control import Control
from simulator.faults import Faults
from simulator.feed import Feed
from simulator.frame import Frame
from simulator.history import HOUR_MS, History
from simulator.injector import Injector
from simulator.listener import Listener
from simulator.market import market
from simulator.playback import play_file
from simulator.protocol import AUTH_TIMEOUT, CONNECTED, Session, status_frame
from simulator.record import Recorder, faults_path
from simulator.rest import Rest
from simulator.tape import Tape

DAY_NS = 86_400 * 1_000_000_000

# This, closing (connections.CLOSE_S) and some slack make up the second within which serve() ends though a
# client does not read.
LAST_BATCH_S = 0.3


class Bound(NamedTuple):
    """The ports in use: the WebSocket's, and that of REST and the control."""

    port: int
    rest_port: int


async def serve(config: SimulatorConfig, stop: asyncio.Event, on_ready: Callable[[Bound], None] | None = None) -> None:
    """Serve until `stop` is set, then close the clients with 1001 and return within a second.

    `on_ready` is called when both ports are open. Raises OSError (port taken, a file that cannot be read or
    written), ValueError (two faults of one label) and schemas.frames.NotAFramesFile.
    """
    tape = Tape(_source(config), config.speed)
    async with contextlib.AsyncExitStack() as stack:
        recorder = fault_recorder = None
        if config.record is not None:
            recorder = stack.enter_context(contextlib.closing(Recorder(config.record)))
            fault_recorder = stack.enter_context(contextlib.closing(Recorder(faults_path(config.record))))
        faults = Faults()
        history = History(int(config.rest_hours * HOUR_MS), () if config.frames is not None else config.symbols)
        feed = Feed(recorder, faults, history.add, config.backlog_bytes)
        connections = Connections(config.connections_per_key, feed.leave)

        async def converse(connection: ServerConnection) -> None:
            assert isinstance(connection, Connection)
            await _converse(connection, config, Session(config.keys, faults), feed, connections)

        metrics.FINISHED.set(0)
        listener = Listener(config.host, config.port, faults, converse)
        stack.push_async_callback(listener.close)
        await listener.open()
        injector = await stack.enter_async_context(Injector(feed, connections, listener, faults, fault_recorder))
        for fault in config.faults:
            injector.add(fault)
        rest = Rest(history, faults, config.keys, config.rest_per_minute, lambda: feed.clock_ns)
        rest_port = await _open_http(stack, config, rest, Control(injector, feed))
        wait = math.isinf(config.speed)
        playing = asyncio.create_task(feed.play(tape, wait_for_clients=wait, seconds=config.seconds))
        cutting = asyncio.create_task(_cut_slow(feed, connections))
        stopping = asyncio.create_task(stop.wait())
        for task in (playing, cutting, stopping):
            stack.callback(task.cancel)
        ends: set[asyncio.Future[Any]] = {stopping, injector.broken}
        if on_ready is not None:
            on_ready(Bound(listener.port, rest_port))
        await asyncio.wait({playing, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if playing.done():
            playing.result()  # raises if the market broke; if it is just over, clients may stay
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if injector.broken.done():
            injector.broken.result()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(feed.publishing.acquire(), LAST_BATCH_S)


def _source(config: SimulatorConfig) -> Iterator[Frame]:
    if config.frames is not None:
        return play_file(config.frames)
    start_ns = time.time_ns() - DAY_NS if config.start_ns is None else config.start_ns
    return market(config.seed, config.symbols, start_ns, wide=config.wide, seconds=True)


async def _open_http(stack: contextlib.AsyncExitStack, config: SimulatorConfig, rest: Rest, control: Control) -> int:
    """Serve HTTP until the stack is left; returns the port."""
    app = web.Application()
    rest.add_to(app.router)
    control.add_to(app.router)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, config.host, config.rest_port).start()
    port: int = runner.addresses[0][1]
    return port


async def _converse(
    connection: Connection, config: SimulatorConfig, session: Session, feed: Feed, connections: Connections
) -> None:
    connections.add(connection)
    try:
        await connection.send(status_frame(CONNECTED), text=True)
        async with asyncio.timeout(config.auth_timeout_s) as patience:
            async for message in connection:
                admitted = session.authenticated
                await connection.send(session.receive(message), text=True)
                if session.refused:
                    break
                if session.authenticated:
                    patience.reschedule(None)
                if session.authenticated and not admitted:
                    await connections.admit(connection, session.key)
                if session.subscribed:
                    feed.join(connection, session)
    except TimeoutError:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(status_frame(AUTH_TIMEOUT), text=True)
    except ConnectionClosed:
        pass
    finally:
        connections.remove(connection)
    await connection.close(CloseCode.POLICY_VIOLATION)


async def _cut_slow(feed: Feed, connections: Connections) -> None:
    while True:
        await connections.cut_slow([await feed.slow.get()])
