"""Keeping the vendor's feed connected: one session after the other, each with its pings and its watch."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import IO, NoReturn, Protocol

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.frames import CloseCode

from producers import protocol
from producers.protocol import AuthFailed, Evicted, Refused, SessionError, params_of
from producers.socket import ANSWER_TIMEOUT_S, open_socket
from producers.split import Item
from schemas.events import NS_PER_S
from schemas.frames import Frame, frame_line
from tapedeck import metrics
from tapedeck.errors import UsageError
from tapedeck.settings import Settings

log = structlog.get_logger()

PING_S = 1.0  # an idle feed ticks by pongs: each proves that what was sent before it was asked for has arrived
PONG_TIMEOUT_S = 10.0  # half-open sockets answer no ping
WATCH_S = 0.5
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 60.0
EVICTED_REST_S = 60.0  # two clients that evict each other must not do it faster than this
GOOD_AFTER_S = 60.0  # the backoff starts anew only when data has flowed this long

#: What connecting again does not mend.
FINAL = (AuthFailed, Refused, InvalidURI, UnicodeError)


def explained(error: Exception, params: Sequence[str]) -> UsageError:
    """What the user has to do about one of `FINAL`."""
    match error:
        case AuthFailed():
            return UsageError(f"the vendor refused the key (POLYGON_API_KEY): {error}")
        case Refused():
            return UsageError(f"the key may not subscribe to any of {', '.join(params)}: {error}")
        case _:  # UnicodeError among them, for what cannot be a name
            return UsageError(f"POLYGON_WS_URL is not a WebSocket's address: {error}")


def jitter(failures: int, first_s: float, longest_s: float) -> float:
    """How long to rest after so many failures in a row: exponential with full jitter. Only so many double it, for
    2.0 ** 1024 is no number, and a vendor may be away for a night."""
    return random.uniform(0, min(longest_s, first_s * 2 ** min(max(0, failures - 1), 16)))


class Hearer(Protocol):
    """Who is told what the feed says. All times are his receive times in ns, never decreasing."""

    def clock(self) -> int: ...
    def connected(self, now: int) -> None: ...
    def frame(self, items: list[Item], now: int) -> None: ...
    def pong(self, asked: int, now: int) -> None: ...
    def stalled(self, now: int) -> list[str]: ...
    def lost(self, now: int) -> None: ...


class Ear:
    """`frames` with data so far, the last of them at `heard_at` (ns; 0: none yet); `counts` of errors and connects;
    `silent`: the channels (stream, pair) that were acknowledged and have never delivered. `record`: a frames file."""

    def __init__(self, settings: Settings, hearer: Hearer, record: IO[bytes] | None) -> None:
        self._settings = settings
        self._hearer = hearer
        self._record = record
        self._params = params_of(settings)
        key = settings.polygon_api_key
        self._key = key.get_secret_value() if key else ""
        self._since = 0  # the first frame with data in this session
        self._delivered: set[tuple[str, str]] = set()
        self._socket: ClientConnection | None = None
        self.frames = self.heard_at = 0
        self.counts: Counter[str] = Counter()
        self.silent: set[tuple[str, str]] = set()

    @property
    def queued(self) -> int:
        """Frames that the socket has received and nobody has read yet: websockets itself does not say."""
        return len(self._socket.recv_messages.frames) if self._socket else 0

    async def listen(self) -> NoReturn:
        """One session after the other, with full-jitter backoff between them. Raises UsageError."""
        failures = 0
        while True:
            self._since = 0
            rest = 0.0
            try:
                await self._session()
            except FINAL as error:
                raise explained(error, self._params) from error
            except (SessionError, WebSocketException, OSError, TimeoutError) as error:
                if _evicted(error):
                    rest = EVICTED_REST_S
                    log.error(
                        "evicted: another client uses this key, and the vendor allows one connection; "
                        f"resting for {rest:g} s, for two clients that evict each other get nothing",
                        detail=str(error),
                    )
                else:
                    log.warning("the feed's connection is gone", error=str(error) or type(error).__name__)
                metrics.PRODUCER_ERRORS.labels("evicted" if rest else "connection").inc()
                self.counts["errors"] += 1
            finally:
                self._hearer.lost(self._hearer.clock())
            flowed = self._since and self.heard_at - self._since >= GOOD_AFTER_S * NS_PER_S
            failures = 0 if flowed else failures + 1
            await asyncio.sleep(rest + jitter(failures, FIRST_RETRY_S, LONGEST_RETRY_S))

    async def _session(self) -> NoReturn:
        """Raises SessionError, WebSocketException, OSError, TimeoutError, or one of `FINAL`."""
        machine = protocol.Protocol(self._key, self._params)
        async with open_socket(self._settings) as socket:
            self._socket = socket
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                while not machine.live:
                    await self._receive(socket, machine)
            self._subscribed(machine.refused)
            watching = [asyncio.create_task(self._ping(socket)), asyncio.create_task(self._watch())]

            def cut(ended: asyncio.Task[None]) -> None:
                if not ended.cancelled():  # by what it found, or by an error of ours: then nobody watches any more
                    socket.transport.abort()

            for task in watching:
                task.add_done_callback(cut)
            try:
                while True:
                    await self._receive(socket, machine)
            finally:
                for task in watching:
                    task.cancel()
                for end in await asyncio.gather(*watching, return_exceptions=True):
                    if isinstance(end, Exception):
                        raise end

    def _subscribed(self, refused: list[str]) -> None:
        if refused:
            log.error("the key may not subscribe to some channels", refused=refused)
        wanted = set(self._params) - set(refused)
        log.info("subscribed", channels=len(wanted))
        metrics.CONNECTS.inc()
        self.counts["connects"] += 1
        channels = (param.split(".", 1) for param in wanted if not param.endswith(".*"))
        self.silent = {(stream, pair) for stream, pair in channels} - self._delivered
        self._hearer.connected(self._hearer.clock())

    async def _receive(self, socket: ClientConnection, machine: protocol.Protocol) -> None:
        data = await socket.recv(decode=False)
        now = self._hearer.clock()
        if self._record:
            self._keep(Frame(now, data))
        items = machine.receive(data)
        for message in machine.to_send():
            await socket.send(message, text=True)
        if not items:
            return
        self.frames += 1
        if self.silent:
            self._delivered |= self.silent & {(item.head.ev, item.head.pair) for item in items if item.head}
            self.silent -= self._delivered
        self._since, self.heard_at = self._since or now, now
        self._hearer.frame(items, now)

    def _keep(self, frame: Frame) -> None:
        """Into the frames file, for as long as its disk takes it; the tape does not suffer from it."""
        assert self._record is not None
        try:
            self._record.write(frame_line(frame))
        except OSError as error:
            log.error("frames are no longer written to the file of --record", error=str(error))
            self.counts["errors"] += 1
            self._record = None

    async def _ping(self, socket: ClientConnection) -> None:
        """A pong may wait behind frames for longer than that; while they come the connection is not half open."""
        while True:
            await asyncio.sleep(PING_S)
            asked = self._hearer.clock()
            try:
                pong = asyncio.ensure_future(await socket.ping())
                while not (await asyncio.wait({pong}, timeout=PONG_TIMEOUT_S))[0]:
                    if self._hearer.clock() - max(asked, self.heard_at) > PONG_TIMEOUT_S * NS_PER_S:
                        log.warning("no pong, the connection is half open")
                        return
                await pong
            except ConnectionClosed:
                return
            self._hearer.pong(asked, self._hearer.clock())

    async def _watch(self) -> None:
        """Pongs and the other streams do not excuse a stream that is silent for longer than is usual."""
        while not (stalled := self._hearer.stalled(self._hearer.clock())):
            await asyncio.sleep(WATCH_S)
        log.warning("streams have stalled, connecting anew", streams=stalled)
        metrics.PRODUCER_ERRORS.labels("stall").inc()


def _evicted(error: Exception) -> bool:
    """The vendor says so, or closes with 1008 without a word."""
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        return error.rcvd.code == CloseCode.POLICY_VIOLATION
    return isinstance(error, Evicted)
