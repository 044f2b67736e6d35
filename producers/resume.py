"""Where the raw log stands: what a starting producer goes on from."""

from aiokafka import TopicPartition

from producers.slicer import Resume
from schemas import topics
from schemas.raw import NotARawRecord, RawRecord, from_kafka
from tapedeck import kafka
from tapedeck.errors import UsageError
from tapedeck.settings import Settings


async def read_resume(settings: Settings) -> Resume | None:
    """Reads the last record of each partition; None where there is none at all.

    Raises UsageError when the topic holds something else, KafkaError.
    """
    topic = settings.topic_prefix + topics.RAW.name
    partitions = [TopicPartition(topic, number) for number in range(topics.PARTITIONS)]
    reader = await kafka.consumer(settings, *partitions)
    try:
        begins, ends = await reader.beginning_offsets(partitions), await reader.end_offsets(partitions)
        waiting = {place for place in partitions if ends[place] > begins[place]}
        for place in waiting:
            reader.seek(place, ends[place] - 1)
        last: dict[int, RawRecord] = {}
        while waiting:
            record = await reader.getone(*waiting)
            place = TopicPartition(record.topic, record.partition)
            if record.offset >= ends[place] - 1:
                waiting.discard(place)
            try:
                last[record.partition] = from_kafka(record.partition, record.timestamp, record.headers, record.value)
            except NotARawRecord as error:
                raise UsageError(f"{topic} has a record that tapedeck did not write: {error}") from error
    finally:
        await reader.stop()
    if not last:
        return None
    newest = max(last.values(), key=lambda record: (record.epoch, record.timestamp_ms))
    return Resume(
        max(record.epoch for record in last.values()),
        max(record.timestamp_ms for record in last.values()),
        newest.recv[-1][0],
        [last[p].timestamp_ms if p in last else None for p in range(topics.PARTITIONS)],
    )
