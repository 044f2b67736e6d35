"""A stretch of history computed anew, by the very code that runs live: state before it by replay, then its records.

A row belongs to a stretch by its own time, and may come later: a late trade, a bar that it revises, a repair from
REST. So the raw topic is read for an hour longer than its horizon, and `raw.rest.v1` to its end.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import NamedTuple

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from msgspec.structs import replace
from rich.progress import Progress

from processors.operators.rollup import HOUR_NS
from processors.pipeline import Output, Pipeline
from processors.rebuild import replay
from processors.repairs import SKEW_NS
from processors.rollups import DAY_NS, EMITTED_NS, BarRecord, Rollups
from processors.settings import PipelineSettings
from processors.stages import RAW, REPAIRS
from schemas import topics
from schemas.events import MINUTE_NS, NS_PER_MS, NS_PER_S, MinuteClosed, Missed, decode_bar, encode
from schemas.raw import RawRecord
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.history import History, Source, open_history
from tapedeck.settings import Settings

REACH_NS = HOUR_NS  # for what comes after its horizon; what comes later still is left alone


class Reach(NamedTuple):
    """What the log could tell of, times in ns. It cannot tell what was before `since`, for its beginning was deleted;
    the log `begins` where it does. Bars that end after `settled` may still change. `taken`: by partition the epoch and
    number of the first event that was not read, and when the last one that was, was received."""

    since: int
    begins: int
    settled: int
    taken: dict[int, tuple[int, int, int]]


class Recomputation:
    """Rows of some topics with a time in [since, until), from Kafka or from the archive."""

    def __init__(
        self,
        settings: Settings,
        pipeline: PipelineSettings,
        source: Source,
        wanted: Iterable[topics.Topic],
        since: int,
        until: int,
    ) -> None:
        self._settings = settings
        self._source = source
        self._wanted = {topic.name for topic in wanted}
        self._pipeline = replace(pipeline, outputs=tuple(self._wanted))
        self._since, self._until = since, until
        self._deleted: list[int] = [0]
        self._begins: list[int] = []
        self._ticks: list[int] = []
        self._taken: dict[int, tuple[int, int, int]] = {}
        self._ends: dict[TopicPartition, int] = {}  # of what was read

    async def values(self, progress: Progress) -> AsyncIterator[tuple[str, list[bytes]]]:
        """(topic, values), those of a partition in the order of its log; also some from before and after the stretch.
        Raises TapedeckError, UsageError."""
        if self._source == "kafka":
            await kafka.prepare(self._settings)
        for number in range(topics.PARTITIONS):
            async for outputs in self._partition(number, progress):
                values: dict[str, list[bytes]] = {}
                for output in outputs:
                    if output.topic in self._wanted:
                        values.setdefault(output.topic, []).append(output.value)
                for found in values.items():
                    yield found
        if not any(self._ticks):
            raise TapedeckError(
                f"the log ({self._source}) holds nothing of that time, so there is nothing to compare with"
            )

    def reach(self) -> Reach:
        """After the last value."""
        horizon = self._pipeline.lateness_ns + self._pipeline.grace_ns + MINUTE_NS
        return Reach(max(self._since, *self._deleted), min(self._begins), min(self._ticks) - horizon, self._taken)

    async def moved(self) -> set[str]:
        """The topics of which there is, or may be, more than was read. Raises TapedeckError."""
        where = self._settings.kafka_bootstrap_servers
        try:
            ends = await kafka.ends(self._settings, self._ends)
        except KafkaError as error:
            if self._source == "kafka":
                raise TapedeckError(
                    f"Kafka at {where} went away: {error}. Nothing was changed: run it again"
                ) from error
            ends = {}
        moved = {place.topic for place, end in self._ends.items() if ends.get(place) != end}
        return {topic.removeprefix(self._settings.topic_prefix) for topic in moved}

    async def _partition(self, number: int, progress: Progress) -> AsyncIterator[list[Output]]:
        repaired: list[Output] = []
        async for outputs in self._repaired(number):
            yield outputs
            repaired += filter(self._is_bar_within, outputs)
        minutes = Minutes(number, repaired)
        async with open_history(self._settings, self._source, topics.RAW, number) as log:
            ahead_ns = self._pipeline.ahead_ns + NS_PER_S
            first = await log.first_since(_ms(self._since - ahead_ns))
            behind = await log.first_since(_ms(self._until + self._pipeline.lateness_ns + REACH_NS))
            last = min(log.end, behind + 1)  # with the tick that ends a silence, and closes what it found open
            state = await replay(log, RAW, number, self._pipeline, first)
            assert isinstance(state, Pipeline)
            await self._note(log, topics.RAW, number, state.memory_ns + ahead_ns, last)
            if log.begin < log.end:
                self._begins.append(await log.timestamp_ms(log.begin) * NS_PER_MS)
            else:  # nothing is known of it, if there is more elsewhere
                self._ticks.append(0)
            task = progress.add_task(f"partition {number}", total=last - first)
            recv = 0
            async for entries in log.batches(first, last):
                outputs = []
                for entry in entries:
                    record = RAW.read(number, entry.timestamp_ms, entry.headers, entry.value, entry.offset)
                    taken = state.taken
                    outputs += state.process(record)
                    if isinstance(record, RawRecord) and state.taken != taken:
                        recv = max(recv, record.recv[-1][0])
                yield outputs
                if topics.BARS_1M.name in self._wanted:
                    yield minutes.rolled_up(outputs)
                progress.advance(task, len(entries))
            self._taken[number] = (*state.taken, recv)
            if state.tick is not None:
                self._ticks.append(state.tick)
                yield minutes.repaired_until(state.tick)

    async def _repaired(self, number: int) -> AsyncIterator[list[Output]]:
        """All that REST ever said of the stretch, which may be long after it, and what it said since then of others."""
        async with open_history(self._settings, self._source, topics.RAW_REST, number) as log:
            await self._note(log, topics.RAW_REST, number, SKEW_NS, log.end)
            state = REPAIRS.make(number, self._pipeline, 0, False, None)
            async for entries in log.batches(await log.first_since(_ms(self._since - SKEW_NS)), log.end):
                outputs: list[Output] = []
                for entry in entries:
                    record = REPAIRS.read(number, entry.timestamp_ms, entry.headers, entry.value, entry.offset)
                    outputs += state.process(record)
                yield outputs

    def _is_bar_within(self, output: Output) -> bool:
        return _is_bar(output) and self._since <= decode_bar(output.value).end - MINUTE_NS < self._until

    async def _note(self, log: History, topic: topics.Topic, number: int, memory_ns: int, end: int) -> None:
        """To where it is read; and where its beginning was deleted, the state is known only a memory later."""
        self._ends[TopicPartition(self._settings.topic_prefix + topic.name, number)] = end
        if log.begin:
            left = log.begin < log.end
            begin = await log.timestamp_ms(log.begin) * NS_PER_MS if left else self._until
            self._deleted.append(begin + memory_ns)


class Minutes:
    """Rolls up the bars of a partition. Repairs stand with the minute that they are of, however late they came: so none
    is too old for the rollups of its range."""

    def __init__(self, partition: int, repaired: Iterable[Output]) -> None:
        self._rollups = Rollups(partition)
        bars = [(decode_bar(output.value).end, output.value) for output in repaired]
        self._waiting = sorted(bars, reverse=True)  # the earliest is the last

    def rolled_up(self, outputs: list[Output]) -> list[Output]:
        """What these bars and markers bring."""
        made: list[Output] = []
        for output in filter(_is_bar, outputs):
            made += self.repaired_until(output.timestamp_ms * NS_PER_MS, outputs)
            made += self._rollups.process(BarRecord(output.timestamp_ms, output.value, 0))
        return made

    def repaired_until(self, end: int, outputs: Iterable[Output] = ()) -> list[Output]:
        """The repairs of minutes that end by then. A day that would then be too old, as after a long outage and where
        the recording begins, is closed before, with the gaps that these outputs tell of at its end."""
        made: list[Output] = []
        while self._waiting and self._waiting[-1][0] <= end:
            minute_end, value = self._waiting.pop()
            self._rollups.process(BarRecord(minute_end // NS_PER_MS, value, 0))
            day = (minute_end - MINUTE_NS) // DAY_NS * DAY_NS
            following = self._waiting[-1][0] if self._waiting else end
            if end - day > EMITTED_NS and following > day + DAY_NS:
                self._rollups.note(_missed(outputs))
                fingerprint = decode_bar(value).fingerprint
                marker = encode(MinuteClosed(self._rollups.partition, day + DAY_NS, [], fingerprint))
                made += self._rollups.process(BarRecord((day + DAY_NS) // NS_PER_MS, marker, 0))
        return made


def _missed(outputs: Iterable[Output]) -> Iterator[Missed]:
    for output in filter(_is_bar, outputs):
        event = decode_bar(output.value)
        if isinstance(event, MinuteClosed):
            yield from event.missed


def _is_bar(output: Output) -> bool:
    return output.topic == topics.BARS_1M.name


def _ms(ns: int) -> int:
    return max(0, ns // NS_PER_MS)
