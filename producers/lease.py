"""The lease: one producer records, the others stand by.

It is a consumer group on a topic of one partition. A lease does not fence: a holder that was frozen finds
out late that another one has it, and then epochs decide (docs/architecture.md).
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.errors import KafkaError

from schemas import topics
from tapedeck import kafka
from tapedeck.settings import Settings

SESSION_S = 6.0  # how long a killed holder keeps the others waiting; brokers allow no less
STOP_S = 0.5


class _OneHolder(AbstractPartitionAssignor):  # type: ignore[misc]
    """Gives the partition to the member that records, by its epoch, so that a newcomer takes nothing away, nor
    does one that was frozen and still thinks it records. aiokafka wants a class, so the epoch is the class's."""

    name = "tapedeck-lease"
    epoch = 0

    @classmethod
    def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        return ConsumerProtocolMemberMetadata(0, list(topics), b"%d" % cls.epoch)

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        holder = max(members, key=lambda name: (int(members[name].user_data or 0), name))
        topic = members[holder].subscription[0]
        return {
            name: ConsumerProtocolMemberAssignment(0, [(topic, [0])] if name == holder else [], b"") for name in members
        }

    @classmethod
    def on_assignment(cls, assignment: ConsumerProtocolMemberAssignment) -> None:
        if not any(partitions for _, partitions in assignment.assignment):
            cls.epoch = 0


class Lease(ConsumerRebalanceListener):  # type: ignore[misc]
    """`held` and `lost` are set and cleared by the group. A rebalance as such takes nothing away, and neither
    does a broker's absence: only an assignment to another member does.

    `name` is this producer's own, and the same after a restart: then the lease comes back at once.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self.held, self.lost = asyncio.Event(), asyncio.Event()
        self._topic = settings.topic_prefix + topics.LEASE.name
        self._consumer = AIOKafkaConsumer(
            **settings.kafka_options(),
            group_id=f"{settings.topic_prefix}tapedeck-producer",
            group_instance_id=name,
            partition_assignment_strategy=[_OneHolder],
            enable_auto_commit=False,
            session_timeout_ms=int(SESSION_S * 1000),
            heartbeat_interval_ms=1_000,
        )

    async def keep(self) -> None:
        """Stays in the group until cancelled. Raises KafkaError when it may not."""
        try:
            await self._consumer.start()
            self._consumer.subscribe([self._topic], listener=self)
            while True:
                try:
                    await self._consumer.getmany(timeout_ms=1_000)  # who never asks is thrown out
                except KafkaError as error:
                    if not kafka.passing(error):
                        raise
                await asyncio.sleep(0.1)
        finally:
            _OneHolder.epoch = 0
            with contextlib.suppress(TimeoutError, KafkaError):
                async with asyncio.timeout(STOP_S):
                    await self._consumer.stop()

    @staticmethod
    def records(epoch: int) -> None:
        """The holder says what epoch it records."""
        _OneHolder.epoch = epoch

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """A rebalance begins: who has it when it ends is what counts."""

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        gained, given = (self.held, self.lost) if assigned else (self.lost, self.held)
        gained.set()
        given.clear()


async def claim_epoch(settings: Settings, at_least: int, name: str) -> int:
    """An epoch that nobody else has or will have: it is the place of our claim in the lease's topic. One that only
    came to be with its first record could be taken by two. Raises KafkaError."""
    producer = AIOKafkaProducer(**settings.kafka_options(), acks="all")
    await producer.start()
    try:
        while True:
            topic = settings.topic_prefix + topics.LEASE.name
            epoch = (await producer.send_and_wait(topic, name.encode(), partition=0)).offset + 1
            if epoch >= at_least:
                return int(epoch)
    finally:
        await producer.stop()
