"""From the journal into Kafka: in file order, one round in flight, and after a failure from the mark again."""

import asyncio
import time
from collections import Counter

import structlog
from aiokafka.errors import KafkaError

from producers.journal import Journal
from producers.lease import SESSION_S, claim_epoch
from producers.resume import LogEnd, read_log_end
from producers.session import jitter
from schemas import topics
from tapedeck import kafka, metrics
from tapedeck.settings import Settings

log = structlog.get_logger()

LONGEST_RESEND_S = 5.0
SLOW_S = 5.0  # aiokafka itself tries on in silence for as long as the broker is away


class Superseded(Exception):
    """Another producer has gone on with the log."""


class Mouth:
    """`log_end`: where the log stood when it was last read; `claimed`: the highest epoch that is ours, or that
    was claimed before; `failures`: rounds that failed so far. `health` learns how Kafka is."""

    def __init__(self, settings: Settings, journal: Journal, health: dict[str, str | None]) -> None:
        self._settings = settings
        self._journal = journal
        self._health = health
        self._publisher = kafka.Publisher(settings)
        self.log_end = LogEnd({}, 0)
        self.claimed = 0
        self.failures = 0
        self._round_began: float | None = None  # when what Kafka has not acknowledged yet was sent
        self._slow = False

    async def stop(self) -> None:
        await self._publisher.stop()

    def look(self) -> None:
        """Says it when Kafka has acknowledged nothing for a while."""
        if self._round_began is not None and not self._slow and time.monotonic() - self._round_began > SLOW_S:
            self._slow = True
            self._health["kafka"] = f"has acknowledged nothing for {SLOW_S:g} s"
            log.warning("Kafka acknowledges nothing, the journal keeps the records", seconds=SLOW_S)

    async def speak(self) -> None:
        """For ever. After a failure everything from the acknowledged mark on that is not in the log is sent again by a
        new client. Raises Superseded."""
        topic = self._settings.topic_prefix + topics.RAW.name
        failures = 0
        told: set[type[Exception]] = set()
        began = time.monotonic()
        self._journal.rewind()  # a former tenure may have ended in the middle of a round
        while True:
            records = await self._journal.next()
            last, began = began, time.monotonic()
            try:
                if failures or not self._publisher.started:
                    await self._publisher.restart()
                if failures or began - last > SESSION_S:  # it may have been frozen, and its lease lost meanwhile
                    self.log_end = await read_log_end(self._settings)
                    if self.log_end.claims > self.claimed:
                        raise Superseded
                if self._journal.epoch == self.claimed:
                    await self._claim()
                self._round_began = time.monotonic()
                await self._publisher.publish(
                    kafka.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers())
                    for r in records
                    if not self.log_end.has(r)
                )
            except (KafkaError, OSError) as error:
                self._journal.rewind()
                failures += 1
                self._failed(error, told)
                await asyncio.sleep(0.1 + jitter(failures, 0.25, LONGEST_RESEND_S))
                continue
            if failures:
                log.info("Kafka takes the records again", failures=failures)
            if self._slow:
                log.info("Kafka has taken the records")
            failures, self._slow, self._round_began = 0, False, None
            told.clear()
            self._health["kafka"] = None
            self._journal.acknowledge()
            for kind, count in Counter(record.kind for record in records).items():
                metrics.PUBLISHED.labels(kind).inc(count)

    async def _claim(self) -> None:
        """One epoch in advance, for after a full journal: Kafka may be away by then. Raises Superseded, KafkaError."""
        before = self.claimed
        self.claimed = await claim_epoch(self._settings, before + 1, self._journal.name)
        if self.claimed > before + 1:
            raise Superseded

    def _failed(self, error: Exception, told: set[type[Exception]]) -> None:
        """Says what kind of failure it is, each kind once."""
        refusal = kafka.refusal(error, topics.RAW)
        metrics.PRODUCER_ERRORS.labels("refused" if refusal else "kafka").inc()
        self.failures += 1
        self._health["kafka"] = f"sending fails: {refusal or error}"
        if type(error) in told:
            return
        told.add(type(error))
        if refusal:
            log.error(f"Kafka refuses the records, the journal keeps them: {refusal}", error=str(error))
        else:
            log.warning("Kafka does not take the records, the journal keeps them", error=str(error))
