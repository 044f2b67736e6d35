"""The processor process: a thin Faust app that moves bytes through the pipeline.

Faust brings the group, the assignment and the offsets. State is the pipeline's, in memory; a delivered
record that is not the next one triggers a rebuild, so nothing rests on rebalance callbacks. A record is
acknowledged, in order, after the broker took everything made from it; any unexpected error ends the process.
"""

import asyncio
import tempfile
import time
from collections import Counter, deque
from typing import Any

import faust
import faust.streams
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from processors.pipeline import Output, Pipeline
from processors.rebuild import rebuild
from processors.settings import chosen
from processors.transport import PromptTransport
from schemas import topics
from schemas.events import NS_PER_S
from schemas.raw import NotARawRecord, RawRecord, from_kafka
from tapedeck import kafka, metrics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings
from tapedeck.shell import Shell

log = structlog.get_logger()

PENDING_OUTPUTS = 20_000  # outputs not yet acknowledged, past which reading waits
LINGER_S = 0.004  # rounds of a few records cost as much as rounds of a thousand
WAITING_RECORDS = 10_000  # records of a partition that is being rebuilt, past which reading waits


class Partition:
    """A partition of the raw topic: its pipeline, the next offset, and what waits while it is rebuilt."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self.next_offset = -1  # of the pipeline
        self.expected = -1  # of the delivery, which runs ahead while the pipeline is rebuilt
        self.waiting: deque[Any] = deque()
        self.rebuilding: asyncio.Task[None] | None = None


class Processor:
    """Takes Faust events in, keeps outputs and acknowledgements in order."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._settings = shell.settings
        self._pipeline = chosen(self._settings)
        self._publisher = kafka.Publisher(self._settings)
        self._partitions: dict[int, Partition] = {}
        self._outputs: list[kafka.Message] = []
        self._vouching: list[kafka.Message] = []
        self._events: list[Any] = []
        self._filled = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: BaseException) -> None:
        """Ends the process: an exception that merely left the agent would be committed past."""
        if not self.failed.done():
            self.failed.set_exception(error)

    async def start(self) -> None:
        await self._publisher.start()

    async def stop(self) -> None:
        for partition in self._partitions.values():
            if partition.rebuilding:
                partition.rebuilding.cancel()
        await self._publisher.stop()

    def assigned(self, *_: Any, **__: Any) -> None:
        """Faust has its partitions; none is well too, for there may be more workers than partitions."""
        self._shell.health["partitions"] = None

    async def consume(self, stream: Any) -> None:
        """The agent. It never ends by an exception of its own."""
        try:
            async for event in stream.noack().events():
                await self._take(event)
        except Exception as error:
            self.fail(error)
            await asyncio.Event().wait()

    async def _take(self, event: Any) -> None:
        await self._roomy.wait()
        offset = event.message.offset
        partition = self._partitions.setdefault(event.message.partition, Partition())
        continues, partition.expected = offset == partition.expected, offset + 1
        if not continues:  # new here, or delivered from elsewhere: what is under way is for nothing
            if partition.rebuilding is not None:
                partition.rebuilding.cancel()
            partition.pipeline, partition.rebuilding, partition.waiting = None, None, deque([event])
            if offset:
                partition.rebuilding = asyncio.create_task(self._rebuild(partition, event.message))
                return
            partition.pipeline, partition.next_offset = Pipeline(event.message.partition, self._pipeline), 0
            self._process(partition, partition.waiting.popleft())
        elif partition.rebuilding is not None:
            partition.waiting.append(event)
            if len(partition.waiting) > WAITING_RECORDS:
                await asyncio.wait({partition.rebuilding})
        else:
            self._process(partition, event)

    async def _rebuild(self, partition: Partition, first: Any) -> None:
        """Brings a partition's state to where its delivery begins, then takes what has waited."""
        started = time.perf_counter()
        place = TopicPartition(first.topic, first.partition)
        try:
            partition.pipeline = await rebuild(self._settings, self._pipeline, place, first.offset)
            partition.next_offset = first.offset
            while partition.waiting:
                self._process(partition, partition.waiting.popleft())
                if len(partition.waiting) % 100 == 99:
                    await asyncio.sleep(0)
            partition.rebuilding = None
        except Exception as error:
            self.fail(error)
            return
        metrics.REBUILDS.inc()
        metrics.REBUILD_SECONDS.observe(time.perf_counter() - started)

    def _process(self, partition: Partition, event: Any) -> None:
        message = event.message
        pipeline = partition.pipeline
        assert pipeline is not None
        if message.offset != partition.next_offset:
            raise RuntimeError(f"offset {message.offset} came where {partition.next_offset} was next")
        outputs = self._run(pipeline, message)
        partition.next_offset = message.offset + 1
        prefix = self._settings.topic_prefix
        for output in outputs:
            record = kafka.Message(
                prefix + output.topic, message.partition, output.key, output.value, output.timestamp_ms, []
            )
            (self._vouching if output.vouches else self._outputs).append(record)
        self._events.append(event)
        self._filled.set()
        if len(self._outputs) > PENDING_OUTPUTS:
            self._roomy.clear()
        if pipeline.tick is not None:
            metrics.WATERMARK.labels(message.partition).set(pipeline.tick / NS_PER_S)

    @staticmethod
    def _run(pipeline: Pipeline, message: Any) -> list[Output]:
        timestamp_ms = round(message.timestamp * 1000)
        headers = message.headers.items() if isinstance(message.headers, dict) else message.headers
        try:
            raw: RawRecord = from_kafka(message.partition, timestamp_ms, headers, message.value)
        except NotARawRecord as error:
            return pipeline.foreign(message.value or b"", timestamp_ms, str(error))
        before = dict(pipeline.counts)
        outputs = pipeline.process(raw)
        for name, count in pipeline.counts.items():
            added = count - before.get(name, 0)
            if added:
                kind = metrics.PROCESSED if name in ("take", "resend", "overtook", "zombie") else metrics.PIPELINE
                kind.labels(name).inc(added)
        return outputs

    async def flush(self) -> None:
        """One round after the other: outputs, then the markers that vouch for them, then acknowledgements."""
        try:
            while True:
                await self._filled.wait()
                await asyncio.sleep(LINGER_S)
                self._filled.clear()
                outputs, self._outputs = self._outputs, []
                vouching, self._vouching = self._vouching, []
                events, self._events = self._events, []
                self._roomy.set()
                for part in (outputs, vouching):
                    if part:
                        await self._publisher.publish(part)
                        for topic, count in Counter(message.topic for message in part).items():
                            metrics.OUTPUTS.labels(topic.removeprefix(self._settings.topic_prefix)).inc(count)
                for event in events:
                    event.ack()
        except Exception as error:
            self.fail(error)


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
        consumer_max_fetch_size=topics.MAX_RECORD_BYTES,
        broker_session_timeout=10.0,
        broker_heartbeat_interval=2.0,
        broker_commit_interval=0.5,
        stream_buffer_maxsize=64,
        stream_wait_empty=False,
    )
    app.transport = PromptTransport(app.conf.broker_consumer, app)
    return app


async def run(shell: Shell) -> None:
    """`tapedeck process`. Raises UsageError, TapedeckError."""
    settings = shell.settings
    await kafka.prepare(settings)
    app = faust_app(settings)
    processor = Processor(shell)
    shell.health["partitions"] = "none yet"
    app.on_rebalance_complete.connect(processor.assigned, weak=False)
    try:
        await processor.start()
    except KafkaError as error:
        raise TapedeckError(f"Kafka at {settings.kafka_bootstrap_servers}: {error}") from error
    raw = app.topic(settings.topic_prefix + topics.RAW.name, value_type=bytes, value_serializer="raw", key_type=bytes)
    app.agent(raw, name="pipeline")(processor.consume)
    flushing = asyncio.create_task(processor.flush())
    serving = asyncio.create_task(_serve(app))
    failing = asyncio.create_task(_raise(processor.failed))
    try:
        await shell.until_stopped(serving, failing)
    finally:
        flushing.cancel()
        failing.cancel()
        await asyncio.gather(flushing, failing, return_exceptions=True)
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
