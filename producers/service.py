"""The producer process: the vendor's feed through the journal onto the raw topic."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import IO, Any, TypeVar

import structlog
from aiokafka.errors import KafkaError

from producers.journal import Journal, JournalFull
from producers.lease import SESSION_S, Lease, claim_epoch
from producers.proof import nothing_missed, provable
from producers.protocol import pairs_of, params_of
from producers.rest import Rest, RestError
from producers.resume import LogEnd, read_log_end, read_silences
from producers.session import Ear, jitter
from producers.slicer import Resume, Slicer, SlicerSettings, Suspicion
from producers.split import Item
from schemas import topics, wire
from schemas.events import NS_PER_MS, NS_PER_S
from schemas.raw import RawRecord
from tapedeck import kafka, metrics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()
T = TypeVar("T")

LONGEST_RESEND_S = 5.0
STOP_S = 1.5  # an orderly stop waits this long for Kafka to take the rest; then it stays in the journal
STATISTICS_S = 60.0
MEASURE_S = 0.25
SLOW_S = 5.0  # aiokafka itself tries on in silence for as long as the broker is away
NEVER = 2**63
SETTLE_S = 5.0  # REST, and the log, have what came at a silence's end
MOST_SUSPICIONS = 100
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
        self._pairs = pairs_of(self._settings.symbols)
        self._streams: list[str] = list(self._settings.streams)
        self._ear = Ear(self._settings, self, record)
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
        self._now = 0
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock_at = time.monotonic_ns()
        self._failed_rounds = 0
        self._events: Counter[str] = Counter()  # of slicers before this one
        self._suspicions: asyncio.Queue[Suspicion] = asyncio.Queue(MOST_SUSPICIONS)

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
            reading = start(self._ear.listen())
            for work in (self._raise(), self._tell(), self._measure(), self._prove()):
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
        self._log_end = await self._from_kafka(read_log_end)
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
            self._log_end = await self._from_kafka(read_log_end)
        at_least = max(self._log_end.epoch, self._journal.epoch) + 1
        self._claimed = await claim_epoch(self._settings, at_least, self._journal.name)
        self._slicer = self._new_slicer(await self._from_kafka(self._read_resume), self._claimed)
        lease.records(self._claimed)
        log.info("recording", epoch=self._slicer.epoch, streams=self._streams, pairs=self._pairs)

    async def _read_resume(self, settings: Settings) -> Resume | None:
        return self._log_end.resume(await read_silences(settings, self._log_end))

    async def _from_kafka(self, read: Callable[[Settings], Awaitable[T]]) -> T:
        try:
            async for attempt in kafka.retrying(self._settings, "Kafka", kafka.passing):
                with attempt:
                    return await read(self._settings)
        except (KafkaError, OSError) as error:
            where = self._settings.kafka_bootstrap_servers
            raise TapedeckError(f"Kafka at {where} cannot be read (KAFKA_BOOTSTRAP_SERVERS): {error}") from error
        raise AssertionError("either read or failed")

    def _new_slicer(self, resume: Resume | None, epoch: int | None = None) -> Slicer:
        self._tail = resume
        linger = SlicerSettings(linger_ns=self._settings.linger_ns, usual_ns=self._settings.usual_ns)
        return Slicer(linger, self._streams, self._pairs, resume, epoch)

    async def _raise(self) -> None:
        """Raises what a timer failed with: asyncio itself would only log it."""
        await self._failed

    async def _drain(self) -> None:
        """Everything received goes out, with the `stop` gap behind it, or stays in the journal."""
        self._slicer.stop(self.clock())
        self._append()
        self._warn_without_clock()
        try:
            await asyncio.wait_for(self._journal.empty(), STOP_S)
        except TimeoutError:
            log.warning("Kafka is away: the next start sends what is left", records=len(self._journal))

    # -- what the feed says ------------------------------------------------------------------------

    def clock(self) -> int:
        """Receive time in ns; never decreasing, whatever is done to the machine's clock."""
        wall, at = time.time_ns(), time.monotonic_ns()
        self._now = max(self._now + at - self._clock_at, wall) if wall < self._now else wall
        self._clock_at = at
        return self._now

    def connected(self, now: int) -> None:
        self._slicer.connected(now)
        self._shell.health["feed"] = None

    def frame(self, items: list[Item], now: int) -> None:
        self._slicer.frame(items, now)
        self._pump()

    def pong(self, asked: int, now: int) -> None:
        self._slicer.pong(asked, now)
        self._pump()

    def stalled(self, now: int) -> list[str]:
        return self._slicer.stalled(now)

    def lost(self, now: int) -> None:
        self._shell.health["feed"] = "not connected"
        self._slicer.lost("reconnect", now)
        self._pump()

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
        delay = max(0, due - self.clock()) / NS_PER_S
        self._timer = asyncio.get_running_loop().call_later(delay, self._due)

    def _due(self) -> None:
        self._timer, self._wakes_at = None, NEVER
        try:
            self._slicer.advance(self.clock())
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
        for gap in self._slicer.suspicions():
            self._doubt(gap)
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
            self._slicer.connected(self.clock())

    # -- gaps in which perhaps nothing was missed ---------------------------------------------------

    def _doubt(self, gap: Suspicion) -> None:
        if provable(gap, self._pairs):
            try:
                self._suspicions.put_nowait(gap)
            except asyncio.QueueFull:
                log.warning("too many silences to ask REST about: this one stays a gap", streams=gap.streams)

    async def _prove(self) -> None:
        """Asks REST about one suspected silence after the other, and closes those in which nothing was missed."""
        async with Rest(self._settings) as rest:
            while True:
                gap = await self._suspicions.get()
                await asyncio.sleep(SETTLE_S)
                told = {"streams": gap.streams, "seconds": round((gap.to - gap.since) / NS_PER_S, 3)}
                try:
                    empty = await nothing_missed(self._settings, rest, gap, self._pairs)
                except (RestError, KafkaError, OSError, *wire.DECODE_ERRORS) as error:
                    log.warning("whether a silence was one cannot be told: it stays a gap", error=str(error), **told)
                    metrics.SILENCES.labels("unknown").inc()
                    continue
                metrics.SILENCES.labels("empty" if empty else "open").inc()
                if not empty:
                    log.info("REST does not show that a silence was one: it stays a gap", **told)
                    continue
                while not self._slicer.nothing_missed(gap, self.clock()):
                    await asyncio.sleep(1)
                self._pump()
                log.info("nothing was missed in a silence: its gap is closed", **told)

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
                self._failed_rounds += 1
                self._shell.health["kafka"] = f"sending fails: {refusal or error}"
                if type(error) not in told:
                    told.add(type(error))
                    if refusal:
                        log.error(f"Kafka refuses the records, the journal keeps them: {refusal}", error=str(error))
                    else:
                        log.warning("Kafka does not take the records, the journal keeps them", error=str(error))
                await asyncio.sleep(0.1 + jitter(failures, 0.25, LONGEST_RESEND_S))
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
            metrics.FRAMES.inc(self._ear.frames - frames)
            frames = self._ear.frames
            if self._ear.heard_at:
                metrics.LAST_EVENT.set(self._ear.heard_at / NS_PER_S)
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
            metrics.QUEUE.set(self._ear.queued)
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
            ear, events = self._ear, self._events + self._slicer.counts
            fresh = events.total() - before.total()
            log.info(
                "statistics",
                uptime_s=round(time.monotonic() - began),
                events=dict(events),
                events_per_s=round(fresh / STATISTICS_S, 1),
                last_event_age_s=round((self.clock() - ear.heard_at) / NS_PER_S, 1) if ear.heard_at else None,
                errors=ear.counts["errors"] + self._failed_rounds,
                reconnects=max(0, ear.counts["connects"] - 1),
                queue_frames=ear.queued,
                journal_records=len(self._journal),
                journal_bytes=self._journal.size,
            )
            self._warn_without_clock()
            metrics.SILENT.set(len(ear.silent))
            if ear.silent - told:
                names = sorted(f"{stream}.{pair}" for stream, pair in ear.silent)
                log.warning("acknowledged by the vendor, but never delivered", channels=names)
                told |= ear.silent

    def _warn_without_clock(self) -> None:
        """A log begins with the first event that tells the time; what comes before is in no record."""
        counts = self._slicer.counts
        if self._slicer.clock.now is None and counts:
            log.warning("nothing that came tells the time, so nothing is recorded yet", events=dict(counts))


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
