"""The raw topic as a file."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from schemas import topics
from schemas.raw import log_line
from tapedeck import kafka
from tapedeck.history import open_history
from tapedeck.settings import Settings


async def dump(settings: Settings, out: Path) -> int:
    """Writes every record that the raw topic holds now, partition by partition; returns their number.

    Raises TapedeckError, OSError.
    """
    await kafka.prepare(settings)
    count = 0
    with out.open("wb") as file, Progress(console=Console(stderr=True)) as progress:
        for number in range(topics.PARTITIONS):
            async with open_history(settings, "kafka", topics.RAW, number) as log:
                task = progress.add_task(f"partition {number}", total=log.end - log.begin)
                async for entries in log.batches(log.begin, log.end):
                    for entry in entries:
                        file.write(log_line(number, entry.offset, entry.timestamp_ms, entry.headers, entry.value))
                    count += len(entries)
                    progress.advance(task, len(entries))
    return count
