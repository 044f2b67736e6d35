"""The processor process: a thin Faust app that moves bytes through the pipeline.

Faust brings the group, the assignment and the offsets. State is the pipeline's, in memory; a delivered
record that is not the next one triggers a rebuild, so nothing rests on rebalance callbacks. A record is
acknowledged, in order, after the broker took everything made from it; any unexpected error ends the process.
"""

import asyncio
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, cast

import faust
import faust.streams
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from faust.types import TP

from processors import stages
from processors.pipeline import Output
from processors.rebuild import rebuild
from processors.settings import chosen
from processors.stages import RAW, Machine, Stage
from processors.transport import PromptTransport
from schemas import topics
from schemas.events import NS_PER_S
from tapedeck import kafka, metrics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()

PENDING_OUTPUTS = 20_000  # outputs not yet acknowledged, past which reading waits
LINGER_S = 0.004  # rounds of a few records cost as much as rounds of a thousand
FETCH_BYTES = 256 * 1024  # of a partition at a time, packed; a larger record comes alone. All of it is unpacked at once
WAITING_RECORDS = 1_000  # records of a partition that is being rebuilt, past which it is not read on
STALLED_S = 60.0
WAITING_MS = 5_000  # for a record that waits; where there is one it comes at once

Batches = defaultdict[int, defaultdict[str, list[Output]]]
"""By partition and topic."""


class Piece(NamedTuple):
    """A record as aiokafka has it; `event` is Faust's for its whole bundle, with the last of them."""

    record: Any
    event: Any


