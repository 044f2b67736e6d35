"""The raw topic as a file."""

from pathlib import Path

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.progress import Progress

from schemas import topics
from schemas.raw import log_line
from tapedeck import kafka
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings


async def dump(settings: Settings, out: Path) -> int:
    """Writes every record that the raw topic holds now, partition by partition; returns their number.

    Raises TapedeckError, OSError.
    """
    await kafka.prepare(settings)
    topic = settings.topic_prefix + topics.RAW.name
    count = 0
    try:
        with out.open("wb") as file, Progress(console=Console(stderr=True)) as progress:
            for number in range(topics.PARTITIONS):
                place = TopicPartition(topic, number)
                reader = await kafka.consumer(settings, place)
                try:
                    position = (await reader.beginning_offsets([place]))[place]
                    end = (await reader.end_offsets([place]))[place]
                    task = progress.add_task(f"partition {number}", total=end - position)
                    while position < end:
                        batches = await reader.getmany(place, timeout_ms=1000)
                        for record in batches.get(place, ()):
                            if record.offset < end:
                                file.write(
                                    log_line(number, record.offset, record.timestamp, record.headers, record.value)
                                )
                                count += 1
                                progress.advance(task)
                        position = await reader.position(place)
                finally:
                    await reader.stop()
    except KafkaError as error:
        raise TapedeckError(f"the log cannot be read from {settings.kafka_bootstrap_servers}: {error}") from error
    return count
