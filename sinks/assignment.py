"""A sink's place in its consumer group: the member, and which partitions it is given as that changes."""

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition

from tapedeck.settings import Settings

METADATA_MS = 30_000  # how long a topic that was made again may not be seen


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """`places` is what we are to read, a new set after each rebalance and None during one."""

    places: set[TopicPartition] | None = None

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self.places = None

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self.places = set(assigned)


def member(settings: Settings, name: str, fetch_wait_ms: int, fetch_bytes: int) -> AIOKafkaConsumer:
    """A consumer in the group of the sink `name`, not started. Where it reads is the sink's affair: it commits
    nothing by itself, and has no place to begin. `fetch_bytes` is of a partition at a time."""
    worker = settings.worker_id or None
    return AIOKafkaConsumer(
        **settings.kafka_options(),
        group_id=f"{settings.topic_prefix}tapedeck-sink-{name}",
        group_instance_id=worker and f"{worker}-{name}",
        enable_auto_commit=False,
        auto_offset_reset="none",
        session_timeout_ms=6_000,  # how long a killed sink's partitions wait; brokers allow no less
        heartbeat_interval_ms=1_000,  # and how long the others may not know of a rebalance
        metadata_max_age_ms=METADATA_MS,
        fetch_max_wait_ms=fetch_wait_ms,
        max_partition_fetch_bytes=fetch_bytes,
    )
