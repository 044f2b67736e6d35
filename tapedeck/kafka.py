"""Kafka as every part uses it: connecting with patience, topics from the registry, publishing in order."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, codec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RequestTimedOutError,
    SaslAuthenticationFailed,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import ConsumerRecord
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_delay,
    wait_exponential,
)

from schemas import topics
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.settings import Settings

log = structlog.get_logger()

BATCH_BYTES = 256 * 1024

# aiokafka compresses with lz4's level 9, the slow «high compression», and has no setting for it. On slices of the
# feed level 1 takes a fourteenth of the time and makes 24 % of the size where 9 makes 18 %.
codec.lz4_encode.__defaults__ = (1,)
STOP_S = 0.5
READ_S = 30.0
REASON_MS = 5_000


class Record(Protocol):
    """What can be published; the time is in ms."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def timestamp_ms(self) -> int: ...
    @property
    def headers(self) -> list[tuple[str, bytes]]: ...


class Message(NamedTuple):
    """A record with the place it goes to. `topic` is the full name, prefix included."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes
    timestamp_ms: int
    headers: list[tuple[str, bytes]]


def passing(error: BaseException) -> bool:
    """Whether an error of Kafka may go away by itself."""
    return error.retriable if isinstance(error, KafkaError) else isinstance(error, OSError)


_REFUSALS: dict[type[BaseException], str] = {
    MessageSizeTooLargeError: "the topic takes no record as large as this: raise its max.message.bytes to {bytes}",
    RecordListTooLargeError: "the topic takes no batch as large as this: raise its segment.bytes above {bytes}",
    TopicAuthorizationFailedError: "this user may not write to the topic: allow it Write, Read and Describe",
    ClusterAuthorizationFailedError: "this user may not write idempotently: allow it IdempotentWrite on the cluster",
    SaslAuthenticationFailed: "the user or its password is refused: set KAFKA_SASL_USERNAME and _PASSWORD",
    UnsupportedSaslMechanismError: "the brokers do not offer this KAFKA_SASL_MECHANISM",
}


def refusal(error: BaseException, topic: topics.Topic) -> str | None:
    """What an operator has to do before Kafka takes a record of the topic; None: trying again may be enough."""
    advice = _REFUSALS.get(type(error))
    return advice and advice.format(bytes=topic.max_message_bytes)


def retrying(settings: Settings, what: str, passing: Callable[[BaseException], bool]) -> AsyncRetrying:
    """Attempts with exponential backoff until `connect_timeout_s` has passed, each failure logged."""

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning(f"{what} cannot be reached, trying again", attempt=state.attempt_number, error=str(error))

    return AsyncRetrying(
        retry=retry_if_exception(passing),
        wait=wait_exponential(multiplier=0.25, max=5),
        stop=stop_after_delay(settings.connect_timeout_s),
        before_sleep=say,
        reraise=True,
    )


@asynccontextmanager
async def admin_client(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started client. Raises KafkaError, which says why no broker lets us in: aiokafka itself only logs that."""
    client = AIOKafkaAdminClient(**settings.kafka_options())
    try:
        try:
            await client.start()
        except KafkaConnectionError:
            options = settings.kafka_options()
            host, port, _ = collect_hosts(options.pop("bootstrap_servers"))[0]
            try:
                (await create_conn(host, port, request_timeout_ms=REASON_MS, **options)).close()
            except OSError as error:
                raise KafkaConnectionError(str(error) or repr(error)) from error
            raise
        yield client
    finally:
        await client.close()


async def prepare(settings: Settings) -> None:
    """Waits for Kafka and creates the topics of the registry that are missing.

    Raises UsageError when Kafka refuses the user, when a topic has another number of partitions than the registry, or
    settings with which it refuses or changes what we write; TapedeckError when Kafka cannot be reached in time.
    """
    try:
        async for attempt in retrying(settings, "Kafka", passing):
            with attempt:
                await _ensure_topics(settings)
    except (KafkaError, OSError) as error:
        where = f"Kafka at {settings.kafka_bootstrap_servers}"
        if not passing(error):
            advice = _REFUSALS.get(type(error), "it will again")
            raise UsageError(f"{where} refuses us: {advice} ({error})") from error
        raise TapedeckError(
            f"{where} cannot be reached after {settings.connect_timeout_s:g} s "
            f"(KAFKA_BOOTSTRAP_SERVERS, KAFKA_SECURITY_PROTOCOL): {error}"
        ) from error


async def _ensure_topics(settings: Settings) -> None:
    async with admin_client(settings) as admin:
        wanted = {settings.topic_prefix + topic.name: topic for topic in topics.ALL}
        missing = wanted.keys() - set(await admin.list_topics())
        if missing:
            copies = settings.kafka_replication_factor
            if copies is None:
                copies = min(3, len((await admin.describe_cluster())["brokers"]))
            new = [
                NewTopic(name, wanted[name].partitions, copies, topic_configs=wanted[name].config())
                for name in sorted(missing)
            ]
            response = await admin.create_topics(new)
            for name, code, *rest in response.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise UsageError(f"Kafka refused to create topic {name}: {error.__name__} {rest[0] or ''}")
        for found in await admin.describe_topics(sorted(wanted)):
            if found["error_code"]:
                raise for_code(found["error_code"])(found["topic"])
            count, right = len(found["partitions"]), wanted[found["topic"]].partitions
            if count != right:
                raise UsageError(
                    f"topic {found['topic']} has {count} partitions and the registry says {right}: "
                    "identities would change. Use another TOPIC_PREFIX, or fill a new topic version by replay."
                )
        await _check_settings(admin, wanted)


