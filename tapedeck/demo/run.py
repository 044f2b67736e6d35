"""The demo: starts the line in order, shows it, stops it in order, and reconciles."""

import asyncio
import contextlib
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import fasteners
import orjson
import structlog
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.live import Live

from schemas import topics, wire
from schemas.events import NS_PER_S, still_open
from schemas.frames import read_frames
from schemas.raw import bytes_of
from tapedeck import embedded, kafka, logs
from tapedeck.demo import view
from tapedeck.demo.children import Child, Spec
from tapedeck.demo.reconcile import STREAMS, Reconciler, Report, Tables
from tapedeck.demo.watch import Watch, healthy, scrape
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings

log = structlog.get_logger()

SINKS = ("trades", "quotes", "bars", "audit")
START_S = 120.0
PATIENT_DRAIN_S = 300.0  # a run that ends by itself waits for what is on its way
QUIET_S = 3.0
HASTY_DRAIN_S = 2.5  # Ctrl+C does not: all of it has 5 s


class DemoOptions(NamedTuple):
    """As on the command line."""

    seconds: float | None
    symbols: list[str] | None
    frames: Path | None
    speed: float
    seed: int
    data_dir: Path | None
    live: bool
    as_json: bool


def run(settings: Settings, options: DemoOptions) -> int:
    """Returns the exit code: 0 only if everything is accounted for. Raises TapedeckError, UsageError."""
    logs.configure(settings.model_copy(update={"log_level": "WARNING"}), "demo")
    if options.live:
        settings.need_key("--live")
    if options.live and options.frames:
        raise UsageError("give either --live or --frames")
    folder = options.data_dir or Path(tempfile.mkdtemp(prefix="tapedeck-demo-"))
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = fasteners.InterProcessLock(str(folder / "demo.lock"))
    if not lock.acquire(blocking=False):
        raise UsageError(f"another demo runs on {folder}; give this one another --data-dir")
    try:
        result = asyncio.run(Demo(settings, options, folder).run())
    except TapedeckError as error:
        if options.as_json:
            print(orjson.dumps(_result(None, [str(error)], None, None)).decode(), flush=True)
        raise
    finally:
        lock.release()
    if options.data_dir is None:
        if result == 0:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            Console(stderr=True).print(f"The data and logs of this run are kept in {folder}")
    return result


