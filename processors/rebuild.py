"""Recovery is replay: the state at any offset, from the log alone.

Take the timestamp of the record before the offset, step back by the pipeline's memory, start at the first
record at or after that time, and run from there through the same pipeline, silently. The run-in begins some
records earlier still, for only what stands before a record tells whether it is the next one. When it turns
out that the last record *taken* is older than the record before the offset, which overtook a failed one
after a silence, it all begins again from the time of that one.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from processors.settings import PipelineSettings
from processors.stages import RAW, Machine, Stage
from schemas import topics, wire
from schemas.events import NS_PER_MS, MinuteClosed, decode_bar, decode_gap
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.history import History, open_history, timestamp_at
from tapedeck.settings import Settings


async def replay(
    log: History,
    stage: Stage,
    partition: int,
    settings: PipelineSettings,
    offset: int,
    lost_since: Callable[[], Awaitable[int | None]] | None = None,
    moved: Callable[[], None] = lambda: None,
) -> Machine:
    """The stage as it stands before `offset`. Pure but for what the log does. `lost_since` is asked for what Pipeline
    calls so, where the log begins too late; `moved` is told each time that it got on."""
    newest_ms = await timestamp_at(log, offset - 1) if offset > log.begin else 0
    memory_ms = -(-stage.make(partition, settings, 0, False, None).memory_ns // NS_PER_MS)
    while True:
        found = await log.first_since(max(0, newest_ms - memory_ms))
        first = max(log.begin, min(offset, found) - stage.run_in)
        lost = 0 < first == log.begin
        since = await lost_since() if lost and lost_since else None
        state = stage.make(partition, settings, stage.run_in if first else 0, lost, since)
        async for entries in log.batches(first, offset):
            for entry in entries:
                state.process(stage.read(partition, entry.timestamp_ms, entry.headers, entry.value, entry.offset))
            moved()
        taken_ms = state.taken_ms or 0
        if first == log.begin or taken_ms >= newest_ms:
            state.counts.clear()
            return state
        newest_ms = taken_ms


async def rebuild(
    settings: Settings,
    pipeline: PipelineSettings,
    stage: Stage,
    place: TopicPartition,
    offset: int,
    moved: Callable[[], None],
) -> Machine:
    """The stage as it stands before `offset`, from Kafka. Gives way between fetches, and says each time that it
    `moved`. Raises TapedeckError."""
    try:
        async with open_history(settings, "kafka", stage.topic, place.partition) as log:

            async def lost_since() -> int | None:
                first_ms = await timestamp_at(log, log.begin)
                return await _worked_through(settings, place.partition, first_ms) if stage is RAW else None

            return await replay(log, stage, place.partition, pipeline, offset, lost_since, moved)
    except (KafkaError, TapedeckError) as error:
        raise TapedeckError(f"the state of {place} cannot be rebuilt: {error}") from error


async def _worked_through(settings: Settings, partition: int, first_ms: int) -> int | None:
    """Until when the raw log had been worked through before what came next was deleted, ms; `first_ms` is the time
    of the first record left. What the gap says, once it is told; else the newest marker; None where there is none."""
    ending: int | None = None
    async for _, gap in _newest(settings, topics.GAPS, partition, 1_000, decode_gap):
        if gap.reason == "log" and gap.to == first_ms * NS_PER_MS:
            return None if gap.from_ is None else gap.from_ // NS_PER_MS
    async for timestamp_ms, event in _newest(settings, topics.BARS_1M, partition, 10_000, decode_bar):
        if timestamp_ms <= first_ms and isinstance(event, MinuteClosed):
            ending = timestamp_ms
    return ending


async def _newest(
    settings: Settings, topic: topics.Topic, partition: int, count: int, decode: Callable[[bytes], Any]
) -> AsyncIterator[tuple[int, Any]]:
    """The last events of a partition with their records' timestamps, ms, in order; without what is none."""
    place = TopicPartition(settings.topic_prefix + topic.name, partition)
    reader = await kafka.consumer(settings, place)
    try:
        begin, end = (await reader.beginning_offsets([place]))[place], (await reader.end_offsets([place]))[place]
        reader.seek(place, max(begin, end - count))
        while await reader.position(place) < end:
            for record in (await reader.getmany(place, timeout_ms=1000)).get(place, ()):
                try:
                    event = decode(record.value or b"")
                except wire.DECODE_ERRORS:
                    continue
                yield record.timestamp, event
    finally:
        await reader.stop()
