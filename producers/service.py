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
from producers.lease import Lease, claim_epoch
from producers.mouth import Mouth, Superseded
from producers.proof import Prover
from producers.protocol import pairs_of, params_of
from producers.resume import read_log_end, read_silences
from producers.session import Ear
from producers.slicer import Resume, Slicer, SlicerSettings, Suspicion
from producers.split import Item
from schemas import topics
from schemas.events import NS_PER_S
from schemas.raw import RawRecord
from tapedeck import kafka, metrics
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()
T = TypeVar("T")

STOP_S = 1.5  # an orderly stop waits this long for Kafka to take the rest; then it stays in the journal
STATISTICS_S = 60.0
MEASURE_S = 0.25
NEVER = 2**63
ROOM_S = 1.0  # a full journal is tried again this often


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
        self._mouth = Mouth(self._settings, journal, shell.health)
        self._slicer: Slicer
        self._tail: Resume | None = None  # where the journal's end stands
        self._full = False
        self._try_again_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = NEVER
        self._linger_ns = self._settings.linger_ns
        self._now = 0
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock_at = time.monotonic_ns()
        self._events: Counter[str] = Counter()  # of slicers before this one
        self._prover = Prover(self._settings, self._pairs, self._close)

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
            for work in (self._raise(), self._tell(), self._measure(), self._prover.prove()):
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
            await self._mouth.stop()
            for part in ("feed", "kafka", "journal"):
                self._shell.health.pop(part, None)

    async def _take_up(self, lease: Lease, start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        """Sends what a former process left, with its old epoch, finds out where the log then stands, and claims the
        next epoch."""
        mouth = self._mouth
        mouth.log_end = await self._from_kafka(read_log_end)
        mouth.claimed = mouth.log_end.claims
        lease.records(mouth.log_end.epoch + 1)
        left = len(self._journal)
        superseded = left and mouth.log_end.epoch > self._journal.epoch
        if superseded:
            kept = self._journal.set_aside()
            log.warning("another producer went on with the log: the journal is not sent", records=left, kept=str(kept))
        publishing = start(mouth.speak())
        if left and not superseded:
            log.info("sending what the journal holds first", records=left)
            empty = asyncio.create_task(self._journal.empty())
            try:
                await asyncio.wait({empty, publishing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                empty.cancel()
            if publishing.done():
                publishing.result()
            mouth.log_end = await self._from_kafka(read_log_end)
        at_least = max(mouth.log_end.epoch, self._journal.epoch) + 1
        mouth.claimed = await claim_epoch(self._settings, at_least, self._journal.name)
        self._slicer = self._new_slicer(await self._from_kafka(self._read_resume), mouth.claimed)
        lease.records(mouth.claimed)
        log.info("recording", epoch=self._slicer.epoch, streams=self._streams, pairs=self._pairs)

    async def _read_resume(self, settings: Settings) -> Resume | None:
        end = self._mouth.log_end
        return end.resume(await read_silences(settings, end))

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
        """Into the journal; when it is full, what comes is counted and lies in a gap, with a new epoch that is ours
        behind it: within one, every number must follow."""
        records = self._slicer.take()
        if not records:
            return
        for gap in self._slicer.suspicions():
            self._prover.doubt(gap)
        unclaimed = self._slicer.epoch > self._mouth.claimed
        if self._full and (unclaimed or time.monotonic() < self._try_again_at):
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

    def _close(self, gap: Suspicion) -> bool:
        """Nothing was missed in it. False: not now."""
        closed = self._slicer.nothing_missed(gap, self.clock())
        self._pump()
        return closed

    def _drop(self, records: list[RawRecord]) -> None:
        metrics.DROPPED.inc(sum(record.events for record in records if record.kind in ("slice", "bad")))
        resume = self._tail
        if resume is not None and resume.reason != "journal":  # else the gap goes on that the first of them began
            resume = self._slicer.dropped(resume)
        connected = self._shell.health.get("feed") is None
        self._events += self._slicer.counts
        used = self._tail.epoch if self._tail else 0
        self._slicer = self._new_slicer(resume, max(used + 1, self._mouth.claimed))
        if connected:
            self._slicer.connected(self.clock())

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
            self._mouth.look()
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
                errors=ear.counts["errors"] + self._mouth.failures,
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
    settings.need_key("the feed")
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