class Demo:
    """One run on one folder."""

    def __init__(self, settings: Settings, options: DemoOptions, folder: Path) -> None:
        self._options = options
        self._settings = settings
        self._folder = folder
        self._console = Console(stderr=options.as_json)
        self._stopping = asyncio.Event()
        self._hasty = False
        self._http: dict[str, int] = {}
        self._children: dict[str, Child] = {}
        self._started = time.time()
        self._line_s: float | None = None
        self._processes: dict[str, dict[str, float]] = {}
        self._record = folder / ("received.ndjson" if options.live else "sent.ndjson")

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        try:
            async with aiohttp.ClientSession() as http:
                with self._console.status("starting Kafka, PostgreSQL and the line …"):
                    await self._start_services()
                    tasks = await self._start_readers(http)
                    watch = Watch(self._settings)
                    watching = asyncio.create_task(watch.run())
                    tasks += await self._start_feed()
                await self._show(watch, http, [*tasks, watching])
            report, complaints = await self._finish(watch)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        finally:
            await self._stop_everything()
        return self._verdict(watch, report, complaints)

    def _interrupt(self) -> None:
        if self._stopping.is_set() and self._hasty:
            for child in self._children.values():
                child.kill()
            os._exit(130)
        self._hasty = True
        self._stopping.set()

    # -- starting ----------------------------------------------------------------------------------

    async def _start_services(self) -> None:
        addresses: dict[str, str] = {}

        def prepared(prepare: Callable[[Path], embedded.Service]) -> Spec:
            service = prepare(self._folder)
            addresses.update(service.addresses)
            self._probes[service.name] = service.probe
            return Spec(service.argv, service.log, service.stop_signal, service.options)

        self._probes: dict[str, Callable[[], bool]] = {}
        embedded.stop(self._folder)  # what a killed demo may have left behind
        for name, prepare in (("kafka", embedded.prepare_kafka), ("postgres", embedded.prepare_postgres)):
            child = Child(name, partial(prepared, prepare), lambda name=name: self._probes[name]())  # type: ignore[misc]
            self._children[name] = child
            await child.start()
        self._settings = self._settings.model_copy(
            update={
                "kafka_bootstrap_servers": addresses["KAFKA_BOOTSTRAP_SERVERS"],
                "database_url": type(self._settings.database_url)(addresses["DATABASE_URL"]),
            }
        )

    async def _start_readers(self, http: aiohttp.ClientSession) -> list[asyncio.Task[None]]:
        """Worker and sinks, which wait for Kafka and PostgreSQL themselves; returns when all are well."""
        names = ["process", *(f"sink {name}" for name in SINKS)]
        ports = embedded.free_ports(len(names))
        tasks = []
        for name, port in zip(names, ports, strict=True):
            self._http[name] = port
            tasks.append(await self._start(name, name.split()))
        for name in ("kafka", "postgres"):
            await self._children[name].wait_ready(START_S)
        await kafka.prepare(self._settings)
        deadline = time.monotonic() + START_S
        while not all(await asyncio.gather(*(healthy(http, port) for port in ports))):
            for task in tasks:
                if task.done():
                    task.result()
            if self._stopping.is_set() or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        return tasks

    async def _start_feed(self) -> list[asyncio.Task[None]]:
        """The feed and the producer: nothing is sent before there is somebody to take it."""
        options = self._options
        if options.live:
            self._http = {"produce": embedded.free_ports(1)[0]} | self._http
            symbols = ",".join(self._settings.symbols)
            return [await self._start("produce", ["produce", "--record", str(self._record)], SYMBOLS=symbols)]
        feed_port, rest_port, *ports = embedded.free_ports(4)
        self._http = dict(zip(("feed", "produce"), ports, strict=True)) | self._http
        command = await asyncio.to_thread(self._feed_command, feed_port, rest_port)
        return [
            await self._start("feed", command),
            await self._start(
                "produce",
                ["produce"],
                POLYGON_WS_URL=f"ws://127.0.0.1:{feed_port}/crypto",
                POLYGON_REST_URL=f"http://127.0.0.1:{rest_port}",
                POLYGON_API_KEY=secrets.token_hex(8),
                SYMBOLS=",".join(self._symbols or self._settings.symbols),
                STREAMS=",".join(STREAMS),
            ),
        ]

    async def _start(self, name: str, arguments: list[str], **environment: str) -> asyncio.Task[None]:
        shared = {
            "KAFKA_BOOTSTRAP_SERVERS": self._settings.kafka_bootstrap_servers,
            "DATABASE_URL": self._settings.database_url.get_secret_value(),
            "HTTP_PORT": str(self._http[name]),
            "WORKER_ID": "demo",
            "JOURNAL_DIR": str(self._folder / "journal"),
            "LOG_FORMAT": "console",
        }
        spec = Spec(
            (sys.executable, "-m", "tapedeck", *arguments),
            self._folder / f"{name.replace(' ', '-')}.log",
            signal.SIGTERM,
            {"env": os.environ | shared | environment},
        )
        child = self._children[name] = Child(name, lambda: spec)
        return await child.start()

    _symbols: list[str] | None = None

    def _feed_command(self, port: int, rest_port: int) -> list[str]:
        """The simulator's arguments. Market time goes on after what an earlier run on this folder sent."""
        options = self._options
        speed = "max" if math.isinf(options.speed) else str(options.speed)
        command = ["simulate", "--port", str(port), "--rest-port", str(rest_port), "--record", str(self._record)]
        command += ["--speed", speed, "--seed", str(options.seed)]
        if options.seconds is not None:
            command += ["--seconds", str(options.seconds)]
        if options.frames:
            self._symbols = options.symbols or _symbols_in(options.frames)
            return [*command, "--frames", str(options.frames)]
        self._symbols = options.symbols
        begin = time.time_ns() - 86_400 * NS_PER_S
        if self._record.exists() and (last := _last_clock(self._record)):
            begin = max(begin, last + 60 * NS_PER_S)
        if options.symbols:
            command += ["--symbols", ",".join(options.symbols)]
        return [*command, "--start-ns", str(begin)]

    # -- running -----------------------------------------------------------------------------------

    async def _show(self, watch: Watch, http: aiohttp.ClientSession, tasks: list[asyncio.Task[None]]) -> None:
        """Until stopped, or the feed has sent all it will; raises what a process failed with."""
        deadline = None
        speed = "max" if math.isinf(self._options.speed) else f"{self._options.speed:g}x"
        title = f"tapedeck demo, {'live' if self._options.live else speed}: Ctrl+C stops it in order"
        screen = Live(console=self._console, auto_refresh=False, transient=True)
        terminal = self._console.is_terminal
        said = time.monotonic()
        with screen if terminal else contextlib.nullcontext():
            while not self._stopping.is_set():
                scraped = await asyncio.gather(*(scrape(http, port) for port in self._http.values()))
                numbers = dict(zip(self._http, scraped, strict=True))
                for task in tasks:
                    if task.done():
                        task.result()
                if numbers.get("feed", {}).get("tapedeck_feed_finished"):
                    return
                if self._options.live and self._options.seconds is not None and watch.price:
                    deadline = deadline or time.monotonic() + self._options.seconds
                    if time.monotonic() > deadline:
                        return
                stages = self._stages(numbers)
                if terminal:
                    screen.update(view.live(watch, stages, title), refresh=True)
                elif time.monotonic() - said >= 5:
                    said = time.monotonic()
                    line = (f"{name} {count:,.0f} (lag {lag:,.0f})" for name, count, lag, *_ in stages)
                    self._console.print("  ".join(line), soft_wrap=True)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), 0.5)

    def _stages(self, numbers: dict[str, dict[str, float]]) -> list[tuple[str, float, float, float, int]]:
        """(name, events in, lag, errors, restarts) of each process."""
        produced = numbers.get("produce", {})
        worked = numbers.get("process", {})
        taken = worked.get("tapedeck_processor_records_total", 0)
        published = produced.get("tapedeck_producer_records_total", 0)
        rows = []
        if "feed" in self._http:
            feed = numbers["feed"]
            rows.append(("feed", feed.get("tapedeck_feed_events_total", 0), 0.0, 0.0))
        rows.append(
            (
                "produce",
                produced.get("tapedeck_producer_events_total", 0),
                produced.get("tapedeck_producer_journal_records", 0),
                produced.get("tapedeck_producer_errors_total", 0),
            )
        )
        rows.append(("process", taken, max(0.0, published - taken), worked.get("tapedeck_processor_events_total", 0)))
        for name in SINKS:
            sink = numbers.get(f"sink {name}", {})
            written = sink.get("tapedeck_sink_rows_total", 0)
            rows.append(
                (
                    f"sink {name}",
                    written,
                    sink.get("tapedeck_sink_lag_records", 0),
                    sink.get("tapedeck_sink_errors_total", 0),
                )
            )
        return [(*row, self._children[row[0]].restarts) for row in rows]

    # -- stopping ----------------------------------------------------------------------------------

    async def _finish(self, watch: Watch) -> tuple[Report | None, list[str]]:
        """Stops the line from its source on, each part when it has what was on its way, and reconciles."""
        limit = HASTY_DRAIN_S if self._hasty else PATIENT_DRAIN_S
        children = self._children
        self._processes = {name: child.usage() for name, child in children.items()}
        try:
            async with asyncio.timeout(limit):
                if "feed" in children and not self._hasty:
                    await self._received()
                if "feed" in children:
                    await children["feed"].stop(1.0)
                await children["produce"].stop(4.0)
                await self._processed()
                await asyncio.gather(children["process"].stop(1.0), watch.caught_up(), self._stored())
        except TimeoutError:
            return None, [f"what was on its way was not stored within {limit:g} s: not reconciled"]
        except (KafkaError, asyncpg.PostgresError, OSError) as error:
            return None, [f"not reconciled: {error}"]
        self._line_s = time.time() - watch.first_recv_ns / NS_PER_S if watch.first_recv_ns else None
        with self._console.status("reconciling …"):
            report, _ = await asyncio.gather(self._reconcile(watch), self._stop("postgres"))
        streams = await asyncio.to_thread(_streams_in, self._options.frames) if self._options.frames else STREAMS
        return report, report.complaints(streams)

    async def _received(self) -> None:
        """Waits until the producer has what the feed sent (as many events, or, when it was away for some, no new ones
        for a while) and Kafka has it from there: at an orderly stop it waits for Kafka no longer."""
        async with aiohttp.ClientSession() as http:
            seen, since = -1.0, time.monotonic()
            while True:
                feed, producer = await asyncio.gather(
                    scrape(http, self._http["feed"]), scrape(http, self._http["produce"])
                )
                received = producer.get("tapedeck_producer_events_total", 0)
                if received != seen:
                    seen, since = received, time.monotonic()
                whole = received and received == feed.get("tapedeck_feed_events_total")
                waiting = producer.get("tapedeck_producer_journal_records")
                if (whole or time.monotonic() - since >= QUIET_S) and not waiting:
                    return
                await asyncio.sleep(0.1)

    async def _processed(self) -> None:
        """Waits until the worker has done with the raw topics, and then with what its first stage made of them for
        its second: an orderly stop leaves what is still to be read to the next worker."""
        group = f"{self._settings.topic_prefix}tapedeck-processor"
        admin = AIOKafkaAdminClient(**self._settings.kafka_options())
        await admin.start()
        try:
            for stage in (topics.RAW, topics.BARS_1M):
                ends = await kafka.ends(self._settings, kafka.places_of(self._settings, stage))
                while True:
                    done = await admin.list_consumer_group_offsets(group, partitions=list(ends))
                    if all(done[place].offset >= end for place, end in ends.items() if end):
                        break
                    await asyncio.sleep(0.05)
        finally:
            await admin.close()

    async def _stored(self) -> None:
        outputs = kafka.places_of(self._settings, topics.TRADES, topics.QUOTES, topics.VENDOR_BARS, topics.BARS_1M)
        ends = await kafka.ends(self._settings, outputs)
        connection = await self._connect()
        try:
            while True:
                rows = await connection.fetch("SELECT topic, partition, next_offset FROM sink_offsets")
                done = {TopicPartition(row["topic"], row["partition"]): row["next_offset"] for row in rows}
                if all(done.get(place, 0) >= end for place, end in ends.items()):
                    return
                await asyncio.sleep(0.05)
        finally:
            await connection.close()

    async def _connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(self._settings.database_url.get_secret_value())

    async def _reconcile(self, watch: Watch) -> Report:
        connection = await self._connect()
        try:
            tables = await _fetch(connection)
        finally:
            await connection.close()
        # An orderly stop ends with a gap that ticks: what was final then must be in the tables.
        last = max((gap.to for gap in watch.gaps.values() if gap.reason == "stop"), default=0)
        reconciler = Reconciler(
            tables,
            still_open(watch.gaps.values()),
            (bytes_of(letter.encoding, letter.payload) for letter in watch.dead.values()),
            (bytes_of(event.encoding, event.payload) for event in watch.quarantined.values()),
            last - self._settings.grace_ns,
        )
        if self._record.exists():
            with self._record.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # a killed feed may have torn its last line, and never sent it
                        reconciler.line(line)
        return reconciler.report()

    async def _stop_everything(self) -> None:
        """Whatever still runs, in order; nothing is left behind."""
        await self._stop("kafka", "postgres")
        await self._stop()

    async def _stop(self, *spared: str) -> None:
        children = [child for name, child in self._children.items() if name not in spared]
        await asyncio.gather(*(child.stop(1.0 if self._hasty else 5.0) for child in children))

    def _verdict(self, watch: Watch, report: Report | None, complaints: list[str]) -> int:
        p50, p99 = watch.percentiles_ms()
        if report is not None:
            self._console.print(view.accounting(report))
        latency = "none seen" if p50 is None or p99 is None else f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        self._console.print(f"socket to a consumer of trades.v1: {latency}")
        for complaint in complaints:
            self._console.print(f"NOT OK: {complaint}", markup=False)
        if not complaints:
            self._console.print("OK: every event is accounted for and every final bar is right")
        if self._options.as_json:
            result = _result(report, complaints, p50, p99)
            result["first_bar_s"] = watch.first_bar_s and round(watch.first_bar_s - self._started, 1)
            result["gaps"] = _gaps(watch)
            result["started_at"] = self._started
            result["line_s"] = self._line_s and round(self._line_s, 3)
            result["processes"] = self._processes
            print(orjson.dumps(result).decode(), flush=True)
        return 1 if complaints else 0