class Partition:
    """A partition of a stage's topic: its state, the next offset, and what waits while it is rebuilt."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.machine: Machine | None = None
        self.next_offset = -1  # of the machine
        self.expected = -1  # of the delivery, which runs ahead while the machine is rebuilt
        self.waiting: deque[Piece] = deque()
        self.rebuilding: asyncio.Task[None] | None = None


class Processor:
    """Takes Faust events in, keeps outputs and acknowledgements in order."""

    def __init__(self, shell: Shell, app: faust.App) -> None:
        self._shell = shell
        self._app = app
        self._settings = shell.settings
        self._pipeline = chosen(self._settings)
        self._left_out = {topic.name for topic in topics.ALL if not self._pipeline.fills(topic)}
        self._publisher = kafka.Publisher(self._settings)
        self._partitions: dict[tuple[str, int], Partition] = {}
        self._outputs, self._vouching = no_batches(), no_batches()
        self._pending = 0
        self._events: list[Any] = []
        self._filled = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._moved_at = time.monotonic()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def _held(self) -> set[TP]:
        """The partitions that are not read on for now (transport.py)."""
        held: set[TP] = cast(Any, self._app.consumer).held
        return held

    def fail(self, error: BaseException) -> None:
        """Ends the process: an exception that merely left the agent would be committed past."""
        if not self.failed.done():
            self.failed.set_exception(error)

    async def start(self) -> None:
        await self._publisher.start()

    async def stop(self) -> None:
        for place in self._partitions:
            self._give_up(place)
        await self._publisher.stop()

    def assigned(self, *_: Any, **__: Any) -> None:
        """Faust has its partitions; none is well too, for there may be more workers than partitions. The state of those
        that others have now is forgotten."""
        self._shell.health["partitions"] = None
        places = {(tp.topic, tp.partition) for tp in self._app.consumer.assignment()}
        for place in self._partitions.keys() - places:
            self._give_up(place)
            del self._partitions[place]

    def _give_up(self, place: tuple[str, int]) -> None:
        """A rebuild that is under way."""
        if rebuilding := self._partitions[place].rebuilding:
            rebuilding.cancel()
            self._held.discard(TP(*place))

    def agent(self, stage: Stage) -> Callable[[Any], Awaitable[None]]:
        """Consumes the stage's topic. It never ends by an exception of its own."""

        async def consume(stream: Any) -> None:
            try:
                async for event in stream.noack().events():
                    *records, last = event.message.value.records
                    for record in records:
                        await self._roomy.wait()
                        self._take(stage, Piece(record, None))
                    await self._roomy.wait()
                    self._take(stage, Piece(last, event))
            except Exception as error:
                self.fail(error)
                await asyncio.Event().wait()

        return consume

    def _take(self, stage: Stage, piece: Piece) -> None:
        record = piece.record
        offset = record.offset
        place = record.topic, record.partition
        partition = self._partitions.get(place)
        if partition is None:
            partition = self._partitions[place] = Partition(stage)
        expected, partition.expected = partition.expected, offset + 1
        if partition.rebuilding is not None and offset >= expected:
            partition.waiting.append(piece)
            if len(partition.waiting) > WAITING_RECORDS:
                self._held.add(TP(*place))
        elif offset == expected:
            self._process(partition, piece)
        else:  # new here, or delivered from elsewhere: what is under way is for nothing
            self._give_up(place)
            partition.machine, partition.rebuilding, partition.waiting = None, None, deque([piece])
            if offset:
                partition.rebuilding = asyncio.create_task(self._rebuild(partition, TopicPartition(*place)))
                return
            partition.machine = stage.make(record.partition, self._pipeline, 0, False, None)
            partition.next_offset = 0
            self._process(partition, partition.waiting.popleft())

    async def _rebuild(self, partition: Partition, place: TopicPartition) -> None:
        """Brings a partition's state to where its delivery begins, then takes what has waited; again behind a hole in
        the log, whose records nobody can tell of."""
        started = time.perf_counter()
        try:
            while partition.waiting:
                piece = partition.waiting.popleft()
                if piece.record.offset != partition.next_offset or partition.machine is None:
                    at = partition.next_offset = piece.record.offset
                    partition.machine = await rebuild(
                        self._settings, self._pipeline, partition.stage, place, at, self._moved
                    )
                self._process(partition, piece)
                if len(partition.waiting) % 100 == 99:
                    await asyncio.sleep(0)
                    await self._roomy.wait()
            partition.rebuilding = None
            self._held.discard(TP(*place))
        except Exception as error:
            self.fail(error)
            return
        metrics.REBUILDS.inc()
        metrics.REBUILD_SECONDS.observe(time.perf_counter() - started)

    def _process(self, partition: Partition, piece: Piece) -> None:
        record, machine = piece.record, partition.machine
        assert machine is not None
        if record.offset != partition.next_offset:
            raise RuntimeError(f"offset {record.offset} came where {partition.next_offset} was next")
        read = partition.stage.read
        outputs = machine.process(read(record.partition, record.timestamp, record.headers, record.value, record.offset))
        partition.next_offset = record.offset + 1
        ordinary, vouching = self._outputs[record.partition], self._vouching[record.partition]
        for output in outputs:
            if output.topic not in self._left_out:
                (vouching if output.vouches else ordinary)[output.topic].append(output)
        self._pending += len(outputs)
        if piece.event is not None:
            self._events.append(piece.event)
        self._filled.set()
        if self._pending > PENDING_OUTPUTS:
            self._roomy.clear()

    async def flush(self) -> None:
        """One round after the other: outputs, then the markers that vouch for them, then acknowledgements."""
        prefix = self._settings.topic_prefix
        try:
            while True:
                await self._filled.wait()
                await asyncio.sleep(LINGER_S)
                self._filled.clear()
                outputs, self._outputs = self._outputs, no_batches()
                vouching, self._vouching = self._vouching, no_batches()
                events, self._events = self._events, []
                self._pending = 0
                self._roomy.set()
                for part in (outputs, vouching):
                    placed = {(prefix + t, p): batch for p, batches in part.items() for t, batch in batches.items()}
                    if placed:
                        await self._publisher.publish_batches(placed)
                        for (topic, _), batch in placed.items():
                            metrics.OUTPUTS.labels(topic.removeprefix(prefix)).inc(len(batch))
                for event in events:
                    event.ack()
                self._moved()
                self._count()
        except Exception as error:
            self.fail(error)

    def _count(self) -> None:
        """The metrics, once a round: setting them costs as much as an event."""
        for (_, number), partition in self._partitions.items():
            machine = partition.machine
            if machine is None or partition.rebuilding:
                continue
            for name, count in machine.counts.items():
                kind = metrics.PROCESSED if name in ("take", "resend", "overtook", "zombie") else metrics.PIPELINE
                kind.labels(name).inc(count)
            machine.counts.clear()
            if machine.tick is not None and partition.stage is RAW:
                metrics.WATERMARK.labels(number).set(machine.tick / NS_PER_S)

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    async def watch(self) -> None:
        """Raises TapedeckError when nothing has moved for long though there is something to read: Faust can sit on
        an assignment for ever, and a process that ends is started again."""
        while True:
            await asyncio.sleep(max(1.0, self._moved_at + STALLED_S - time.monotonic()))
            if time.monotonic() - self._moved_at < STALLED_S:
                continue
            try:
                lag = await self._lag()
            except KafkaError as error:
                raise TapedeckError(f"no progress for {STALLED_S:g} s, and Kafka does not answer: {error}") from error
            if lag:
                raise TapedeckError(f"no progress for {STALLED_S:g} s though {lag} records wait to be read")
            self._moved()

    async def _lag(self) -> int:
        """Records of the assigned partitions that are not worked through; asked of the broker by another client."""
        places = {TopicPartition(tp.topic, tp.partition) for tp in self._app.consumer.assignment()}
        if not places:
            return 0
        reader = await kafka.consumer(self._settings, *places, group=self._app.conf.id)
        lags: dict[TopicPartition, int] = {}
        try:
            begins, ends = await reader.beginning_offsets(places), await reader.end_offsets(places)
            for place, end in ends.items():
                at = max(begins[place], await reader.committed(place) or 0)
                if at < end:
                    reader.seek(place, at)
                    lags[place] = end - at
            # What ends a foreign transaction takes an offset too, and is no record.
            there = lags and await reader.getmany(*lags, timeout_ms=WAITING_MS, max_records=1)
        finally:
            await reader.stop()
        return sum(lags.values()) if there else 0


