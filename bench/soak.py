"""Minutes of random faults, kills of broker and producer among them, against a real producer and a real Kafka.

It holds when every event of the feed's own record is in the raw log at most as often as it was sent and in
the order it was sent, each absent one lies in a gap that names its stream, the gaps exceed what was missed by
at most 2 s for each fault, no process died but by our hand, and the producer's memory stays flat. The same
seed gives the same faults at the same times.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.market import write_frames
from bench.mayhem import TAIL_S, Planned, outage, schedule
from bench.scoring import Score, Span, marked_and_missed, raw_log, score
from schemas.events import NS_PER_S
from tapedeck.demo.children import Child, Spec
from tapedeck.embedded import free_ports, prepare_kafka
from tapedeck.settings import Settings

EXCESS_S = 2.0  # for each fault
STARTED_S = 60.0
SETTLED_S = 100.0  # the longest rest after lost connections, an eviction and a dead broker
GROWTH_MB = 20.0  # from the first half of a producer's life to the second: catching up with an outage takes 14, once
WARM_S = 8.0  # of a life, before its memory counts


class Blow(NamedTuple):
    """A fault that was done: what was planned, and the market's time when it was."""

    planned: Planned
    clock_ns: int


class Sample(NamedTuple):
    """The producer's memory: seconds into the run, which of its lives, MB."""

    at_s: float
    life: int
    rss_mb: float