def _result(report: Report | None, complaints: list[str], p50: float | None, p99: float | None) -> dict[str, Any]:
    report, whole = report or Report(), report is not None

    def by_stream(counts: Counter[str]) -> dict[str, int]:
        return {stream: counts[stream] for stream in (*STREAMS, *(counts.keys() - set(STREAMS)))}

    return {
        "ok": whole and not complaints,
        "sent": by_stream(report.sent),
        "stored": by_stream(report.stored),
        "duplicates": report.duplicates.total(),
        "quarantined": report.quarantined.total(),
        "deadletters": report.deadletters.total(),
        "in_gaps": report.in_gaps.total(),
        "left_over": report.left_over.total(),
        "extra": report.extra.total(),
        "bars_checked": report.bars_checked,
        "bars_wrong": report.bars_wrong,
        "bars_missing": report.bars_missing,
        "bars_extra": report.bars_extra,
        "p50_ms": None if p50 is None else round(p50, 3),
        "p99_ms": None if p99 is None else round(p99, 3),
        "complaints": complaints,
    }


def _gaps(watch: Watch) -> list[dict[str, Any]]:
    """The marked gaps, each once though every partition has it: in ns, the widest of them."""
    found: dict[tuple[int, str, int], dict[str, Any]] = {}
    for gap in still_open(watch.gaps.values()):
        if gap.from_ is not None:
            one = found.setdefault(
                (gap.epoch, gap.reason, gap.to),
                {"reason": gap.reason, "from": gap.from_, "to": gap.to},
            )
            one["from"] = min(one["from"], gap.from_)
    return sorted(found.values(), key=lambda gap: gap["to"])


