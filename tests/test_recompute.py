"""A stretch of history computed anew gives what one pass over the whole log gives."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr
from rich.progress import Progress

from bench.market import write_frames
from processors.compute import run
from processors.recompute import Recomputation
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import topics
from schemas.events import MINUTE_NS, NS_PER_MS, Bar, decode_bar
from schemas.frames import Frame, read_frames
from schemas.raw import RawRecord
from tapedeck.archive import Archive, table_of
from tapedeck.history import Entry
from tapedeck.settings import Settings
from tapedeck.spans import HOUR_MS, Span

BEGIN_MS = 1_723_161_240_000  # a whole minute


def frames(folder: Path, begin_ms: int, seconds: int) -> Iterable[Frame]:
    path = folder / f"{begin_ms}.ndjson"
    write_frames(path, 10, seconds, per_frame=5, begin_ms=begin_ms)
    return read_frames(path)


def archive(settings: Settings, records: list[RawRecord]) -> None:
    """A file for each partition and hour."""
    files = Archive(settings)
    groups: dict[tuple[int, int], list[Entry]] = {}
    offsets = [0] * topics.PARTITIONS
    for r in records:
        entry = Entry(r.partition, offsets[r.partition], r.timestamp_ms, None, r.headers(), r.value)
        groups.setdefault((r.partition, r.timestamp_ms // HOUR_MS), []).append(entry)
        offsets[r.partition] += 1
    for (partition, hour), held in groups.items():
        span = Span(held[0].offset, held[-1].offset + 1, hour, topics.RAW.name, partition)
        files.put(span, [table_of(held)])


def ended(values: Iterable[bytes], until: int) -> set[bytes]:
    """The bars that end before."""
    found = ((value, decode_bar(value)) for value in values)
    return {value for value, event in found if isinstance(event, Bar) and event.end <= until}


async def test_what_is_open_when_a_long_silence_begins_is_closed_as_it_was(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, archive_url=SecretStr(str(tmp_path / "archive")))
    market = [*frames(tmp_path, BEGIN_MS, 150), *frames(tmp_path, BEGIN_MS + 5 * HOUR_MS, 10)]
    records = list(records_of(market, SlicerSettings(), ["XT", "XQ", "XA"], ["*"]))
    archive(settings, records)
    since, until = BEGIN_MS * NS_PER_MS, (BEGIN_MS + HOUR_MS) * NS_PER_MS
    made = Recomputation(settings, PipelineSettings(), "archive", [topics.BARS_1M], since, until)
    found = [value async for _, values in made.values(Progress(disable=True)) for value in values]
    outputs = run(((record.n, record) for record in records), PipelineSettings())
    expected = ended((output.value for _, output in outputs if output.topic == topics.BARS_1M.name), until)
    assert any(decode_bar(value).end == since + 3 * MINUTE_NS for value in expected)
    assert ended(found, until) == expected
