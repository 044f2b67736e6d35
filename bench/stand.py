"""A stand for stream processors: one program on one core, the broker (and whoever measures) on the other.

What a program did is seen from outside: its bars in their topic, the CPU and memory of its process tree, and how much
of its core was taken by others meanwhile.
"""

import asyncio
import bisect
import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from schemas import topics
from schemas.raw import RawRecord
from tapedeck import kafka as clients
from tapedeck.settings import Settings

CORES = os.sched_getaffinity(0)  # before anybody is pinned
MAX_BYTES = 8 * 1024**3  # a runaway must not take the machine down
PAUSES, PAUSE_S = 3, 4.0
PR_SET_PDEATHSIG = 1


class Used(NamedTuple):
    """What a process tree took. `series`: its CPU seconds by wall time; `others`: the part of its core's time that
    somebody else had."""

    cpu_s: float
    peak_mb: float
    others: float
    series: list[tuple[float, float]]

    def between(self, begin: float, end: float) -> float:
        """CPU seconds from one wall time to another."""
        return self._at(end) - self._at(begin)

    def _at(self, when: float) -> float:
        at = bisect.bisect(self.series, (when, 0.0))
        if at in (0, len(self.series)):
            return self.series[min(at, len(self.series) - 1)][1]
        (before, least), (after, most) = self.series[at - 1], self.series[at]
        return least + (most - least) * (when - before) / (after - before)


class Watched:
    """A child pinned to a core, sampled five times a second."""

    def __init__(self, command: list[str], core: int, log: Path, env: dict[str, str], cwd: Path) -> None:
        self.log = log
        self._core = sorted(CORES)[-1 if core else 0]
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                command,
                env=os.environ | env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=self._child,
            )
        self._root = psutil.Process(self.popen.pid)
        self._peak, self._cpu = 0, dict[int, float]()
        self._series: list[tuple[float, float]] = []
        self._began, self._busy = time.monotonic(), self._busy_s()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _child(self) -> None:
        """It keeps to its core, and does not outlive us."""
        os.sched_setaffinity(0, {self._core})
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def _busy_s(self) -> float:
        times = psutil.cpu_times(percpu=True)[self._core]
        return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)

    def sample(self) -> None:
        with contextlib.suppress(psutil.Error):
            rss = 0
            for process in [self._root, *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    rss += process.memory_info().rss
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
            self._peak = max(self._peak, rss)
            self._series.append((time.time(), sum(self._cpu.values())))
            if rss > MAX_BYTES:
                self.kill()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.sample()

    @property
    def cpu_s(self) -> float:
        self.sample()
        return sum(self._cpu.values())

    @property
    def peak_mb(self) -> float:
        return self._peak / 2**20

    def rss_mb(self) -> float:
        return float(self._root.memory_info().rss) / 2**20

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def end(self, patience_s: float = 10) -> Used:
        """In good order if it can."""
        self.sample()
        self._ended.set()
        used, passed = sum(self._cpu.values()), time.monotonic() - self._began
        others = max(0.0, self._busy_s() - self._busy - used) / passed
        self.signal(signal.SIGTERM)
        try:
            self.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self.popen.wait()
        return Used(used, self._peak / 2**20, others, self._series)


def said(child: Watched) -> str:
    """The end of what it wrote, for an error message."""
    return child.log.read_text(errors="replace")[-2000:]


class Stand:
    """Kafka as the bench uses it: topics with records of any age, their ends, their contents."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._admin = AIOKafkaAdminClient(bootstrap_servers=address)
        self._reader: Any = None

    async def start(self) -> None:
        await self._admin.start()
        await self._fresh_reader()

    async def _fresh_reader(self) -> None:
        self._reader = AIOKafkaConsumer(bootstrap_servers=self.address, max_partition_fetch_bytes=4 * 2**20)
        await self._reader.start()

    async def _no_reader(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # of a task of its own, which leaks out of it at times
            await self._reader.stop()

    async def stop(self) -> None:
        await self._no_reader()
        await self._admin.close()

    def settings(self, prefix: str, **others: Any) -> Settings:
        return Settings(
            _env_file=None,
            kafka_bootstrap_servers=self.address,
            topic_prefix=prefix,
            **others,
        )

    async def make(self, *names: str) -> None:
        config = {"retention.ms": "-1"}
        await self._admin.create_topics([NewTopic(n, topics.PARTITIONS, 1, topic_configs=config) for n in names])

    async def drop(self, prefix: str) -> None:
        """Every topic that begins so: the disk is not for keeping them. A reader that knew one would ask for it for
        ever."""
        await self._no_reader()
        found = [name for name in await self._admin.list_topics() if name.startswith(prefix)]
        if found:
            await self._admin.delete_topics(found)
        await self._fresh_reader()

    async def load(self, messages: Iterable[clients.Message], batch: int = 20_000) -> None:
        """Puts messages on their topics, in order, as our producer does."""
        publisher = clients.Publisher(self.settings(""))
        await publisher.start()
        waiting = []
        for message in messages:
            waiting.append(message)
            if len(waiting) == batch:
                await publisher.publish(waiting)
                waiting = []
        await publisher.publish(waiting)
        await publisher.stop()

    async def load_raw(self, prefix: str, records: Iterable[RawRecord]) -> None:
        """The registry's topics with these raw records in them."""
        await clients.prepare(self.settings(prefix))
        name = prefix + topics.RAW.name
        await self.load(clients.Message(name, r.partition, None, r.value, r.timestamp_ms, r.headers()) for r in records)

    async def count(self, names: Collection[str]) -> int:
        """Records in these topics by now."""
        places = [TopicPartition(name, number) for name in names for number in range(topics.PARTITIONS)]
        ends = await self._reader.end_offsets(places)
        return sum(ends.values())

    async def committed(self, group: str, name: str) -> dict[TopicPartition, int]:
        offsets = await self._admin.list_consumer_group_offsets(group)
        return {place: found.offset for place, found in offsets.items() if place.topic == name}

    async def values(self, name: str) -> AsyncIterator[bytes]:
        """Every value of a topic as it stands."""
        partitions = [TopicPartition(name, number) for number in range(topics.PARTITIONS)]
        ends = await self._reader.end_offsets(partitions)
        self._reader.assign(partitions)
        await self._reader.seek_to_beginning(*partitions)
        left = {place for place, end in ends.items() if end}
        while left:
            for place, records in (await self._reader.getmany(timeout_ms=500)).items():
                for record in records:
                    if record.offset < ends[place] and record.value is not None:
                        yield record.value
            for place in list(left):
                if await self._reader.position(place) >= ends[place]:
                    left.discard(place)


async def until(holds: Callable[[], Any], timeout_s: float, step_s: float = 0.02) -> bool:
    """Whether it came true in time; it may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(step_s)


async def pauses(child: Watched) -> None:
    """SIGSTOP, a while, and on again; three times."""
    for _ in range(PAUSES):
        child.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSE_S)
        finally:
            child.signal(signal.SIGCONT)
        await asyncio.sleep(0.4)


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """This process keeps off the other core meanwhile."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[-1 if core else 0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
