"""History onto topics again, under a prefix of their own: the same records in the same order with the same times.

A range of time is, in each partition, the records from the first that is not older than its beginning to before the
first that is not older than its end, whatever stands between.
"""

import asyncio
import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import NamedTuple

import structlog
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from producers.replayed import replayed, wanted
from schemas import topics
from schemas.raw import REPLAY, REPLAY_BEGINS, Foreign, record_of
from tapedeck import kafka
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.history import Entry, History, Source, open_history
from tapedeck.settings import Settings

log = structlog.get_logger()

Place = tuple[str, int]
MS_PER_S = 1000


class Wanted(NamedTuple):
    """What to play: times in ms, `until_ms` not included; no `symbols`: all. `speed` may be infinite."""

    since_ms: int
    until_ms: int
    symbols: frozenset[str]
    speed: float


class Due(NamedTuple):
    """A record and its turn: its own time, or that of a record before it in its partition which is later."""

    at_ms: int
    place: Place
    entry: Entry


class Stretch:
    """What is played of one partition."""

    def __init__(self, topic: topics.Topic, place: Place, history: History, first: int, end: int) -> None:
        self.count = end - first
        self.lacks = 0 < first == history.begin  # what was before it, which may have been of the time that is wanted
        self._begins = first > 0
        self._src = b""  # until the first record of ours
        self._topic = topic
        self._place = place
        self._position = first
        self._batches = history.batches(first, end)
        self._times: list[int] = []
        self._entries: list[Entry] = []

    async def fill(self) -> bool:
        """Sees to it that there are records at hand; False: there are no more."""
        if not self._entries:
            latest = self._times[-1] if self._times else 0
            self._entries = await anext(self._batches, [])
            if self._entries and self._entries[0].offset != self._position:
                raise TapedeckError(
                    f"records {self._position} to {self._entries[0].offset - 1} of {self._topic.name} were deleted "
                    "before they could be played, the replay ends here: play it from the archive (--source archive)"
                )
            self._times = [latest := max(latest, entry.timestamp_ms) for entry in self._entries]
        return bool(self._entries)

    @property
    def until_ms(self) -> int:
        """The time of the last record at hand."""
        return self._times[-1]

    def take(self, until_ms: int, symbols: frozenset[str]) -> tuple[int, list[Due]]:
        """Takes the records at hand that are due by then; returns their number, and what becomes of them."""
        count = bisect_right(self._times, until_ms)
        due = []
        for at_ms, entry in zip(self._times[:count], self._entries[:count], strict=True):
            headers, value = entry.headers, entry.value
            if self._topic is topics.RAW:
                headers, value = replayed(headers, value, symbols, self._source(entry))
            elif not wanted(headers, symbols):
                continue
            again = Entry(entry.partition, entry.offset, entry.timestamp_ms, entry.key, headers, value)
            due.append(Due(at_ms, self._place, again))
        if count:
            self._position = self._entries[count - 1].offset + 1
        if count < len(self._entries):
            del self._times[:count]
        del self._entries[:count]
        return count, due

    def _source(self, entry: Entry) -> bytes:
        """What to call the source of a record: the first one of ours says when it is in the middle."""
        if self._src:
            return self._src
        record = record_of(entry.partition, entry.timestamp_ms, entry.headers, entry.value, entry.offset)
        if isinstance(record, Foreign):
            return dict(entry.headers).get("src", b"")
        self._src = REPLAY.encode()
        return REPLAY_BEGINS.encode() if self._begins or record.src == REPLAY_BEGINS else self._src


async def replay(settings: Settings, source: Source, prefix: str, want: Wanted) -> int:
    """Plays it onto the topics under `prefix`; returns the number of records. Raises UsageError, TapedeckError."""
    target = settings.model_copy(update={"topic_prefix": prefix})
    _check(settings, prefix)
    if source == "kafka":
        await kafka.prepare(settings)
    publisher = kafka.Publisher(target)
    async with AsyncExitStack() as stack:
        stretches = [
            stretch
            for topic in topics.ARCHIVED
            for partition in range(topic.partitions)
            if (stretch := await _open(stack, settings, source, topic, partition, prefix, want)).count
        ]
        if not stretches:
            raise TapedeckError(f"there is nothing to play from {_text(want.since_ms)} to {_text(want.until_ms)}")
        if any(stretch.lacks for stretch in stretches):
            log.warning("the log begins too late to play all of it: another --source may still have it", source=source)
        await _prepare(target)
        try:
            await publisher.start()
            stack.push_async_callback(publisher.stop)
            return await _play(stretches, publisher, want)
        except KafkaError as error:
            raise TapedeckError(
                f"the replay ends before its end, Kafka says: {error!r}. Start it again with another --prefix"
            ) from error