class Soak:
    """One run, in a folder of its own."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self.record = folder / "sent.ndjson"
        self.blows: list[Blow] = []
        self.samples: list[Sample] = []
        self.complaints: list[str] = []
        self.seconds = 0.0
        self._began = 0.0
        self._kills = 0
        self._mending: set[asyncio.Task[None]] = set()
        self._booting = asyncio.Lock()
        self._clock_ns = 0
        self._clients = 0
        self.settings = Settings(_env_file=None, topic_prefix="soak.")
        self._broker: Child
        self._feed: Child
        self._producer: Child

    async def run(self, plan: list[Planned], progress: Progress) -> Score:
        task = progress.add_task("starting", total=self._options.seconds)
        async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
            self._http = http
            stack.push_async_callback(self._end)
            await self._start()
            sampling = asyncio.create_task(self._sample(progress, task))
            stack.callback(sampling.cancel)
            for planned in plan:
                await asyncio.sleep(self._began + planned.at_s - time.monotonic())
                progress.update(task, description=str(planned))
                await self._strike(planned)
            await asyncio.sleep(self._began + self._options.seconds - time.monotonic())
            progress.update(task, description="settling")
            await asyncio.gather(*self._mending)
            await self._settled()
            self.seconds = time.monotonic() - self._began
            await self._stop()
            progress.update(task, description="reading the log")
            log = await raw_log(self.settings)
            progress.update(task, description="scoring")
            return await asyncio.to_thread(score, self.record, log)

    # -- the processes -----------------------------------------------------------------------------

    async def _start(self) -> None:
        await self._start_broker()
        port, self._control, self._health = free_ports(3)
        command = ["simulate", "--port", str(port), "--rest-port", str(self._control), "--rest-hours", "0"]
        command += ["--record", str(self.record), "--speed", "1"]
        if self._options.pairs:
            command += ["--pairs", str(self._options.pairs), "--seed", str(self._options.seed)]
        else:
            frames = self._folder / "frames.ndjson"
            seconds = self._options.seconds + SETTLED_S
            # Of today: for records older than a day a broker that was killed no longer knows what it has of a producer.
            today_ms = int(time.time() * 1000)
            await asyncio.to_thread(write_frames, frames, self._options.rate, seconds, 4, today_ms)
            command += ["--frames", str(frames)]
        self._feed = self._child("simulate", *command)
        await self._feed.start()
        async with asyncio.timeout(STARTED_S):
            while not await self._look():
                await asyncio.sleep(0.1)
        self._producer = self._child(
            "produce",
            "produce",
            POLYGON_WS_URL=f"ws://127.0.0.1:{port}/crypto",
            POLYGON_API_KEY="soak",
            SYMBOLS="*",
            FEED_USUAL_S=str(self._options.usual),
            HTTP_PORT=str(self._health),
        )
        await self._producer.start()
        async with asyncio.timeout(STARTED_S):
            while not (await self._look() and self._clients):
                await asyncio.sleep(0.05)
        self._began = time.monotonic()

    async def _start_broker(self) -> None:
        service = await asyncio.to_thread(prepare_kafka, self._folder)
        (address,) = service.addresses.values()
        self.settings = self.settings.model_copy(update={"kafka_bootstrap_servers": address})
        spec = Spec(service.argv, service.log, service.stop_signal, service.options)
        self._broker = Child("kafka", lambda: spec, service.probe)
        await self._broker.start()
        await self._broker.wait_ready(STARTED_S)

    def _child(self, name: str, *arguments: str, **environment: str) -> Child:
        shared = {
            "KAFKA_BOOTSTRAP_SERVERS": self.settings.kafka_bootstrap_servers,
            "TOPIC_PREFIX": self.settings.topic_prefix,
            "JOURNAL_DIR": str(self._folder / "journal"),
            "LOG_FORMAT": "json",
        }
        options = {"env": os.environ | shared | environment, "cwd": self._folder}
        spec = Spec(
            (sys.executable, "-m", "tapedeck", *arguments), self._folder / f"{name}.log", signal.SIGTERM, options
        )
        return Child(name, lambda: spec)

    async def _settled(self) -> None:
        """The producer is well for as long as the last fault may need to show."""
        async with asyncio.timeout(SETTLED_S):
            since = time.monotonic()
            while time.monotonic() - since < TAIL_S / 2:
                await asyncio.sleep(0.1)
                if not (await self._look() and self._clients and await self._well()):
                    since = time.monotonic()

    async def _stop(self) -> None:
        """The producer first, so that nothing it was sent is left out of the score."""
        died = self._producer.restarts - self._kills
        if died:
            self.complaints.append(f"the producer ended by itself {died} times")
        began = time.monotonic()
        await self._producer.stop(10)
        if time.monotonic() - began > 5:
            self.complaints.append(f"the producer took {time.monotonic() - began:.1f} s to stop")
        if left := list((self._folder / "journal").rglob("*.segment")):
            self.complaints.append(f"the journal still holds something: {left}")
        if self._feed.restarts:
            self.complaints.append("the simulator died")
        await self._feed.stop(5)

    async def _end(self) -> None:
        for task in self._mending:
            task.cancel()
        await asyncio.gather(*self._mending, return_exceptions=True)
        for name in ("_producer", "_feed", "_broker"):
            if hasattr(self, name):
                getattr(self, name).kill()

    # -- what is done to them ----------------------------------------------------------------------

    async def _strike(self, planned: Planned) -> None:
        await self._look()
        self.blows.append(Blow(planned, self._clock_ns))
        seconds = planned.parameters.get("seconds", 0)
        match planned.kind:
            case "kill-producer":
                self._kill(self._producer)
                self._kills += 1
            case "kill-broker":
                self._mend(self._broker_away(seconds))
            case "freeze":
                self._mend(self._frozen(seconds))
            case kind:
                async with self._http.post(self._url, json={"kind": kind, **planned.parameters}) as answer:
                    if answer.status != 201:
                        raise RuntimeError(f"{planned}: {await answer.text()}")

    def _mend(self, mending: Any) -> None:
        task = asyncio.create_task(mending)
        self._mending.add(task)

    @staticmethod
    def _kill(child: Child) -> None:
        if child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)

    async def _broker_away(self, seconds: float) -> None:
        async with self._booting:  # an earlier outage may take longer than planned
            self._broker.kill()
            await asyncio.sleep(seconds)
            await self._start_broker()

    async def _frozen(self, seconds: float) -> None:
        pid = self._producer.pid
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            os.kill(pid, signal.SIGCONT)

    # -- what is seen of them ----------------------------------------------------------------------

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._control}/control/faults"

    async def _look(self) -> bool:
        """Asks the simulator for the market's time and who listens; whether it answered."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._http.get(self._url, timeout=aiohttp.ClientTimeout(5)) as answer:
                state = await answer.json()
                self._clock_ns, self._clients = state["clock_ns"], state["clients"]
                return True
        return False

    async def _well(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            url = f"http://127.0.0.1:{self._health}/health"
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(1)) as answer:
                return answer.status == 200
        return False

    async def _sample(self, progress: Progress, task: Any) -> None:
        while True:
            at_s = time.monotonic() - self._began
            progress.update(task, completed=min(at_s, self._options.seconds))
            if self._producer.pid is not None:
                with contextlib.suppress(psutil.Error):
                    rss = psutil.Process(self._producer.pid).memory_info().rss / 1e6
                    self.samples.append(Sample(at_s, self._producer.restarts, rss))
            await asyncio.sleep(0.5)


