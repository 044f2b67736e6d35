"""Which partitions the group gives a sink, as it changes."""

from aiokafka import ConsumerRebalanceListener, TopicPartition


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """`places` is what we are to read, a new set after each rebalance and None during one."""

    places: set[TopicPartition] | None = None

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self.places = None

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self.places = set(assigned)
