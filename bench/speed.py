"""One-minute bars on one core: our worker beside its peers, on the same tape, the same broker and the same core.

The clock of a peer runs from the first event that its own code is handed to the last; ours from the first record the
worker took (the birth of a counter in its /metrics) until the last record it has to publish stands in its topic.
"""

import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.stand import Stand, Used, Watched, pauses, said, until
from bench.tape import Sums, Tape, arrays, by_crc32
from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from producers.slicer import SlicerSettings
from schemas import topics
from schemas.events import NS_PER_MS, Bar, decode_bar
from schemas.partition import partition_of
from schemas.raw import RawRecord
from tapedeck import kafka as clients
from tapedeck.embedded import EmbeddedError, ensure_jars
from tapedeck.embedded import jars as embedded_jars
from tapedeck.embedded.jars import Jar, cache_dir
from tapedeck.embedded.ports import free_ports

HERE = Path(__file__).parent
PEERS = HERE / "peers"
ALL_OUTPUTS = [t.name for t in topics.ALL if t.values and t not in (topics.RAW, topics.RAW_REST)]
BARS_ONLY = [topics.BARS_1M.name]
ARRAY = 50
CRC32 = "arrays, by crc32"  # pairs lie where most clients not in Java put them
SETTLE_S = 3.0
SINGLE = SlicerSettings(max_events=1)

FIELDS = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v", "vwap": "vw", "trade_count": "n"}

Bars = dict[tuple[str, int], Sums]


class Input(NamedTuple):
    """A tape as our producer logs it. `expected`: what the pipeline makes of it, by topic; `cpu_s`: what that took
    without Kafka."""

    events: int
    records: list[RawRecord]
    bars: Bars
    expected: Counter[str]
    cpu_s: float

    @property
    def per_slice(self) -> float:
        return self.events / sum(record.kind == "slice" for record in self.records)


class Run(NamedTuple):
    """A run of a program. Rates in events/s, None where it never came to the end: `rate` and `warm` (second half) by
    the wall clock, `cpu_rate` and `cpu_warm` per second of CPU, the same when the core is its alone."""

    rate: float | None
    warm: float | None
    cpu_rate: float | None
    cpu_warm: float | None
    used: Used
    right: int
    wanted: int
    note: str = ""


def work_folder() -> Path:
    """Where inputs and the peers' environments are kept from one call to the next."""
    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def input_of(tape: Tape, slicer: SlicerSettings, rate: int = 100_000) -> Input:
    records = list(tape.records(slicer, rate))
    pipelines = [Pipeline(number, PipelineSettings()) for number in range(topics.PARTITIONS)]
    expected: Counter[str] = Counter()
    began = time.process_time()
    for record in records:
        for output in pipelines[record.partition].process(record):
            expected[output.topic] += 1
    return Input(tape.total, records, dict(tape.bars), expected, time.process_time() - began)


