"""The pipeline without Kafka: raw records in, one NDJSON file per output topic out. Used by `compute`.

Rollups are made of the bars as they come, as by a worker that is never behind.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from processors.pipeline import RUN_IN_RECORDS, Output, Pipeline
from processors.rollups import BarRecord, Rollups
from processors.settings import PipelineSettings
from schemas import topics
from schemas.raw import Foreign, RawRecord

FILES = {
    topic.name: topic.name.removesuffix(".v1") + ".ndjson"
    for topic in topics.ALL
    if topic.values and topic is not topics.RAW
}


def run(
    records: Iterable[tuple[int, RawRecord | Foreign]], settings: PipelineSettings, close: bool = False
) -> Iterator[tuple[int, Output]]:
    """(partition, output) of (offset, record) pairs, through a pipeline per partition and the rollups behind it. A
    partition that does not begin at offset 0 is taken up in its middle."""
    pipelines: dict[int, Pipeline] = {}
    rollups: dict[int, Rollups] = {}

    def rolled_up(partition: int, outputs: list[Output]) -> Iterator[tuple[int, Output]]:
        for output in outputs:
            yield partition, output
            if output.topic == topics.BARS_1M.name:
                bar = BarRecord(output.timestamp_ms, output.value, 0)
                yield from rolled_up(partition, rollups[partition].process(bar))

    for offset, record in records:
        pipeline = pipelines.get(record.partition)
        if pipeline is None:
            middle = offset > 0
            run_in = RUN_IN_RECORDS if middle else 0
            pipeline = pipelines[record.partition] = Pipeline(record.partition, settings, run_in, middle)
            rollups[record.partition] = Rollups(record.partition)
        yield from rolled_up(record.partition, pipeline.process(record))
    if close:
        for partition, pipeline in sorted(pipelines.items()):
            yield from rolled_up(partition, pipeline.close())


def compute(
    records: Iterable[tuple[int, RawRecord | Foreign]], out: Path, settings: PipelineSettings, close: bool
) -> dict[str, int]:
    """Runs the records, writes the values to `out`, one file a topic, and returns the number of lines by file name."""
    out.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(FILES.values(), 0)
    with ExitStack() as stack:
        files = {name: stack.enter_context((out / file).open("wb")) for name, file in FILES.items()}
        for _, output in run(records, settings, close):
            files[output.topic].write(output.value + b"\n")
            counts[FILES[output.topic]] += 1
    return counts
