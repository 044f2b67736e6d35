"""History onto topics again, under a prefix of their own: the same records in the same order with the same times.

A range of time is, in each partition, the records from the first that is not older than its beginning to before the
first that is not older than its end, whatever stands between.
"""

import asyncio
import math
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from itertools import compress
from typing import NamedTuple

import structlog
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from producers.replayed import filtered, has_event, symbol_of
from schemas import topics
from schemas.partition import partition_of
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


class Turn(NamedTuple):
    """What is due of one partition, and of each record when: its own time, or that of one before it which is later."""

    place: Place
    times: list[int]
    entries: list[Entry]

    def part(self, first: int, end: int | None = None) -> "Turn":
        return Turn(self.place, self.times[first:end], self.entries[first:end])


class Stretch:
    """What is played of one partition."""

    def __init__(self, topic: topics.Topic, place: Place, history: History, first: int, end: int) -> None:
        self.count = end - first
        self.lacks = 0 < first == history.begin  # what was before it, which may have been of the time that is wanted
        self._begins = first > 0
        self._begun = False  # the first record of ours was taken
        self._topic = topic
        self._place = place
        self._position = first
        self._history = history
        self._batches = history.batches(first, end)
        self._latest_ms = 0
        self._times: list[int] = []
        self._entries: list[Entry] = []

    async def has(self, symbols: frozenset[str]) -> bool:
        """Whether any of it is of these pairs: looks before anything is taken. A pair is in its own partition and in no
        other."""
        if self._place[1] not in map(partition_of, symbols):
            return False
        async for entries in self._history.batches(self._position, self._position + self.count):
            if self._topic is topics.RAW:
                found = any(has_event(entry.value, symbols) for entry in entries)
            else:
                found = any(symbol_of(entry.headers) in symbols for entry in entries)
            if found:
                return True
        return False

    async def fill(self) -> bool:
        """Sees to it that there are records at hand; False: there are no more."""
        if not self._entries:
            latest = self._latest_ms
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

    def take(self, until_ms: int, symbols: frozenset[str]) -> tuple[int, Turn]:
        """Takes the records at hand that are due by then; returns their number, and what becomes of them."""
        count = bisect_right(self._times, until_ms)
        times, entries = self._times[:count], self._entries[:count]
        del self._times[:count], self._entries[:count]
        if count:
            self._latest_ms, self._position = times[-1], entries[-1].offset + 1
        if self._topic is topics.RAW:
            if symbols:
                entries = [e._replace(value=filtered(e.headers, e.value, symbols)) for e in entries]
            entries = self._named(entries)
        elif symbols:
            right = {None, *symbols}  # what names no pair stays
            kept = [symbol_of(entry.headers) in right for entry in entries]
            times, entries = list(compress(times, kept)), list(compress(entries, kept))
        return count, Turn(self._place, times, entries)

    def _named(self, entries: list[Entry]) -> list[Entry]:
        """What they become but for events left out. The first record of ours says when it is in the middle; what
        somebody else wrote before it stays as it is."""
        if self._begun:
            return _from(REPLAY, entries)
        for place, (partition, offset, timestamp_ms, _, headers, value) in enumerate(entries):
            record = record_of(partition, timestamp_ms, headers, value, offset)
            if not isinstance(record, Foreign):
                self._begun = True
                src = REPLAY_BEGINS if self._begins or record.src == REPLAY_BEGINS else REPLAY
                return [*entries[:place], *_from(src, entries[place : place + 1]), *_from(REPLAY, entries[place + 1 :])]
        return entries


def _from(src: str, entries: Iterable[Entry]) -> list[Entry]:
    """Raw records of this source."""
    ours = ("src", src.encode())
    return [
        Entry(partition, offset, timestamp_ms, key, [ours if pair[0] == "src" else pair for pair in headers], value)
        for partition, offset, timestamp_ms, key, headers, value in entries
    ]


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
        if want.symbols and not await _any_has(stretches, want.symbols):
            raise TapedeckError(
                f"no event from {_text(want.since_ms)} to {_text(want.until_ms)} is of "
                f"{', '.join(sorted(want.symbols))}, so nothing is played: look at its spelling (like BTC-USD), and at "
                "`tapedeck status` for what there is"
            )
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


async def _any_has(stretches: Iterable[Stretch], symbols: frozenset[str]) -> bool:
    for stretch in stretches:
        if await stretch.has(symbols):
            return True
    return False


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
            async for count, turns in _paced(_rounds(stretches, want.symbols), want.speed):
                if sending is not None:
                    await sending
                # The next are read while these are on their way.
                sending = asyncio.create_task(publisher.publish_batches({turn.place: turn.entries for turn in turns}))
                done += sum(len(turn.entries) for turn in turns)
                if turns:
                    progress.update(task, description=_text(max(turn.times[-1] for turn in turns)))
                progress.advance(task, count)
            if sending is not None:
                await sending
    finally:
        if sending is not None:
            sending.cancel()
    return done


async def _rounds(stretches: Sequence[Stretch], symbols: frozenset[str]) -> AsyncIterator[tuple[int, list[Turn]]]:
    """All records, some at a time, with the number of those they are what is left of: nothing of a later round is due
    before what is in an earlier one."""
    while stretches := [stretch for stretch in stretches if await stretch.fill()]:
        until_ms = min(stretch.until_ms for stretch in stretches)
        taken = [stretch.take(until_ms, symbols) for stretch in stretches]
        yield sum(count for count, _ in taken), [turn for _, turn in taken if turn.entries]


async def _paced(rounds: AsyncIterator[tuple[int, list[Turn]]], speed: float) -> AsyncIterator[tuple[int, list[Turn]]]:
    """The same, each record not before its time has come."""
    loop = asyncio.get_running_loop()
    began: tuple[float, int] | None = None
    async for count, turns in rounds:
        if math.isinf(speed) or not turns:
            yield count, turns
            continue
        if began is None:
            began = loop.time(), min(turn.times[0] for turn in turns)
        count -= sum(len(turn.entries) for turn in turns)
        while turns:
            now_ms = began[1] + (loop.time() - began[0]) * MS_PER_S * speed
            first_ms = min(turn.times[0] for turn in turns)
            if first_ms > now_ms:
                await asyncio.sleep((first_ms - now_ms) / MS_PER_S / speed)
                continue
            cuts = [bisect_right(turn.times, now_ms) for turn in turns]
            yield count + sum(cuts), [turn.part(0, cut) for turn, cut in zip(turns, cuts, strict=True) if cut]
            count = 0
            turns = [rest for turn, cut in zip(turns, cuts, strict=True) if (rest := turn.part(cut)).entries]


def _text(time_ms: int) -> str:
    latest = datetime(9999, 12, 31, tzinfo=UTC).timestamp()  # a record of somebody else's may have any time
    return f"{datetime.fromtimestamp(min(time_ms / MS_PER_S, latest), UTC):%Y-%m-%d %H:%M:%S}"