async def _check_settings(admin: AIOKafkaAdminClient, wanted: dict[str, topics.Topic]) -> None:
    """A smaller limit would stop the log at its first large record, compaction and the broker's own timestamps
    would change it. Topics that delete by age lose recordings and replays, whose times are old, within minutes.
    What they delete by size is the operator's choice."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in sorted(wanted)]
    for response in await admin.describe_configs(resources):
        for _, _, _, name, entries in response.resources:
            right = wanted[name].config()
            found = right | {entry[0]: entry[1] for entry in entries}
            wrong = [key for key in ("cleanup.policy", "message.timestamp.type") if found[key] != right[key]]
            if int(found["max.message.bytes"]) < int(right["max.message.bytes"]):
                wrong.append("max.message.bytes")
            if wrong:
                has, needs = (", ".join(f"{key}={each[key]}" for key in wrong) for each in (found, right))
                raise UsageError(f"topic {name} has {has}: it would refuse or change what is written. Set {needs}")
            if found["retention.ms"] != "-1":
                log.warning("topic deletes by age, old-dated records will vanish", topic=name)


async def consumer(
    settings: Settings,
    *partitions: TopicPartition,
    group: str | None = None,
    fetch_bytes: int = topics.MAX_RECORD_BYTES,
) -> AIOKafkaConsumer:
    """A started consumer of just these partitions, from their beginning until it is told to seek. `fetch_bytes` is of a
    partition at a time; a single record may be larger."""
    reader = AIOKafkaConsumer(
        **settings.kafka_options(),
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=fetch_bytes,
        fetch_max_wait_ms=50,
    )
    try:
        await reader.start()
    except BaseException:
        await reader.stop()
        raise
    reader.assign(list(partitions))
    return reader


def places_of(settings: Settings, *wanted: topics.Topic) -> list[TopicPartition]:
    """Every partition of these topics."""
    return [
        TopicPartition(settings.topic_prefix + topic.name, number)
        for topic in wanted
        for number in range(topic.partitions)
    ]


async def ends(settings: Settings, places: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """The offset behind the last record of each place. Raises KafkaError."""
    reader = await consumer(settings)
    try:
        found: dict[TopicPartition, int] = await reader.end_offsets(list(places))
        return found
    finally:
        await reader.stop()


async def records_at(
    settings: Settings, offsets: Mapping[TopicPartition, int]
) -> dict[TopicPartition, ConsumerRecord[bytes, bytes]]:
    """The record at an offset of each place, or the first behind it where that is gone. There must be one. Raises
    KafkaError."""
    reader = await consumer(settings, *offsets, fetch_bytes=1)
    try:
        for place, offset in offsets.items():
            reader.seek(place, offset)
        async with asyncio.timeout(READ_S):
            return {place: await reader.getone(place) for place in offsets}
    except TimeoutError:
        raise RequestTimedOutError(f"no record within {READ_S:g} s") from None
    finally:
        await reader.stop()


class Publisher:
    """Publishes lists of records, in order within each partition, with one list in flight at a time.

    Idempotent, acks=all, lz4. `publish` returns when all are acknowledged and raises KafkaError when any
    is not; then the order of what went out is not known and the caller starts again from its own mark.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Raises KafkaError."""
        producer = AIOKafkaProducer(
            **self._settings.kafka_options(),
            acks="all",
            enable_idempotence=True,
            compression_type="lz4",
            max_batch_size=BATCH_BYTES,
            max_request_size=topics.MAX_RECORD_BYTES + BATCH_BYTES,
            request_timeout_ms=15_000,
            metadata_max_age_ms=30_000,
        )
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        self._producer = producer

    @property
    def started(self) -> bool:
        return self._producer is not None

    async def restart(self) -> None:
        """A new client: one whose send failed may still send what came after it. When this returns, the old
        one sends nothing any more, however late. Raises KafkaError."""
        await self.stop(None)
        await self.start()

    async def stop(self, patience_s: float | None = STOP_S) -> None:
        """Flushes nothing, which aiokafka's own stop would wait for as long as the broker is away: what is not
        acknowledged, the caller sends again from its own mark. `patience_s`: for a request that is on its way."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        sending = producer._sender.sender_task
        sending.cancel()
        await producer.client.close()
        await asyncio.wait({sending}, timeout=patience_s)
        producer._closed = True

    async def publish(self, messages: Iterable[Message]) -> None:
        """Messages for any places."""
        batches: dict[tuple[str, int], list[Message]] = {}
        for message in messages:
            batches.setdefault((message.topic, message.partition), []).append(message)
        await self.publish_batches(batches)

    async def publish_batches(self, batches: Mapping[tuple[str, int], Sequence[Record]]) -> None:
        """Records by (topic, partition), in order within each."""
        producer = self._producer
        assert producer is not None, "start() comes first"
        results = await asyncio.gather(
            *(self._send(producer, *place, records) for place, records in batches.items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    @staticmethod
    async def _send(producer: AIOKafkaProducer, topic: str, partition: int, records: Sequence[Record]) -> None:
        """One batch after the other, so that a later one can never overtake a failed one."""
        first = 0
        while first < len(records):
            builder = producer.create_batch()
            first = _fill(builder, records, first)
            builder.close()
            await (await producer.send_batch(builder, topic, partition=partition))


def _fill(builder: BatchBuilder, records: Sequence[Record], first: int) -> int:
    """Puts records from `first` on into the batch; returns the first that found no room. What the builder's own
    `append` does besides, for each record, costs as much as the rest."""
    append = builder._builder.append
    place = 0
    for place, record in enumerate(records[first:]):
        if append(place, record.timestamp_ms, record.key, record.value, record.headers) is None:
            break
    else:
        place += 1
    builder._relative_offset = place
    return first + place
