"""The producer process: the vendor's feed onto the raw topic."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import structlog
from aiokafka.errors import KafkaError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI, WebSocketException

from producers.outbox import Outbox
from producers.protocol import AuthFailed, Evicted, Protocol, Refused, SessionError
from producers.resume import read_resume
from producers.slicer import Slicer, SlicerSettings
from schemas import topics, wire
from schemas.events import NS_PER_S
from schemas.frames import Frame, frame_line
from tapedeck import kafka, metrics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()

PING_S = 5.0  # a pong proves that everything sent before it has arrived
PONG_TIMEOUT_S = 10.0  # half-open sockets answer no ping
ANSWER_TIMEOUT_S = 15.0  # for connecting, authentication and subscriptions
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 60.0
EVICTED_REST_S = 60.0  # two clients that evict each other must not do it faster than this
STOP_S = 4.0  # an orderly stop waits this long for Kafka to take the rest
GOOD_AFTER_S = 60.0  # the backoff starts anew only when data has flowed this long


def pairs_of(symbols: Iterable[str]) -> list[str]:
    """Pairs as the vendor's subscriptions want them; raises UsageError for what is none."""
    try:
        return ["*" if symbol == "*" else wire.symbol_of(symbol) for symbol in symbols]
    except ValueError as error:
        raise UsageError(f"SYMBOLS: {error}") from error