def no_batches() -> Batches:
    return defaultdict(lambda: defaultdict(list))


def faust_app(settings: Settings) -> faust.App:
    """The app; each setting is there for a failure seen (docs/decisions.md)."""
    if vars(faust.streams)["_CStreamIterator"] is None:
        raise UsageError("Faust's compiled stream iterator is missing; the pure-Python one loses records")
    protocol = settings.kafka_security_protocol
    credentials: Any = None
    if "SASL" in protocol:
        password = settings.kafka_sasl_password
        credentials = faust.SASLCredentials(
            mechanism=settings.kafka_sasl_mechanism,
            username=settings.kafka_sasl_username,
            password=password.get_secret_value() if password else None,
            ssl_context=settings.ssl_context() if "SSL" in protocol else None,
        )
    elif protocol == "SSL":
        credentials = faust.SSLCredentials(settings.ssl_context())
    app = faust.App(
        settings.topic_prefix + "tapedeck-processor",
        broker=[f"kafka://{server.strip()}" for server in settings.kafka_bootstrap_servers.split(",")],
        broker_credentials=credentials,
        store="memory://",
        datadir=tempfile.gettempdir(),  # it makes a folder there, even without tables
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=settings.worker_id,
        consumer_max_fetch_size=FETCH_BYTES,
        broker_session_timeout=10.0,
        broker_heartbeat_interval=2.0,
        broker_commit_interval=0.5,
        stream_buffer_maxsize=16,
        stream_wait_empty=False,
    )
    app.transport = PromptTransport(app.conf.broker_consumer, app)
    return app


async def run(shell: Shell) -> None:
    """`tapedeck process`. Raises UsageError, TapedeckError."""
    settings = shell.settings
    await kafka.prepare(settings)
    app = faust_app(settings)
    processor = Processor(shell, app)
    shell.health["partitions"] = "none yet"
    app.on_rebalance_complete.connect(processor.assigned, weak=False)
    try:
        await processor.start()
    except KafkaError as error:
        raise TapedeckError(f"Kafka at {settings.kafka_bootstrap_servers}: {error}") from error
    for stage in stages.ALL:
        name = settings.topic_prefix + stage.topic.name
        topic = app.topic(name, value_type=bytes, value_serializer="raw", key_type=bytes)
        app.agent(topic, name=stage.topic.name)(processor.agent(stage))
    flushing = asyncio.create_task(processor.flush())
    serving = asyncio.create_task(_serve(app))
    watching = asyncio.create_task(processor.watch())
    failing = asyncio.create_task(_raise(processor.failed))
    try:
        await shell.until_stopped(serving, watching, failing)
    finally:
        for task in (flushing, watching, failing):
            task.cancel()
        await asyncio.gather(flushing, watching, failing, return_exceptions=True)
        await app.stop()
        await asyncio.gather(serving, return_exceptions=True)
        await processor.stop()
    log.info("stopped")


async def _serve(app: faust.App) -> None:
    """Runs Faust inside this process's own loop; it must not end before it is told to."""
    await app.start()
    await app.wait_until_stopped()
    if app.crash_reason:
        raise app.crash_reason
    raise TapedeckError("Faust stopped by itself")


async def _raise(failed: asyncio.Future[None]) -> None:
    await failed