def _check(settings: Settings, prefix: str) -> None:
    """Raises UsageError where it is no prefix for a replay."""
    if prefix == settings.topic_prefix:
        raise UsageError(f"--prefix {prefix!r} is that of the live line: a replay needs topics of its own")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", prefix):
        raise UsageError(f"--prefix {prefix!r} makes no name of a topic: letters, digits, dots, dashes")


async def _prepare(target: Settings) -> None:
    """Makes the topics; raises UsageError where they are not there for a replay alone."""
    await kafka.prepare(target)
    try:
        ends = await kafka.ends(target, kafka.places_of(target, *topics.ARCHIVED))
    except KafkaError as error:
        raise TapedeckError(f"Kafka at {target.kafka_bootstrap_servers}: {error}") from error
    if held := sorted({place.topic for place, end in ends.items() if end}):
        raise UsageError(
            f"{', '.join(held)} hold records already, and a second replay behind them would be taken for repeats: "
            "give another --prefix, or delete the topics"
        )


async def _open(
    stack: AsyncExitStack,
    settings: Settings,
    source: Source,
    topic: topics.Topic,
    partition: int,
    prefix: str,
    want: Wanted,
) -> Stretch:
    history = await stack.enter_async_context(open_history(settings, source, topic, partition))
    first, end = history.end, history.end
    if history.begin < history.end:
        first, end = await history.first_since(want.since_ms), await history.first_since(want.until_ms)
    return Stretch(topic, (prefix + topic.name, partition), history, first, end)


async def _play(stretches: Sequence[Stretch], publisher: kafka.Publisher, want: Wanted) -> int:
    done = 0
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    sending: asyncio.Task[None] | None = None
    try:
        with progress:
            task = progress.add_task("", total=sum(stretch.count for stretch in stretches))
            async for count, records in _paced(_rounds(stretches, want.symbols), want.speed):
                if sending is not None:
                    await sending
                batches: dict[Place, list[Entry]] = defaultdict(list)
                for record in records:
                    batches[record.place].append(record.entry)
                # The next are read while these are on their way.
                sending = asyncio.create_task(publisher.publish_batches(batches))
                done += len(records)
                if records:
                    progress.update(task, description=_text(records[-1].at_ms))
                progress.advance(task, count)
            if sending is not None:
                await sending
    finally:
        if sending is not None:
            sending.cancel()
    return done


async def _rounds(stretches: Sequence[Stretch], symbols: frozenset[str]) -> AsyncIterator[tuple[int, list[Due]]]:
    """All records, some at a time, with the number of those they are what is left of: nothing of a later round is due
    before what is in an earlier one."""
    while stretches := [stretch for stretch in stretches if await stretch.fill()]:
        until_ms = min(stretch.until_ms for stretch in stretches)
        taken = [stretch.take(until_ms, symbols) for stretch in stretches]
        yield sum(count for count, _ in taken), [record for _, records in taken for record in records]


async def _paced(rounds: AsyncIterator[tuple[int, list[Due]]], speed: float) -> AsyncIterator[tuple[int, list[Due]]]:
    """The same, each record not before its time has come."""
    loop = asyncio.get_running_loop()
    began: tuple[float, int] | None = None
    async for count, records in rounds:
        if math.isinf(speed) or not records:
            yield count, records
            continue
        records.sort(key=lambda record: record.at_ms)
        if began is None:
            began = loop.time(), records[0].at_ms
        count -= len(records)
        while records:
            now_ms = began[1] + (loop.time() - began[0]) * MS_PER_S * speed
            due = bisect_right(records, now_ms, key=lambda record: record.at_ms)
            if not due:
                await asyncio.sleep((records[0].at_ms - now_ms) / MS_PER_S / speed)
                continue
            yield count + due, records[:due]
            count = 0
            del records[:due]


def _text(time_ms: int) -> str:
    latest = datetime(9999, 12, 31, tzinfo=UTC).timestamp()  # a record of somebody else's may have any time
    return f"{datetime.fromtimestamp(min(time_ms / MS_PER_S, latest), UTC):%Y-%m-%d %H:%M:%S}"