async def _fetch(connection: asyncpg.Connection) -> Tables:
    """The tables as the reconciler wants them."""
    trades = await connection.fetch(
        "SELECT symbol, exchange, trade_id, ts_event, price, size, side, 'too_late' = ANY(flags) FROM crypto_trades"
    )
    quotes = await connection.fetch(
        "SELECT symbol, ts_event, bid_price, bid_size, ask_price, ask_size, exchange FROM crypto_quotes"
    )
    vendor = await connection.fetch(
        "SELECT symbol, start, open, high, low, close, volume, vwap FROM vendor_bars WHERE interval = '1m'"
    )
    bars = await connection.fetch(
        "SELECT symbol, start, open, high, low, close, volume, vwap, trade_count, buy_volume, sell_volume "
        "FROM crypto_aggregates WHERE interval = '1m'"
    )
    return Tables(
        {tuple(row)[:4]: tuple(row)[4:] for row in trades},
        Counter(map(tuple, quotes)),
        Counter(map(tuple, vendor)),
        {tuple(row)[:2]: tuple(row)[2:] for row in bars},
    )


def _heads(frames: Path) -> "list[wire.Head]":
    heads = []
    for frame in read_frames(frames):
        with contextlib.suppress(*wire.DECODE_ERRORS):
            heads += wire.decode_heads(frame.data)
    return heads


def _symbols_in(frames: Path) -> list[str]:
    """The pairs of a frames file, as their events name them."""
    pairs = {head.pair for head in _heads(frames) if head.ev in wire.STREAMS}
    symbols = set()
    for pair in pairs:
        with contextlib.suppress(ValueError):
            symbols.add(wire.symbol_of(pair))
    if not symbols:
        raise UsageError(f"{frames} has no event of a pair in it")
    return sorted(symbols)


def _streams_in(frames: Path) -> tuple[str, ...]:
    """The streams of a frames file: a recording without quotes is not asked for quotes."""
    found = {head.ev for head in _heads(frames)}
    return tuple(stream for stream in STREAMS if stream in found)


def _last_clock(record: Path) -> int | None:
    """Market time at the end of a feed's record, ns."""
    with record.open("rb") as file:
        file.seek(max(0, record.stat().st_size - 1024**2))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                return int(orjson.loads(line)["clock_ns"])
    return None