class Producer:
    """Reads the socket into the slicer and the slicer's records into Kafka."""

    def __init__(self, shell: Shell, record: Path | None) -> None:
        self._shell = shell
        self._settings: Settings = shell.settings
        key = self._settings.polygon_api_key
        self._key = key.get_secret_value() if key else ""
        if not self._key:
            raise UsageError("POLYGON_API_KEY is not set: the feed needs a key")
        self._pairs = pairs_of(self._settings.symbols)
        self._streams: list[str] = list(self._settings.streams)
        self._record: IO[bytes] | None = record.open("ab") if record else None
        self._outbox = Outbox()
        self._publisher = kafka.Publisher(self._settings)
        self._slicer: Slicer
        self._timer: asyncio.TimerHandle | None = None
        self._now = 0
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._data_since: float | None = None

    async def run(self) -> None:
        """Until stopped. Raises UsageError when the key or all subscriptions are refused."""
        await kafka.prepare(self._settings)
        async for attempt in kafka.retrying(self._settings, "Kafka", kafka.passing):
            with attempt:
                resume = await read_resume(self._settings)
        linger = SlicerSettings(linger_ns=self._settings.linger_ns, usual_ns=self._settings.usual_ns)
        self._slicer = Slicer(linger, self._streams, self._pairs, resume)
        log.info("recording", epoch=self._slicer.epoch, streams=self._streams, pairs=self._pairs)
        publishing = asyncio.create_task(self._publish())
        reading = asyncio.create_task(self._read())
        timing = asyncio.create_task(self._raise())
        try:
            await self._shell.until_stopped(publishing, reading, timing)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await self._drain()
        finally:
            for task in (publishing, reading, timing):
                task.cancel()
            await asyncio.gather(publishing, reading, timing, return_exceptions=True)
            await self._publisher.stop()
            if self._record:
                self._record.close()
        log.info("stopped")

    async def _raise(self) -> None:
        """Raises what a timer failed with: asyncio itself would only log it."""
        await self._failed

    async def _drain(self) -> None:
        """Everything received goes out, with the `stop` gap behind it. Raises TapedeckError if Kafka is away."""
        if self._timer is not None:
            self._timer.cancel()
        self._slicer.stop(self._clock())
        self._outbox.append(self._slicer.take())
        try:
            await asyncio.wait_for(self._outbox.empty(), STOP_S)
        except TimeoutError:
            raise TapedeckError(
                f"stopped with {len(self._outbox)} records that Kafka did not take; "
                "they lie in the gap that the next start marks"
            ) from None

    def _clock(self) -> int:
        """Receive time in ns; never decreasing, whatever is done to the machine's clock."""
        self._now = max(self._now, time.time_ns())
        return self._now

    # -- the feed ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        """One session after the other, with full-jitter backoff between them."""
        failures = 0
        while True:
            self._data_since = None
            rest = 0.0
            try:
                await self._session()
            except AuthFailed as error:
                raise UsageError(f"the vendor refused the key (POLYGON_API_KEY): {error}") from error
            except InvalidURI as error:
                raise UsageError(f"POLYGON_WS_URL is not a WebSocket's address: {error}") from error
            except Refused as error:
                raise UsageError(f"the key may not subscribe to any of {self._params()}: {error}") from error
            except Evicted as error:
                rest = EVICTED_REST_S
                log.error("evicted: another client uses this key, and the vendor allows one", detail=str(error))
                metrics.PRODUCER_ERRORS.labels("evicted").inc()
            except (SessionError, WebSocketException, OSError, TimeoutError) as error:
                log.warning("the feed's connection is gone", error=str(error) or type(error).__name__)
                metrics.PRODUCER_ERRORS.labels("connection").inc()
            finally:
                self._shell.health["feed"] = "not connected"
                self._slicer.lost("reconnect", self._clock())
                self._pump()
            flowed = self._data_since is not None and time.monotonic() - self._data_since >= GOOD_AFTER_S
            failures = 0 if flowed else failures + 1
            rest += random.uniform(0, min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** max(0, failures - 1)))
            await asyncio.sleep(rest)

    def _params(self) -> list[str]:
        return [f"{stream}.{pair}" for stream in self._streams for pair in self._pairs]

    async def _session(self) -> None:
        """Returns only by raising: SessionError, AuthFailed, Refused, WebSocketException, OSError."""
        protocol = Protocol(self._key, self._params())
        async with connect(
            self._settings.polygon_ws_url,
            max_size=topics.MAX_FRAME_BYTES,
            open_timeout=ANSWER_TIMEOUT_S,
            close_timeout=1,
            ping_interval=None,
            compression=None,
            max_queue=1024,
        ) as socket:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                while not protocol.live:
                    await self._receive(socket, protocol)
            if protocol.refused:
                log.error("the key may not subscribe to some channels", refused=protocol.refused)
            log.info("subscribed", channels=len(self._params()) - protocol.refused)
            metrics.CONNECTS.inc()
            self._slicer.connected()
            self._shell.health["feed"] = None
            pinging = asyncio.create_task(self._ping(socket))
            try:
                while True:
                    await self._receive(socket, protocol)
                    await self._outbox.room()
            finally:
                pinging.cancel()
                await asyncio.gather(pinging, return_exceptions=True)

    async def _receive(self, socket: ClientConnection, protocol: Protocol) -> None:
        data = await socket.recv(decode=False)
        now = self._clock()
        if self._record:
            self._record.write(frame_line(Frame(now, data)))
        items = protocol.receive(data)
        for message in protocol.to_send():
            await socket.send(message, text=True)
        if not items:
            return
        metrics.FRAMES.inc()
        metrics.LAST_EVENT.set(now / NS_PER_S)
        counts = Counter(item.head.ev if item.head else "bad" for item in items)
        for stream, count in counts.items():
            metrics.FEED_EVENTS.labels(stream if stream in wire.STREAMS else "other").inc(count)
        if self._data_since is None:
            self._data_since = time.monotonic()
        self._slicer.frame(items, now)
        self._pump()

    async def _ping(self, socket: ClientConnection) -> None:
        while True:
            await asyncio.sleep(PING_S)
            try:
                await asyncio.wait_for(await socket.ping(), PONG_TIMEOUT_S)
            except TimeoutError:
                log.warning("no pong, the connection is half open")
                socket.transport.abort()
                return
            self._slicer.pong(self._clock())
            self._pump()

    # -- records -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Takes the slicer's records and wakes it when it next has something to do."""
        self._outbox.append(self._slicer.take())
        if self._slicer.clock.now is not None:
            metrics.FEED_CLOCK.set(self._slicer.clock.now / NS_PER_S)
        due = self._slicer.deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            delay = max(0, due - self._clock()) / NS_PER_S
            self._timer = asyncio.get_running_loop().call_later(delay, self._due)

    def _due(self) -> None:
        self._timer = None
        try:
            self._slicer.advance(self._clock())
            self._pump()
        except Exception as error:
            self._failed.set_exception(error)

    async def _publish(self) -> None:
        """In order, one round in flight; a failed round is sent again from its beginning by a new client."""
        topic = self._settings.topic_prefix + topics.RAW.name
        failures = 0
        while True:
            records = await self._outbox.next()
            metrics.OUTBOX.set(len(self._outbox))
            messages = [kafka.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers()) for r in records]
            try:
                if failures or not self._publisher.started:
                    await self._publisher.restart()
                await self._publisher.publish(messages)
            except (KafkaError, OSError) as error:
                failures += 1
                metrics.PRODUCER_ERRORS.labels("kafka").inc()
                self._shell.health["kafka"] = f"sending fails: {error}"
                if failures == 1:
                    log.warning("Kafka does not take the records, they wait", error=str(error))
                await asyncio.sleep(random.uniform(0.1, min(5.0, 0.25 * 2**failures)))
                continue
            if failures:
                log.info("Kafka takes the records again", waited=failures)
            failures = 0
            self._shell.health["kafka"] = None
            self._outbox.acknowledge(len(records))
            for kind, count in Counter(record.kind for record in records).items():
                metrics.PUBLISHED.labels(kind).inc(count)
            metrics.OUTBOX.set(len(self._outbox))


async def run(shell: Shell, record: Path | None = None) -> None:
    """`tapedeck produce`. Raises UsageError, TapedeckError."""
    await Producer(shell, record).run()
