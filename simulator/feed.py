"""One market, many clients: takes due frames off the tape, records them, sends each client its share."""

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from simulator import metrics
from simulator.frame import Frame, Subscriptions
from simulator.protocol import CHANNELS, Session
from simulator.record import Recorder, is_text, record_line
from simulator.tape import Tape


class Feed:
    """The market's task and its clients. What is published while none is connected is gone for good.

    With several clients the record has one line a frame: the union of what they asked for.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._clients: dict[ServerConnection, Session] = {}
        self._last = Subscriptions()
        self._someone = asyncio.Event()
        self.publishing = asyncio.Lock()
        """Held while a batch is recorded and sent."""

    def join(self, connection: ServerConnection, session: Session) -> None:
        """From now on the client gets what it subscribes to; joining again changes nothing."""
        self._clients[connection] = session
        self._someone.set()
        metrics.CLIENTS.set(len(self._clients))

    def leave(self, connection: ServerConnection) -> None:
        """The client is gone; its subscriptions say what is recorded while there is no other."""
        session = self._clients.pop(connection, None)
        if session is not None and not self._clients:
            self._last = session.subscriptions
            self._someone.clear()
        metrics.CLIENTS.set(len(self._clients))

    async def play(self, tape: Tape, *, wait_for_clients: bool, seconds: float | None) -> None:
        """Play from the first subscription on until the tape is over or `seconds` have passed.

        With `wait_for_clients` the tape also stands still whenever nobody is connected. Raises what the
        tape's source and the recorder raise.
        """
        await self._someone.wait()
        started = time.monotonic()
        remaining_s = seconds = math.inf if seconds is None else seconds
        while not tape.over and remaining_s > 0:
            elapsed_s = time.monotonic() - started
            remaining_s = seconds - elapsed_s
            if wait_for_clients and not self._someone.is_set():
                await _wait(self._someone, remaining_s)
            elif batch := tape.due(elapsed_s):
                async with self.publishing:
                    await self._publish(batch)
                await asyncio.sleep(0)  # a send that need not wait does not let anyone else run
            else:
                await asyncio.sleep(max(0.0, min(tape.wait_s(elapsed_s), remaining_s)))
        metrics.FINISHED.set(1)

    async def _publish(self, batch: Sequence[Frame]) -> None:
        """Record the batch, then send it. Who joins meanwhile gets the next one."""
        subscriptions = {connection: session.subscriptions for connection, session in self._clients.items()}
        wanted = _union(list(subscriptions.values())) or self._last
        outgoing: defaultdict[ServerConnection, list[bytes]] = defaultdict(list)
        streams: Counter[str] = Counter()
        lines = []
        recv_ns = time.time_ns()
        for frame in batch:
            published = wanted.select(frame)
            if published is None:
                continue
            receivers = 0
            for connection, own in subscriptions.items():
                part = published if own is wanted else own.select(frame)
                if part is not None:
                    outgoing[connection].append(part.data)
                    receivers += 1
            streams.update([event.topic[0] if event.topic else "" for event in published.events])
            lines.append(record_line(published, recv_ns, receivers))
        if self._recorder is not None:
            self._recorder.write(lines)
        for stream, count in streams.items():
            metrics.EVENTS.labels(stream if stream in CHANNELS else "other").inc(count)
        metrics.CLOCK.set(batch[-1].clock_ns / 1e9)
        for connection, messages in outgoing.items():
            with contextlib.suppress(ConnectionClosed):  # its handler sees that too, and lets it leave
                await _send(connection, messages)


async def _send(connection: ServerConnection, messages: Sequence[bytes]) -> None:
    """Send several WebSocket messages, written to the socket at once: half the time of one by one.

    Waits while the client does not take them; raises ConnectionClosed.
    """
    async with connection.send_context():
        protocol = connection.protocol
        for data in messages:
            (protocol.send_text if is_text(data) else protocol.send_binary)(data)
        connection.transport.write(b"".join(protocol.data_to_send()))


def _union(several: Sequence[Subscriptions]) -> Subscriptions | None:
    """What at least one client asks for: a single client's own object, None without clients."""
    if len(several) > 1:
        return Subscriptions.union(several)
    return several[0] if several else None


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if math.isinf(timeout_s) else timeout_s):
            await event.wait()