# -- the verdict ---------------------------------------------------------------------------------------


def blame(blows: list[Blow], gaps: dict[Span, tuple[int, int] | None]) -> dict[int, dict[Span, tuple[int, int] | None]]:
    """The gaps of each fault, by its place: a gap is of the latest that had begun a second after it did."""
    found: dict[int, dict[Span, tuple[int, int] | None]] = defaultdict(dict)
    for span, missed in gaps.items():
        begun = [n for n, blow in enumerate(blows) if blow.clock_ns <= span.since + NS_PER_S]
        found[max(begun, default=0)][span] = missed
    return found


def growth_mb(samples: list[Sample]) -> dict[int, float]:
    """By how much the most memory of a life's second half exceeds that of its first, once it is warm."""
    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.life].append(sample)
    grown = {}
    for life, all_of_it in lives.items():
        warm = [one for one in all_of_it if one.at_s - all_of_it[0].at_s >= WARM_S]
        if len(warm) >= 20:
            half = len(warm) // 2
            grown[life] = max(s.rss_mb for s in warm[half:]) - max(s.rss_mb for s in warm[:half])
    return grown


def _faults_table(soak: Soak, found: Score) -> tuple[Table, list[str]]:
    table = Table(title="faults done")
    for name in ("s", "fault", "gaps", "marked s", "missed s", "excess s"):
        table.add_column(name, justify="left" if name in ("fault", "gaps") else "right")
    complaints = []
    blamed = blame(soak.blows, found.missed)
    for number, blow in enumerate(soak.blows):
        gaps = blamed.get(number, {})
        marked, missed = marked_and_missed(gaps)
        reasons = ", ".join(sorted({f"{span.reason} {'+'.join(sorted(span.streams))}" for span in gaps}))
        figures = [f"{marked:.2f}", f"{missed:.2f}", f"{marked - missed:.2f}"] if gaps else ["", "", ""]
        table.add_row(f"{blow.planned.at_s:.1f}", str(blow.planned), reasons, *figures)
        if marked - missed > EXCESS_S:
            complaints.append(f"the gaps of «{blow.planned}» exceed what was missed by {marked - missed:.1f} s")
    return table, complaints


