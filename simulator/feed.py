"""One market, many clients: takes due frames off the tape, records them, sends each client its share."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from simulator import metrics
from simulator.connections import Connection
from simulator.deal import Deal
from simulator.faults import Faults, Incident
from simulator.frame import Frame, Subscriptions
from simulator.mischief import alter
from simulator.protocol import CHANNELS, Session
from simulator.record import Recorder, is_text, record_line
from simulator.tape import Tape


class Feed:
    """The market's task and its clients. What is published while none is connected is gone for good.

    The record has every event that a client asks for, or that the last one to leave had asked for: what a
    client misses between its connections, or until it has subscribed again, is in it with 0 clients.
    """

    def __init__(
        self, recorder: Recorder | None, faults: Faults, keep: Callable[[Frame], None], backlog_bytes: int | None
    ) -> None:
        """`keep` gets every frame of the market; `backlog_bytes` is what a client may leave unread, None: any."""
        self._recorder = recorder
        self._faults = faults
        self._keep = keep
        self._backlog_bytes = backlog_bytes
        self._clients: dict[Connection, Session] = {}
        self._last = Subscriptions()
        self._someone = asyncio.Event()
        self._delivered: Frame | None = None
        self.slow: asyncio.Queue[Connection] = asyncio.Queue()
        """Clients that left too much unread; they get nothing more."""
        self.clock_ns = 0
        """The market's time."""
        self.begun = asyncio.Event()
        self.began_s = 0.0
        """When the first client subscribed, by time.monotonic(), and that it did."""
        self.publishing = asyncio.Lock()
        """Held while a batch is recorded and sent."""

    @property
    def clients(self) -> int:
        """How many are subscribed."""
        return len(self._clients)

    def join(self, connection: Connection, session: Session) -> None:
        """From now on the client gets what it subscribes to; joining again changes nothing."""
        if connection.leaving:
            return
        self._clients[connection] = session
        if self._last.within(session.subscriptions):
            self._last = Subscriptions()
        self._someone.set()
        if not self.begun.is_set():
            self.began_s = time.monotonic()
            self.begun.set()
        metrics.CLIENTS.set(len(self._clients))

    def leave(self, connection: Connection) -> None:
        """The client is gone; its subscriptions say what is recorded while there is no other."""
        session = self._clients.pop(connection, None)
        if session is not None and not self._clients:
            self._last = Subscriptions.union([session.subscriptions, self._last])
            self._someone.clear()
        metrics.CLIENTS.set(len(self._clients))

    async def play(self, tape: Tape, *, wait_for_clients: bool, seconds: float | None) -> None:
        """Play from the first subscription on until the tape is over or `seconds` have passed.

        With `wait_for_clients` the tape also stands still whenever nobody is connected. Raises what the
        tape's source and the recorder raise.
        """
        await self.begun.wait()
        remaining_s = seconds = math.inf if seconds is None else seconds
        while not tape.over and remaining_s > 0:
            elapsed_s = time.monotonic() - self.began_s
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

    async def repeat(self, incident: Incident) -> None:
        """Send the last frame that a client got once more."""
        async with self.publishing:
            if self._delivered is not None:
                deal = self._deal(self._wanted())
                deal.add(self._delivered, incident)
                await self._finish(deal)

    async def inject(self, data: bytes, incident: Incident) -> None:
        """Send a text message that is no part of the market to every client."""
        async with self.publishing:
            listeners = self._listeners()
            line = record_line(Frame(0, self.clock_ns, data, ()), time.time_ns(), len(listeners), incident)
            self._write([line])
            await self._send_all({connection: [data] for connection in listeners}, text=True)

    async def _publish(self, batch: Sequence[Frame]) -> None:
        """Record the batch, then send it. Who joins meanwhile gets the next one."""
        wanted = self._wanted()
        deal = self._deal(wanted)
        streams: Counter[str] = Counter()
        for made in batch:
            for frame, incident in alter(made, self._faults, wanted.wants):
                self._keep(frame)
                published = wanted.select(frame)
                if published is not None:
                    streams.update([event.topic[0] if event.topic else "" for event in published.events])
                    deal.add(published, incident)
        self.clock_ns = batch[-1].clock_ns
        for stream, count in streams.items():
            metrics.EVENTS.labels(stream if stream in CHANNELS else "other").inc(count)
        metrics.CLOCK.set(self.clock_ns / 1e9)
        await self._finish(deal)

    def _deal(self, wanted: Subscriptions) -> Deal:
        stalls = [incident.fault for incident in self._faults.of("stall")]
        return Deal(self._listeners(), wanted, stalls, time.time_ns())

    async def _finish(self, deal: Deal) -> None:
        self._delivered = deal.delivered or self._delivered
        self._write(deal.lines)
        await self._send_all(deal.messages)

    def _wanted(self) -> Subscriptions:
        """What is recorded: a single client's own object if that is all."""
        several = [session.subscriptions for session in self._clients.values()]
        if not self._last.empty:
            several.append(self._last)
        return several[0] if len(several) == 1 else Subscriptions.union(several)

    def _listeners(self) -> dict[Connection, Subscriptions]:
        """The clients that can be sent to."""
        return {line: session.subscriptions for line, session in self._clients.items() if not line.deaf}

    def _write(self, lines: Collection[bytes]) -> None:
        if self._recorder is not None:
            self._recorder.write(lines)

    async def _send_all(self, outgoing: dict[Connection, list[bytes]], *, text: bool | None = None) -> None:
        for connection, messages in outgoing.items():
            with contextlib.suppress(ConnectionClosed):  # its handler sees that too, and lets it leave
                await self._send(connection, messages, text)

    async def _send(self, connection: Connection, messages: Sequence[bytes], text: bool | None) -> None:
        """Send several WebSocket messages, written to the socket at once: half the time of one by one.

        Waits while the client does not take them, unless there is a limit to what it may leave unread.
        Raises ConnectionClosed.
        """
        if self._backlog_bytes is None:
            async with connection.send_context():
                _put(connection, messages, text)
        elif connection.protocol.state is State.OPEN:
            _put(connection, messages, text)
            if connection.transport.get_write_buffer_size() > self._backlog_bytes:
                self.leave(connection)
                self.slow.put_nowait(connection)


def _put(connection: Connection, messages: Sequence[bytes], text: bool | None) -> None:
    protocol = connection.protocol
    for data in messages:
        as_text = is_text(data) if text is None else text
        (protocol.send_text if as_text else protocol.send_binary)(data)
    connection.transport.write(b"".join(protocol.data_to_send()))


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if math.isinf(timeout_s) else timeout_s):
            await event.wait()
