"""A stretch of history computed anew, by the very code that runs live: state before it by replay, then its records.

A row belongs to a stretch by its own time, and may come later: a late trade, a bar that it revises, a repair from
REST. So the raw topic is read for an hour longer than its horizon, and `raw.rest.v1` to its end.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

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
from tapedeck import kafka, logs
from tapedeck.errors import TapedeckError
from tapedeck.history import History, Source, open_history, timestamp_at
from tapedeck.processes import spread
from tapedeck.settings import Settings

ROWS = 5_000  # at once
REACH_NS = HOUR_NS  # for what comes after its horizon; what comes later still is left alone


class Reach(NamedTuple):
    """What the log could tell of, times in ns. It cannot tell what was before `since`, for its beginning was deleted;
    the log `begins` where it does. Bars that end after `settled` may still change. `taken`: by partition the epoch and
    number of the first event that was not read, and when the last one that was, was received."""

    since: int
    begins: int
    settled: int
    taken: dict[int, tuple[int, int, int]]


class Known(NamedTuple):
    """What partitions tell beside their rows. `deleted`: from when on their state is known. `ends` of what was read."""

    deleted: list[int]
    begins: list[int]
    ticks: list[int]
    taken: dict[int, tuple[int, int, int]]
    ends: dict[TopicPartition, int]

    def add(self, other: "Known") -> None:
        self.deleted.extend(other.deleted)
        self.begins.extend(other.begins)
        self.ticks.extend(other.ticks)
        self.taken.update(other.taken)
        self.ends.update(other.ends)


def nothing_known() -> Known:
    return Known([], [], [], {}, {})


class Some(NamedTuple):
    """Some rows of a partition, by topic, of `done` of its `total` records; with the last of them what it tells."""

    partition: int
    done: int
    total: int
    rows: dict[str, Any]
    known: Known | None


Shape = Callable[[str, list[bytes]], Any]


def as_they_are(_: str, values: list[bytes]) -> list[bytes]:
    return values


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
        self._pipeline = replace(pipeline, outputs=tuple(topic.name for topic in wanted))
        self._since, self._until = since, until
        self._known = nothing_known()

    async def values(
        self, progress: Progress, shape: Shape = as_they_are, processes: int = 1
    ) -> AsyncIterator[tuple[str, Any]]:
        """(topic, what `shape` makes of values), those of a partition in the order of its log; also some from before
        and after the stretch. Raises TapedeckError, UsageError."""
        if self._source == "kafka":
            await kafka.prepare(self._settings)
        begin = partial(logs.configure, self._settings, "rebuild")
        work = Partition(self._settings, self._pipeline, self._source, self._since, self._until, shape).some
        tasks = [progress.add_task(f"partition {number}", total=None) for number in range(topics.PARTITIONS)]
        made = False
        async for some in spread(work, range(topics.PARTITIONS), processes, begin):
            for found in some.rows.items():
                made = True
                yield found
            progress.update(tasks[some.partition], completed=some.done, total=some.total)
            if some.known:
                self._known.add(some.known)
        latest = max(self._known.ticks, default=0)
        if not latest or not (made or latest + self._pipeline.ahead_ns + NS_PER_S > self._since):
            raise TapedeckError(
                f"the log ({self._source}) holds nothing of that time, so there is nothing to compare with"
            )

    def reach(self) -> Reach:
        """After the last value."""
        horizon = self._pipeline.lateness_ns + self._pipeline.grace_ns + MINUTE_NS
        known = self._known
        return Reach(max(self._since, 0, *known.deleted), min(known.begins), min(known.ticks) - horizon, known.taken)

    async def moved(self) -> set[str]:
        """The topics of which there is, or may be, more than was read. Raises TapedeckError."""
        where = self._settings.kafka_bootstrap_servers
        try:
            ends = await kafka.ends(self._settings, self._known.ends)
        except KafkaError as error:
            if self._source == "kafka":
                raise TapedeckError(
                    f"Kafka at {where} went away: {error}. Nothing was changed: run it again"
                ) from error
            ends = {}
        moved = {place.topic for place, end in self._known.ends.items() if ends.get(place) != end}
        return {topic.removeprefix(self._settings.topic_prefix) for topic in moved}


class Partition(NamedTuple):
    """How to recompute a partition, whichever and wherever; `shape` is what its rows leave it as."""

    settings: Settings
    pipeline: PipelineSettings
    source: Source
    since: int
    until: int
    shape: Shape

    async def some(self, number: int) -> AsyncIterator[Some]:
        """All of it, some at a time. Raises TapedeckError."""
        known = nothing_known()
        values: dict[str, list[bytes]] = {}
        done = total = 0
        async for done, total, outputs in self._outputs(number, known):
            for output in outputs:
                if output.topic in self.pipeline.outputs:
                    values.setdefault(output.topic, []).append(output.value)
            if sum(map(len, values.values())) >= ROWS:
                yield Some(number, done, total, self._shaped(values), None)
                values = {}
        yield Some(number, done, total, self._shaped(values), known)

    def _shaped(self, values: dict[str, list[bytes]]) -> dict[str, Any]:
        return {topic: self.shape(topic, found) for topic, found in values.items()}

    async def _outputs(self, number: int, known: Known) -> AsyncIterator[tuple[int, int, list[Output]]]:
        """With how many records of how many they come; adds to what is known."""
        repaired: list[Output] = []
        async for outputs in self._repaired(number, known):
            yield 0, 1, outputs
            repaired += filter(self._is_bar_within, outputs)
        minutes = Minutes(number, repaired)
        async with open_history(self.settings, self.source, topics.RAW, number) as log:
            ahead_ns = self.pipeline.ahead_ns + NS_PER_S
            first = await log.first_since(_ms(self.since - ahead_ns))
            behind = await log.first_since(_ms(self.until + self.pipeline.lateness_ns + REACH_NS))
            last = min(log.end, behind + 1)  # with the tick that ends a silence, and closes what it found open
            state = await replay(log, RAW, number, self.pipeline, first)
            assert isinstance(state, Pipeline)
            await self._note(known, log, topics.RAW, number, state.memory_ns + ahead_ns, last)
            if log.begin < log.end:
                known.begins.append(await timestamp_at(log, log.begin) * NS_PER_MS)
            else:  # nothing is known of it, if there is more elsewhere
                known.ticks.append(0)
            recv = done = 0
            counts, process, read = state.counts, state.process, RAW.read
            async for entries in log.batches(first, last):
                outputs = []
                for _, offset, timestamp_ms, _, headers, value in entries:
                    record = read(number, timestamp_ms, headers, value, offset)
                    taken = counts["take"]
                    outputs += process(record)
                    if counts["take"] != taken and (newest := record.recv[-1][0]) > recv:
                        recv = newest
                if topics.BARS_1M.name in self.pipeline.outputs:
                    outputs += minutes.rolled_up(outputs)
                done += len(entries)
                yield done, last - first, outputs
            known.taken[number] = (*state.taken, recv)
            if state.tick is not None:
                known.ticks.append(state.tick)
                yield done, last - first, minutes.repaired_until(state.tick)

    async def _repaired(self, number: int, known: Known) -> AsyncIterator[list[Output]]:
        """All that REST ever said of the stretch, which may be long after it, and what it said since then of others."""
        async with open_history(self.settings, self.source, topics.RAW_REST, number) as log:
            await self._note(known, log, topics.RAW_REST, number, SKEW_NS, log.end)
            state = REPAIRS.make(number, self.pipeline, 0, False, None)
            async for entries in log.batches(await log.first_since(_ms(self.since - SKEW_NS)), log.end):
                outputs: list[Output] = []
                for entry in entries:
                    record = REPAIRS.read(number, entry.timestamp_ms, entry.headers, entry.value, entry.offset)
                    outputs += state.process(record)
                yield outputs

    def _is_bar_within(self, output: Output) -> bool:
        return _is_bar(output) and self.since <= decode_bar(output.value).end - MINUTE_NS < self.until

    async def _note(
        self, known: Known, log: History, topic: topics.Topic, number: int, memory_ns: int, end: int
    ) -> None:
        """To where it is read; and where its beginning was deleted, the state is known only a memory later."""
        known.ends[TopicPartition(self.settings.topic_prefix + topic.name, number)] = end
        if log.begin:
            left = log.begin < log.end
            begin = await timestamp_at(log, log.begin) * NS_PER_MS if left else self.until
            known.deleted.append(begin + memory_ns)


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