def right_of(bars: Bars, found: Iterable[bytes]) -> int:
    """How many of our bars are, to the last digit, what plain arithmetic says."""
    best: dict[tuple[str, int], Bar] = {}
    for value in found:
        bar = decode_bar(value)
        if not isinstance(bar, Bar):
            continue
        key = (bar.symbol, bar.start // NS_PER_MS)
        if key not in best or (bar.repair, bar.revision) >= (best[key].repair, best[key].revision):
            best[key] = bar
    return sum(
        key in best and all(getattr(best[key], name) == value for name, value in sums.exact().items())
        for key, sums in bars.items()
    )


def right_of_peer(bars: Bars, found: Iterable[bytes]) -> int:
    """The same for peers, who reckon in floats; a window given twice must be right twice."""
    verdicts: dict[tuple[str, int], bool] = {}
    for value in found:
        bar = json.loads(value)
        key = (bar["pair"], int(bar["start"]))
        if key in bars:
            verdicts[key] = verdicts.get(key, True) and _agrees(bars[key], bar)
    return sum(verdicts.values())


def _agrees(sums: Sums, bar: dict[str, float]) -> bool:
    exact = sums.exact()
    return all(math.isclose(exact[ours], bar[theirs], rel_tol=1e-9) for ours, theirs in FIELDS.items())


# -- ours ----------------------------------------------------------------------------------------------


class Worker:
    """`tapedeck process` on the second core."""

    def __init__(self, stand: Stand, prefix: str, folder: Path, **others: object) -> None:
        (self.port,) = free_ports(1)
        env = {
            "KAFKA_BOOTSTRAP_SERVERS": stand.address,
            "TOPIC_PREFIX": prefix,
            "HTTP_PORT": str(self.port),
            "LOG_FORMAT": "json",
            **{name.upper(): str(value) for name, value in others.items()},
        }
        command = [sys.executable, "-m", "tapedeck", "process"]
        self.child = Watched(command, 1, folder / f"{prefix}log", env, folder)

    def alive(self) -> None:
        if self.child.popen.poll() is not None:
            raise SystemExit(f"the worker ended:\n{said(self.child)}")

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def health(self) -> str:
        """Raises OSError while it has no ear yet, or is not well."""
        return self._get("health")

    def metrics(self) -> dict[str, float]:
        lines = self._get("metrics").splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def began(self) -> float:
        """When it took its first record."""
        return self.metrics()['tapedeck_processor_records_created{verdict="take"}']


async def ours(
    stand: Stand, folder: Path, prefix: str, tape: Input, outputs: list[str] | None = None, paused: bool = False
) -> Run:
    """`outputs`: the topics it is told to publish; None: every one."""
    await stand.load_raw(prefix, tape.records)
    others = {"outputs": ",".join(outputs)} if outputs else {}
    filled = outputs or list(tape.expected)  # of the rollups, made from the bars, only the cost is counted
    names, total = [prefix + name for name in filled], sum(tape.expected[name] for name in filled)
    worker = Worker(stand, prefix, folder, **others)
    pausing: asyncio.Task[None] | None = None
    half = last = None
    deadline = time.monotonic() + 300
    while last is None and time.monotonic() < deadline:
        worker.alive()
        count, now = await stand.count(names), time.time()
        if count and paused and pausing is None:
            pausing = asyncio.create_task(pauses(worker.child))
        if half is None and count >= total / 2:
            half = (now, count)
        if count >= total:
            last = now
        await asyncio.sleep(0.01)
    if pausing:
        await pausing
    began = await asyncio.to_thread(worker.began)
    used = worker.child.end()
    right = right_of(tape.bars, [value async for value in stand.values(prefix + topics.BARS_1M.name)])
    note = ""
    if outputs and await stand.count([prefix + topics.TRADES.name]):
        note = "published everything"
    await stand.drop(prefix)
    if last is None or half is None:
        return Run(None, None, None, None, used, right, len(tape.bars), "not done in 300 s")
    warm = tape.events * (total - half[1]) / total / (last - half[0])
    cpu_rate = tape.events / used.between(began, last)
    cpu_warm = tape.events * (total - half[1]) / total / max(0.01, used.between(half[0], last))
    return Run(tape.events / (last - began), warm, cpu_rate, cpu_warm, used, right, len(tape.bars), note)


# -- peers ---------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """`command` makes it ready and says how to start it; raises CannotBeHad."""

    name: str
    command: Callable[[], list[str]]
    shapes: tuple[str, ...] = ("single", "arrays")
    slow: bool = False  # a fifth of the tape is enough


class CannotBeHad(Exception):
    """A peer that cannot be installed here, and why."""


def environment(name: str | None) -> Path:
    """The interpreter of a peer's own environment, made on first use from its lock. Raises CannotBeHad."""
    if name is None:
        return Path(sys.executable)
    lock = PEERS / f"{name}.txt"
    folder = work_folder() / "venvs" / name
    done, python = folder / "installed", folder / "bin" / "python"
    if done.exists() and done.read_bytes() == lock.read_bytes():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(lock)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or [result.stderr.strip()]
            raise CannotBeHad(re.sub(r"https?://\S+", "…", lines[-1])[:100])
    done.write_bytes(lock.read_bytes())
    return python


def jars(*artifacts: str) -> list[Path]:
    """Those of the peers' lock, fetched on first use. Raises CannotBeHad."""
    lines = (line for line in (PEERS / "jars.lock").read_text().splitlines() if not line.startswith("#"))
    wanted = [jar for line in lines if (jar := Jar(*line.replace(":", " ").split())).artifact in artifacts]
    try:
        with ThreadPoolExecutor() as pool:
            if missing := [jar for jar in wanted if not jar.path.exists()]:
                embedded_jars._download_all(missing, lambda done, total: None, pool)
            for jar in wanted:
                embedded_jars._check(jar, jar.path)
    except EmbeddedError as error:
        raise CannotBeHad(str(error)[:100]) from error
    return [jar.path for jar in wanted]


def kafka_streams() -> list[str]:
    """Compiled with the machine's own JDK: the runtime that the broker has brings no compiler."""
    compiler, java = shutil.which("javac"), shutil.which("java")
    if not compiler or not java:
        raise CannotBeHad("there is no JDK (javac) on this machine")
    path = ":".join(map(str, [*jars("kafka-streams", "rocksdbjni"), *ensure_jars()]))
    classes = work_folder() / "classes"
    done = subprocess.run(
        [compiler, "-d", str(classes), "-cp", path, str(PEERS / "Bars.java")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBeHad(f"javac: {done.stderr[-100:]}")
    return [java, "-Xmx1g", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", f"{classes}:{path}", "Bars"]


def flink() -> list[str]:
    if not shutil.which("java"):
        raise CannotBeHad("there is no Java on this machine")
    (connector,) = jars("flink-sql-connector-kafka")
    return [str(environment("flink")), "flink_sql.py", str(connector), str(free_ports(1)[0])]


def python(venv: str | None, *program: str) -> Callable[[], list[str]]:
    return lambda: [str(environment(venv)), *program]


PEERS_ALL = (
    Peer("bare loop", python(None, "bare.py"), ("single", "arrays", "slices")),
    Peer("Quix Streams", python("quix", "quix.py"), ("single", "arrays", CRC32)),
    Peer("Bytewax", python("bytewax", "-m", "bytewax.run", "bytewax_bars:flow")),
    Peer(
        "Faust, windowed Table",
        python(None, "faust_table.py", "worker", "-l", "warn", "--without-web"),
        ("single",),
        slow=True,
    ),
    Peer("Kafka Streams", kafka_streams, ("single", "arrays", CRC32)),
    Peer("Flink SQL", flink, ("single",)),
)


async def load_peers(stand: Stand, tape: Tape, names: dict[str, str]) -> None:
    """The tape as single events and as arrays, on topics of these names."""
    await stand.make(*names.values())
    for shape, name in names.items():
        single = shape == "single"
        await stand.load(
            clients.Message(name, partition, event.pair.encode() if single else None, value, event.t_ms, [])
            for partition, event, value in arrays(
                tape.events(), 1 if single else ARRAY, by_crc32 if shape == CRC32 else partition_of
            )
        )


async def peer(
    stand: Stand,
    folder: Path,
    command: list[str],
    run: str,
    source: str,
    shape: str,
    events: int,
    bars: Bars,
    paused: bool = False,
    limit_s: float = 300,
    env: dict[str, str] | None = None,
) -> Run:
    sink, result, state = f"{run}.bars", folder / f"{run}.json", folder / f"{run}.state"
    await stand.make(sink)
    state.mkdir()
    variables = {
        "BENCH_BROKER": stand.address,
        "BENCH_SOURCE": source,
        "BENCH_SINK": sink,
        "BENCH_GROUP": run,
        "BENCH_STATE": str(state),
        "BENCH_RESULT": str(result),
        "BENCH_EVENTS": str(events),
        "BENCH_SHAPE": shape.split(",")[0],
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    child = Watched(command, 1, folder / f"{run}.log", variables | (env or {}), PEERS)

    def times() -> dict[str, float]:
        try:
            found: dict[str, float] = json.loads(result.read_text())
        except (OSError, ValueError):
            return {}
        return found

    def over() -> bool:
        return "last" in times() or child.popen.poll() is not None

    if paused and await until(times, 60):
        await pauses(child)
    await until(over, limit_s, 0.1)
    count, since = -1, time.monotonic()
    while time.monotonic() < since + SETTLE_S:  # windows may yet close
        now = await stand.count([sink])
        if now != count:
            count, since = now, time.monotonic()
        await asyncio.sleep(0.2)
    found, note = times(), ""
    if "last" not in found:
        note = f"not done in {limit_s:g} s" if child.popen.poll() is None else f"it ended: {said(child)[-200:]}"
    used = child.end()
    right = right_of_peer(bars, [value async for value in stand.values(sink)])
    await stand.drop(run)
    shutil.rmtree(state, ignore_errors=True)
    if note:
        return Run(None, None, None, None, used, right, len(bars), note)
    rate, warm = events / (found["last"] - found["first"]), events / 2 / (found["last"] - found["half"])
    cpu_rate = events / max(0.01, used.between(found["first"], found["last"]))
    cpu_warm = events / 2 / max(0.01, used.between(found["half"], found["last"]))
    return Run(rate, warm, cpu_rate, cpu_warm, used, right, len(bars))
