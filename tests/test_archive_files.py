"""The archive's files without Kafka: what damage, odd addresses, large records and other people's files do."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiokafka import TopicPartition
from pydantic import SecretStr
from rich.progress import Progress

from processors.recompute import Recomputation
from processors.settings import PipelineSettings
from schemas import topics
from schemas.events import MINUTE_NS
from schemas.raw import RawRecord
from sinks.archive import ArchiveSink, cut
from sinks.merging import merge
from tapedeck import archive as module
from tapedeck.archive import Archive, tables_of
from tapedeck.errors import TapedeckError, UsageError
from tapedeck.history import Entry
from tapedeck.settings import Settings
from tapedeck.shell import Shell
from tapedeck.spans import Part, Span, span_of

TOPIC = "raw.crypto.v1"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, archive_url=SecretStr(str(tmp_path / "archive")))


def entry(offset: int, value: bytes = b"value", timestamp_ms: int = 0) -> Entry:
    return Entry(3, offset, timestamp_ms, None, [("kind", b"slice")], value)


def put(archive: Archive, begin: int, entries: list[Entry]) -> Path:
    span = Span(begin, begin + len(entries), 0, TOPIC, 3)
    archive.put(span, tables_of(entries))
    return Path(archive._root, span.path)


@pytest.mark.parametrize("place", [4, 10_000])  # what describes the values, and one of them
async def test_a_file_that_cannot_be_merged_is_said_and_stops_nothing(
    settings: Settings, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    sink, archive = ArchiveSink(Shell(settings, "sink archive")), Archive(settings)
    path = put(archive, 0, [entry(offset, os.urandom(200)) for offset in range(100)])
    put(archive, 100, [entry(100)])
    damaged = bytearray(path.read_bytes())
    damaged[place : place + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    await sink._merge((TOPIC, 3, 0))
    assert str(path) in capsys.readouterr().out
    assert len(archive.spans(TOPIC)) == 2
    with pytest.raises((OSError, TapedeckError), match=str(path)):
        list(archive.entries(Part(Span(0, 100, 0, TOPIC, 3), 0, 100)))


def test_somebody_else_may_merge_at_the_same_time(settings: Settings) -> None:
    class Late(Archive):
        """It looked before another merge began, and reads when that is through."""

        def hour(self, topic: str, hour: int, partition: int) -> list[Span]:
            found = super().hour(topic, hour, partition)
            merge(Archive(settings), (topic, partition, hour))
            put(self, 20, [entry(offset) for offset in range(20, 30)])
            return [*found, Span(20, 30, hour, topic, partition)]

    late = Late(settings)
    for begin in (0, 10):
        put(late, begin, [entry(offset) for offset in range(begin, begin + 10)])
    merge(late, (TOPIC, 3, 0))
    assert sorted(span[:2] for span in late.spans(TOPIC)) == [(0, 20), (20, 30)]


def test_a_file_that_is_interrupted_is_not_there(settings: Settings) -> None:
    def interrupted() -> Iterator[pa.Table]:
        yield from tables_of([entry(0)])
        raise KeyboardInterrupt

    archive = Archive(settings)
    with pytest.raises(KeyboardInterrupt):
        archive.put(Span(0, 2, 0, TOPIC, 3), interrupted())
    assert not [path for path in Path(archive._root).rglob("*") if path.is_file()]


def test_only_what_the_archive_wrote_aside_is_swept(settings: Settings, tmp_path: Path) -> None:
    archive = Archive(settings)
    put(archive, 0, [entry(0)])
    folder = Path(archive._root)
    aside = folder / Span(0, 1, 0, TOPIC, 3).folder / f".{'0f' * 16}.tmp"
    others = [folder / "thesis.tmp", folder / "topic=notes" / "draft.tmp", aside.with_name("mine.tmp")]
    for path in (aside, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    archive.sweep(time.time())
    assert not aside.exists()
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("timestamp_ms", [-1, -(2**62), 0, 253_402_300_800_000, 2**62])
def test_a_time_that_has_no_date_has_a_file(timestamp_ms: int) -> None:
    place = TopicPartition(TOPIC, 3)
    spans = [span for span, _ in cut(place, 0, [entry(0, timestamp_ms=timestamp_ms)])]
    assert [span_of(span.path) for span in spans] == spans


def test_large_records_are_read_a_few_at_a_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", 10_000)
    archive = Archive(settings)
    path = put(archive, 0, [entry(offset, os.urandom(4_000)) for offset in range(30)])
    assert pq.ParquetFile(path).num_row_groups == 10
    put(archive, 30, [entry(offset) for offset in range(30, 40)])
    merge(archive, (TOPIC, 3, 0))

    def sizes(batches: Iterable[list[Entry]]) -> list[int]:
        return [len(batch) for batch in batches]

    (span,) = archive.spans(TOPIC)
    assert max(sizes(archive.entries(Part(span, 0, 30)))) <= 6
    assert sum(sizes(archive.entries(Part(span, 1, 40)))) == 39


@pytest.mark.parametrize(
    "url", ["", "~nobody-of-that-name/tape", "s3://", "s4://bucket/tape", "s3://key:hush@bucket/tape?nonsense=hush"]
)
def test_an_address_that_is_none_is_wrong_use(url: str) -> None:
    with pytest.raises(UsageError, match="ARCHIVE_URL") as raised:
        Archive(Settings(_env_file=None, archive_url=SecretStr(url)))
    assert "hush" not in str(raised.value)


def test_an_address_with_slashes_too_many_is_the_one_without() -> None:
    url = "s3://key:hush@bucket//tape//?region=somewhere"
    assert Archive(Settings(_env_file=None, archive_url=SecretStr(url)))._root == "bucket/tape"


async def test_bars_of_a_partition_that_the_archive_lacks_are_not_settled(settings: Settings) -> None:
    ticks = [RawRecord(3, at_ms, "tick", 1, n, [(0, 1)], b'{"fresh":[]}') for n, at_ms in enumerate((0, 3_600_000))]
    put(Archive(settings), 0, [Entry(3, r.n, r.timestamp_ms, None, r.headers(), r.value) for r in ticks])
    made = Recomputation(settings, PipelineSettings(), "archive", [topics.BARS_1M], 0, MINUTE_NS)
    with Progress(disable=True) as progress:
        assert [values async for values in made.values(progress)]
    assert made.reach().settled < 0


async def test_an_archive_that_holds_nothing_is_nothing_to_compare_with(settings: Settings) -> None:
    made = Recomputation(settings, PipelineSettings(), "archive", [topics.BARS_1M], 0, MINUTE_NS)
    with Progress(disable=True) as progress, pytest.raises(TapedeckError, match="holds nothing of that time"):
        _ = [values async for values in made.values(progress)]