def _totals_table(soak: Soak, found: Score) -> Table:
    table = Table(title="the feed's record against the raw log")
    for name in ("what", "figure"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, figure in (
        ("sent", f"{found.sent:,}"),
        ("logged", f"{found.logged:,}"),
        ("in gaps", f"{found.in_gaps:,}"),
        ("lost (0)", f"{found.lost:,}"),
        ("repeated (0)", f"{found.repeated:,}"),
        ("out of order (0)", f"{found.disorder:,}"),
        ("marked, s", f"{found.marked_s:.2f}"),
        ("missed, s", f"{found.missed_s:.2f}"),
        ("excess for each fault, s (2)", f"{found.excess_s / max(1, len(soak.blows)):.2f}"),
        ("events/s logged", f"{found.logged / soak.seconds:,.0f}"),
        ("seconds", f"{soak.seconds:.0f}"),
    ):
        table.add_row(name, figure)
    return table


def _memory_table(samples: list[Sample], grown: dict[int, float]) -> Table:
    table = Table(title="the producer's resident memory, MB (min - max in each minute of each life)")
    for name in ("life", "minute", "MB", "second half over first"):
        table.add_column(name, justify="right")
    minutes: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        minutes[sample.life, int(sample.at_s // 60) + 1].append(sample.rss_mb)
    said: set[int] = set()
    for (life, minute), values in minutes.items():
        growth = f"{grown[life]:+.1f}" if life in grown and life not in said else ""
        said.add(life)
        table.add_row(str(life + 1), str(minute), f"{min(values):.1f} - {max(values):.1f}", growth)
    return table


def _judge(soak: Soak, found: Score, grown: dict[int, float]) -> list[str]:
    complaints = list(soak.complaints)
    for number, what in ((found.lost, "lost"), (found.repeated, "repeated"), (found.disorder, "out of order")):
        if number:
            complaints.append(f"{number:,} events are {what}")
    complaints += found.examples
    if found.excess_s > EXCESS_S * len(soak.blows):
        complaints.append(f"the gaps exceed what was missed by {found.excess_s:.1f} s")
    if not found.logged:
        complaints.append("nothing was logged")
    complaints += [f"life {life + 1} grew by {mb:.1f} MB" for life, mb in grown.items() if mb > GROWTH_MB]
    return complaints


@contextlib.asynccontextmanager
async def _folder(keep: Path | None) -> AsyncIterator[Path]:
    folder = keep or Path(tempfile.mkdtemp(prefix="tapedeck-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if keep is None:
        shutil.rmtree(folder)


async def soak(options: argparse.Namespace, console: Console) -> int:
    """The exit code: 0 only if it holds. The folder with all logs is kept when it does not."""
    if options.outage:
        options.seconds = options.outage + 60
    plan = outage(options.outage) if options.outage else schedule(options.seed, options.faults, options.seconds)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
    async with _folder(options.keep) as folder:
        run = Soak(folder, options)
        try:
            with Progress(*columns, console=console, transient=True) as progress:
                found = await run.run(plan, progress)
        except BaseException:
            console.print(f"Everything of this run is kept in {folder}")
            raise
        faults, complaints = _faults_table(run, found)
        grown = growth_mb(run.samples)
        lines = (f"{one.at_s:.1f},{one.life},{one.rss_mb:.1f}\n" for one in run.samples)
        (folder / "memory.csv").write_text("".join(lines))
        complaints = _judge(run, found, grown) + complaints
        for table in (faults, _memory_table(run.samples, grown), _totals_table(run, found)):
            console.print(table)
        if not complaints:
            console.print("[green]It holds.")
            return 0
        console.print("[red]It does not hold:", *complaints, sep="\n")
        if options.keep is None:
            kept = folder.with_name(f"{folder.name}-kept")
            shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("frames.ndjson"))
            console.print(f"Everything of this run is kept in {kept}")
        return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--rate", type=int, default=2_000, help="events/s of the feed")
    parser.add_argument("--pairs", type=int, help="the simulator's own market of so many pairs, at its own rate")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--outage", type=float, help="instead of random faults Kafka is away for so many seconds")
    parser.add_argument("--usual", type=float, default=1, help="FEED_USUAL_S of the producer")
    parser.add_argument("--keep", type=Path, help="a folder for everything of this run, which stays")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    sys.exit(asyncio.run(soak(parser.parse_args(), console)))


if __name__ == "__main__":
    main()
