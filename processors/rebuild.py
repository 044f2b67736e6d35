"""Recovery is replay: the state at any offset, from the log alone.

Take the timestamp of the record before the offset, step back by the pipeline's memory, start at the first
record at or after that time, and run from there through the same pipeline, silently. The run-in begins some
records earlier still: a record that overtook a failed send may be the first after a long silence, and only
what stands before it tells that it is not the next one.
"""

import asyncio

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from processors.pipeline import RUN_IN_RECORDS, Pipeline
from processors.settings import PipelineSettings
from schemas.events import NS_PER_MS
from schemas.raw import NotARawRecord, from_kafka
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings


async def rebuild(settings: Settings, pipeline: PipelineSettings, place: TopicPartition, offset: int) -> Pipeline:
    """The pipeline as it stands before `offset`. Gives way between fetches. Raises TapedeckError."""
    reader = await kafka.consumer(settings, place)
    try:
        begin = (await reader.beginning_offsets([place]))[place]
        state = Pipeline(place.partition, pipeline, lenient=begin > 0)
        if offset <= begin:
            return state
        reader.seek(place, offset - 1)
        previous = await reader.getone(place)
        since_ms = max(0, previous.timestamp - state.memory_ns // NS_PER_MS)
        found = (await reader.offsets_for_times({place: since_ms}))[place]
        start = min(offset, found.offset if found else offset)
        run_in = max(begin, start - RUN_IN_RECORDS)
        reader.seek(place, run_in)
        position = run_in
        while position < offset:
            batches = await reader.getmany(place, timeout_ms=1000, max_records=500)
            for record in batches.get(place, ()):
                if record.offset >= offset:
                    break
                try:
                    raw = from_kafka(record.partition, record.timestamp, record.headers, record.value)
                except NotARawRecord:
                    continue
                state.lenient = run_in > 0 and (record.offset < start or record.offset == run_in)
                state.process(raw)
            position = await reader.position(place)
            await asyncio.sleep(0)
        state.lenient = False
        state.counts.clear()
        return state
    except KafkaError as error:
        raise TapedeckError(f"the state of {place} cannot be rebuilt: {error}") from error
    finally:
        await reader.stop()
