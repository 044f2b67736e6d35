"""Faust's Kafka driver with one number changed: how long a fetch may wait at the broker.

Faust fixes it at 1.5 s. aiokafka has one fetch per broker under way, so a partition that was just read
waits until the fetch for the quiet ones comes back: measured here, p99 of 1.7 s from socket to trades.v1
(docs/decisions.md).
"""

from typing import Any, ClassVar

from faust.transport.drivers import aiokafka

FETCH_WAIT_MS = 20


class _Thread(aiokafka.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        return consumer


class _Consumer(aiokafka.Consumer):
    def _new_consumer_thread(self) -> Any:
        return _Thread(self, loop=self.loop, beacon=self.beacon)


class PromptTransport(aiokafka.Transport):
    """Set as `app.transport` before the app starts."""

    Consumer: ClassVar[Any] = _Consumer
