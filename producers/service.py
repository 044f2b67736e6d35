"""The producer process: the vendor's feed through the journal onto the raw topic."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any

import structlog
from aiokafka.errors import KafkaError
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.frames import CloseCode

from producers.journal import Journal, JournalFull
from producers.lease import SESSION_S, Lease, claim_epoch
from producers.protocol import AuthFailed, Evicted, Protocol, Refused, SessionError, pairs_of, params_of
from producers.resume import LogEnd, read_log_end
from producers.slicer import Resume, Slicer, SlicerSettings
from producers.socket import ANSWER_TIMEOUT_S, open_socket
from schemas import topics
from schemas.events import NS_PER_MS, NS_PER_S
from schemas.frames import Frame, frame_line
from schemas.raw import RawRecord
from tapedeck import kafka, metrics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()

PING_S = 1.0  # a pong proves that everything sent before it was asked for has arrived, so an idle feed ticks by them
PONG_TIMEOUT_S = 10.0  # half-open sockets answer no ping
WATCH_S = 0.5
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 60.0
LONGEST_RESEND_S = 5.0
EVICTED_REST_S = 60.0  # two clients that evict each other must not do it faster than this
STOP_S = 2.5  # an orderly stop waits this long for Kafka to take the rest; then it stays in the journal
GOOD_AFTER_S = 60.0  # the backoff starts anew only when data has flowed this long
STATISTICS_S = 60.0
MEASURE_S = 0.25
SLOW_S = 5.0  # aiokafka itself tries on in silence for as long as the broker is away
NEVER = 2**63
ROOM_S = 1.0  # a full journal is tried again this often


class Superseded(Exception):
    """Another producer has gone on with the log."""


class Producer:
    """Reads the socket into the slicer, the slicer's records into the journal, and the journal into Kafka.

    One lives from gaining the lease to losing it.
    """

    def __init__(self, shell: Shell, journal: Journal, record: IO[bytes] | None) -> None:
        self._shell = shell
        self._settings: Settings = shell.settings
        key = self._settings.polygon_api_key
        self._key = key.get_secret_value() if key else ""
        self._params = params_of(self._settings)
        self._pairs = pairs_of(self._settings.symbols)
        self._streams: list[str] = list(self._settings.streams)
        self._record = record
        self._journal = journal
        self._publisher = kafka.Publisher(self._settings)
        self._log_end = LogEnd({}, 0)
        self._claimed = 0
        self._slicer: Slicer
        self._tail: Resume | None = None  # where the journal's end stands
        self._full = False
        self._try_again_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = NEVER
        self._round_began: float | None = None  # when what Kafka has not acknowledged yet was sent
        self._slow = False
        self._linger_ns = self._settings.linger_ns
        self._frames = 0
        self._now = 0
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._data_since = self._data_last = 0  # in this session, ns
        self._silent: set[tuple[str, str]] = set()
        self._delivered: set[tuple[str, str]] = set()
        self._clock_at = time.monotonic_ns()
        self._counts: Counter[str] = Counter()  # errors and connects
        self._events: Counter[str] = Counter()  # of slicers before this one

    async def run(self, lease: Lease, keeping: asyncio.Task[None]) -> None:
        """Until stopped or the lease is lost. Raises UsageError when the key or all subscriptions are refused."""
        lost = asyncio.create_task(_wait(lease.lost))
        tasks = [lost, keeping]
        mine: list[asyncio.Task[None]] = [lost]

        def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            task = asyncio.create_task(work)
            tasks.append(task)
            mine.append(task)
            return task

        self._shell.health["feed"] = "not connected yet"
        try:
            taking_up = start(self._take_up(lease, start))
            await self._shell.until_stopped(*tasks)
            if not taking_up.done():
                return
            reading = start(self._read())
            for work in (self._raise(), self._tell(), self._measure()):
                start(work)
            tasks.remove(taking_up)
            await self._shell.until_stopped(*tasks)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if lost.done():
                raise Superseded
            await self._drain()
        except Superseded:
            log.error("another producer has gone on with the log: this one stands by")
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)
            await self._publisher.stop()
            for part in ("feed", "kafka", "journal"):
                self._shell.health.pop(part, None)

    async def _take_up(self, lease: Lease, start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        """Sends what a former process left, with its old epoch, finds out where the log then stands, and claims the
        next epoch."""
        await self._read_log_end()
        self._claimed = self._log_end.claims
        lease.records(self._log_end.epoch + 1)
        with contextlib.suppress(KafkaError, OSError):
            await self._publisher.start()
        left = len(self._journal)
        superseded = left and self._log_end.epoch > self._journal.epoch
        if superseded:
            kept = self._journal.set_aside()
            log.warning("another producer went on with the log: the journal is not sent", records=left, kept=str(kept))
        publishing = start(self._publish())
        if left and not superseded:
            log.info("sending what the journal holds first", records=left)
            empty = asyncio.create_task(self._journal.empty())
            try:
                await asyncio.wait({empty, publishing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                empty.cancel()
            if publishing.done():
                publishing.result()
            await self._read_log_end()
        at_least = max(self._log_end.epoch, self._journal.epoch) + 1
        self._claimed = await claim_epoch(self._settings, at_least, self._journal.name)
        self._slicer = self._new_slicer(self._log_end.resume(), self._claimed)
        lease.records(self._claimed)
        log.info("recording", epoch=self._slicer.epoch, streams=self._streams, pairs=self._pairs)

    async def _read_log_end(self) -> None:
        try:
            async for attempt in kafka.retrying(self._settings, "Kafka", kafka.passing):
                with attempt:
                    self._log_end = await read_log_end(self._settings)
        except (KafkaError, OSError) as error:
            where = self._settings.kafka_bootstrap_servers
            raise TapedeckError(f"Kafka at {where} cannot be read (KAFKA_BOOTSTRAP_SERVERS): {error}") from error

    def _new_slicer(self, resume: Resume | None, epoch: int | None = None) -> Slicer:
        self._tail = resume
        linger = SlicerSettings(linger_ns=self._settings.linger_ns, usual_ns=self._settings.usual_ns)
        return Slicer(linger, self._streams, self._pairs, resume, epoch)

    async def _raise(self) -> None:
        """Raises what a timer failed with: asyncio itself would only log it."""
        await self._failed

    async def _drain(self) -> None:
        """Everything received goes out, with the `stop` gap behind it, or stays in the journal."""
        self._slicer.stop(self._clock())
        self._append()
        self._warn_without_clock()
        try:
            await asyncio.wait_for(self._journal.empty(), STOP_S)
        except TimeoutError:
            log.warning("Kafka is away: the next start sends what is left", records=len(self._journal))

    def _clock(self) -> int:
        """Receive time in ns; never decreasing, whatever is done to the machine's clock."""
        wall, at = time.time_ns(), time.monotonic_ns()
        self._now = max(self._now + at - self._clock_at, wall) if wall < self._now else wall
        self._clock_at = at
        return self._now

    # -- the feed ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        """One session after the other, with full-jitter backoff between them."""
        failures = 0
        while True:
            self._data_since = self._data_last = 0
            rest = 0.0
            try:
                await self._session()
            except AuthFailed as error:
                raise UsageError(f"the vendor refused the key (POLYGON_API_KEY): {error}") from error
            except (InvalidURI, UnicodeError) as error:  # the latter for what cannot be a name
                raise UsageError(f"POLYGON_WS_URL is not a WebSocket's address: {error}") from error
            except Refused as error:
                raise UsageError(f"the key may not subscribe to any of {self._params}: {error}") from error
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
                self._counts["errors"] += 1
            finally:
                self._shell.health["feed"] = "not connected"
                self._slicer.lost("reconnect", self._clock())
                self._pump()
            flowed = self._data_last - self._data_since >= GOOD_AFTER_S * NS_PER_S
            failures = 0 if flowed else failures + 1
            await asyncio.sleep(rest + _jitter(failures, FIRST_RETRY_S, LONGEST_RETRY_S))

    async def _session(self) -> None:
        """Returns only by raising: SessionError, AuthFailed, Refused, WebSocketException, OSError."""
        protocol = Protocol(self._key, self._params)
        async with open_socket(self._settings) as socket:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                while not protocol.live:
                    await self._receive(socket, protocol)
            if protocol.refused:
                log.error("the key may not subscribe to some channels", refused=protocol.refused)
            log.info("subscribed", channels=len(self._params) - len(protocol.refused))
            metrics.CONNECTS.inc()
            self._counts["connects"] += 1
            wanted = set(self._params) - set(protocol.refused)
            channels = (param.split(".", 1) for param in wanted if not param.endswith(".*"))
            self._silent = {(stream, pair) for stream, pair in channels} - self._delivered
            self._slicer.connected(self._clock())
            self._shell.health["feed"] = None
            watching = [asyncio.create_task(self._ping(socket)), asyncio.create_task(self._watch(socket))]
            for task in watching:
                task.add_done_callback(self._seen)
            try:
                while True:
                    await self._receive(socket, protocol)
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)

    async def _receive(self, socket: ClientConnection, protocol: Protocol) -> None:
        data = await socket.recv(decode=False)
        now = self._clock()
        if self._record:
            self._keep(Frame(now, data))
        items = protocol.receive(data)
        for message in protocol.to_send():
            await socket.send(message, text=True)
        if not items:
            return
        self._frames += 1
        if self._silent:
            self._delivered |= self._silent & {(item.head.ev, item.head.pair) for item in items if item.head}
            self._silent -= self._delivered
        self._data_since, self._data_last = self._data_since or now, now
        self._slicer.frame(items, now)
        self._pump()

    def _keep(self, frame: Frame) -> None:
        """Into the frames file, for as long as its disk takes it; the tape does not suffer from it."""
        assert self._record is not None
        try:
            self._record.write(frame_line(frame))
        except OSError as error:
            log.error("frames are no longer written to the file of --record", error=str(error))
            self._counts["errors"] += 1
            self._record = None

    def _seen(self, task: asyncio.Task[None]) -> None:
        """A watcher that failed must not leave the session unwatched."""
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    async def _ping(self, socket: ClientConnection) -> None:
        while True:
            await asyncio.sleep(PING_S)
            asked = self._clock()
            try:
                await asyncio.wait_for(await socket.ping(), PONG_TIMEOUT_S)
            except ConnectionClosed:
                return
            except TimeoutError:
                log.warning("no pong, the connection is half open")
                socket.transport.abort()
                return
            self._slicer.pong(asked, self._clock())
            self._pump()

    async def _watch(self, socket: ClientConnection) -> None:
        """Pongs and the other streams do not excuse a stream that is silent for longer than is usual."""
        while not (stalled := self._slicer.stalled(self._clock())):
            await asyncio.sleep(WATCH_S)
        log.warning("streams have stalled, connecting anew", streams=stalled)
        metrics.PRODUCER_ERRORS.labels("stall").inc()
        socket.transport.abort()

    # -- records -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Takes the slicer's records, and sees to it that it is woken when it next has something to do: at the
        latest when an event that just came has lingered. Being woken too early costs little."""
        self._append()
        if self._wakes_at > self._now + self._linger_ns:
            self._wake_at(self._now + self._linger_ns)

    def _wake_at(self, due: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = due
        delay = max(0, due - self._clock()) / NS_PER_S
        self._timer = asyncio.get_running_loop().call_later(delay, self._due)

    def _due(self) -> None:
        self._timer, self._wakes_at = None, NEVER
        try:
            self._slicer.advance(self._clock())
            self._append()
            due = self._slicer.deadline()
            if due is not None:
                self._wake_at(due)
        except Exception as error:
            if not self._failed.done():
                self._failed.set_exception(error)

    def _append(self) -> None:
        """Into the journal; when it is full, what comes is counted and lies in a gap, with a new epoch
        behind it: within one, every number must follow."""
        records = self._slicer.take()
        if not records:
            return
        if self._full and time.monotonic() < self._try_again_at:
            self._drop(records)
            return
        try:
            self._journal.append(records)
        except JournalFull as error:
            if not self._full:
                log.error("the journal is full: what comes now lies in a marked gap", error=str(error))
                self._shell.health["journal"] = str(error)
            self._full, self._try_again_at = True, time.monotonic() + ROOM_S
            self._drop(records)
            return
        if self._full:
            log.info("the journal takes records again")
            self._full, self._shell.health["journal"] = False, None
        self._tail = _tail(self._tail, records)

    def _drop(self, records: list[RawRecord]) -> None:
        metrics.DROPPED.inc(sum(record.events for record in records if record.kind in ("slice", "bad")))
        resume = None
        if self._tail is not None:
            last = [
                None if ms is None or since is None else min(ms, since // NS_PER_MS)
                for ms, since in zip(self._tail.last_ms, self._slicer.missed_since, strict=True)
            ]
            resume = Resume(self._tail.epoch, self._tail.clock_ms, self._tail.recv_ns, last, "journal")
        connected = self._shell.health.get("feed") is None
        self._events += self._slicer.counts
        self._slicer = self._new_slicer(resume)
        if connected:
            self._slicer.connected(self._clock())

    async def _publish(self) -> None:
        """In file order, one round in flight; after a failure everything from the acknowledged mark on that is
        not in the log is sent again by a new client. Raises Superseded."""
        topic = self._settings.topic_prefix + topics.RAW.name
        failures = 0
        told: set[type[Exception]] = set()
        began = time.monotonic()
        self._journal.rewind()  # a former tenure may have ended in the middle of a round
        while True:
            records = await self._journal.next()
            last, began = began, time.monotonic()
            try:
                if failures or not self._publisher.started:
                    await self._publisher.restart()
                if failures or began - last > SESSION_S:  # it may have been frozen, and its lease lost meanwhile
                    self._log_end = await read_log_end(self._settings)
                    if self._log_end.claims > self._claimed:
                        raise Superseded
                self._round_began = time.monotonic()
                await self._publisher.publish(
                    kafka.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers())
                    for r in records
                    if not self._log_end.has(r)
                )
            except (KafkaError, OSError) as error:
                self._journal.rewind()
                failures += 1
                refusal = kafka.refusal(error, topics.RAW)
                metrics.PRODUCER_ERRORS.labels("refused" if refusal else "kafka").inc()
                self._counts["errors"] += 1
                self._shell.health["kafka"] = f"sending fails: {refusal or error}"
                if type(error) not in told:
                    told.add(type(error))
                    if refusal:
                        log.error(f"Kafka refuses the records, the journal keeps them: {refusal}", error=str(error))
                    else:
                        log.warning("Kafka does not take the records, the journal keeps them", error=str(error))
                await asyncio.sleep(0.1 + _jitter(failures, 0.25, LONGEST_RESEND_S))
                continue
            if failures:
                log.info("Kafka takes the records again", failures=failures)
            if self._slow:
                log.info("Kafka has taken the records")
            failures, self._slow, self._round_began = 0, False, None
            told.clear()
            self._shell.health["kafka"] = None
            self._journal.acknowledge()
            for kind, count in Counter(record.kind for record in records).items():
                metrics.PUBLISHED.labels(kind).inc(count)

    # -- telling -----------------------------------------------------------------------------------

    async def _measure(self) -> None:
        """Metrics, at intervals: set for each frame they would cost as much as the frame."""
        frames, seen = 0, Counter[str]()
        while True:
            metrics.FRAMES.inc(self._frames - frames)
            if self._frames > frames:
                metrics.LAST_EVENT.set(self._now / NS_PER_S)
            frames = self._frames
            events = self._events + self._slicer.counts
            for stream, count in (events - seen).items():
                metrics.FEED_EVENTS.labels(stream).inc(count)
            seen = events
            if self._slicer.clock.now is not None:
                metrics.FEED_CLOCK.set(self._slicer.clock.now / NS_PER_S)
            if self._round_began is not None and not self._slow and time.monotonic() - self._round_began > SLOW_S:
                self._slow = True
                self._shell.health["kafka"] = f"has acknowledged nothing for {SLOW_S:g} s"
                log.warning("Kafka acknowledges nothing, the journal keeps the records", seconds=SLOW_S)
            metrics.JOURNAL.set(len(self._journal))
            metrics.JOURNAL_BYTES.set(self._journal.size)
            await asyncio.sleep(MEASURE_S)

    async def _tell(self) -> None:
        """Statistics each minute, and the channels that were acknowledged but have never delivered."""
        began = time.monotonic()
        told: set[tuple[str, str]] = set()
        while True:
            before = self._events + self._slicer.counts
            await asyncio.sleep(STATISTICS_S)
            counts, events = self._counts, self._events + self._slicer.counts
            fresh = events.total() - before.total()
            log.info(
                "statistics",
                uptime_s=round(time.monotonic() - began),
                events=dict(events),
                events_per_s=round(fresh / STATISTICS_S, 1),
                last_event_age_s=round((time.time_ns() - self._now) / NS_PER_S, 1) if self._now else None,
                errors=counts["errors"],
                reconnects=max(0, counts["connects"] - 1),
                journal_records=len(self._journal),
                journal_bytes=self._journal.size,
            )
            self._warn_without_clock()
            metrics.SILENT.set(len(self._silent))
            if self._silent - told:
                names = sorted(f"{stream}.{pair}" for stream, pair in self._silent)
                log.warning("acknowledged by the vendor, but never delivered", channels=names)
                told |= self._silent

    def _warn_without_clock(self) -> None:
        """A log begins with the first event that tells the time; what comes before is in no record."""
        counts = self._slicer.counts
        if self._slicer.clock.now is None and counts:
            log.warning("nothing that came tells the time, so nothing is recorded yet", events=dict(counts))


def _jitter(failures: int, first_s: float, longest_s: float) -> float:
    """How long to rest after so many failures in a row: exponential with full jitter. Only so many double it, for
    2.0 ** 1024 is no number, and a vendor may be away for a night."""
    return random.uniform(0, min(longest_s, first_s * 2 ** min(max(0, failures - 1), 16)))


def _evicted(error: Exception) -> bool:
    """The vendor says so, or closes with 1008 without a word."""
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        return error.rcvd.code == CloseCode.POLICY_VIOLATION
    return isinstance(error, Evicted)


def _tail(tail: Resume | None, records: list[RawRecord]) -> Resume:
    """Where the log will stand after these."""
    last_ms: list[int | None] = list(tail.last_ms) if tail else [None] * topics.PARTITIONS
    for record in records:
        last_ms[record.partition] = record.timestamp_ms
    newest = records[-1]
    return Resume(newest.epoch, newest.timestamp_ms, newest.recv[-1][0], last_ms)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def run(shell: Shell, record: Path | None = None) -> None:
    """`tapedeck produce`. Raises UsageError, TapedeckError."""
    settings = shell.settings
    if not settings.polygon_api_key:
        raise UsageError("POLYGON_API_KEY is not set: the feed needs a key")
    params_of(settings)
    folder = settings.journal_dir / (settings.topic_prefix + topics.RAW.name)
    try:
        journal = Journal(folder, settings.journal_max_bytes)
    except OSError as error:
        raise TapedeckError(f"the journal's folder {folder} cannot be used (JOURNAL_DIR): {error}") from error
    try:
        await _until_stopped(shell, kafka.prepare(settings))
        file = _open(record) if record else None
        while not shell.stopping.is_set():
            await _tenure(shell, journal, file)
        if file:
            with contextlib.suppress(OSError):
                file.close()
    except KafkaError as error:
        raise TapedeckError(f"Kafka at {settings.kafka_bootstrap_servers}: {error}") from error
    finally:
        journal.close()
    log.info("stopped")


def _open(path: Path) -> IO[bytes]:
    """A frames file to append to, without the line that a killed process may have torn. Raises TapedeckError."""
    try:
        file = path.open("a+b")
        if size := file.tell():
            file.seek(max(0, size - 2 * topics.MAX_FRAME_BYTES))
            file.truncate(size - len(file.read().rpartition(b"\n")[2]))
    except OSError as error:
        raise TapedeckError(f"{path} cannot be written (--record): {error}") from error
    return file


async def _tenure(shell: Shell, journal: Journal, file: IO[bytes] | None) -> None:
    """Stands by until it has the lease, and records until it is stopped or has lost it."""
    lease = Lease(shell.settings, journal.name)
    keeping = asyncio.create_task(lease.keep())
    held = asyncio.create_task(_wait(lease.held))
    metrics.LEASE.set(0)
    try:
        await shell.until_stopped(held, keeping)
        if lease.held.is_set() and not shell.stopping.is_set():
            metrics.LEASE.set(1)
            await Producer(shell, journal, file).run(lease, keeping)
    finally:
        held.cancel()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _until_stopped(shell: Shell, work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    try:
        await shell.until_stopped(task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
