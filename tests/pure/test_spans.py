"""The archive's files by their names: whatever overlaps and whatever was cut short, each offset is read once."""

from collections.abc import Iterable, Iterator

from hypothesis import given
from hypothesis import strategies as st

from tapedeck.spans import Part, Span, folder_of, holes_in, merged, parts_of, redundant, runs_of, span_of

HOUR = 478_000


def span(begin: int, end: int, hour: int = HOUR) -> Span:
    return Span(begin, end, hour, "raw.crypto.v1", 3)


# An offset lies in one hour, whichever file it is in: here those below 20, from 20 to 30, and from 30 on.
BORDERS = (0, 20, 30, 50)


@st.composite
def archives(draw: st.DrawFn) -> set[Span]:
    """Files of any extent, none across an hour's border."""
    files = set()
    for _ in range(draw(st.integers(0, 8))):
        hour = draw(st.integers(0, 2))
        begin = draw(st.integers(BORDERS[hour], BORDERS[hour + 1] - 1))
        files.add(span(begin, draw(st.integers(begin + 1, BORDERS[hour + 1])), HOUR + hour % 2))
    return files


def offsets(spans: Iterable[Span]) -> set[int]:
    return {offset for each in spans for offset in range(each.begin, each.end)}


def of_hour(files: Iterable[Span], hour: int) -> list[Span]:
    return [each for each in files if each.hour == hour]


def merging(files: set[Span], hour: int) -> Iterator[None]:
    """What sinks.merging does, a step at a time, with what it saw at its beginning."""
    seen = of_hour(files, hour)
    for run in runs_of(seen):
        yield
        assert offsets([merged(run)]) == offsets(run)
        files.add(merged(run))
        seen.append(merged(run))
    for each in redundant(seen):
        yield
        files.discard(each)


@given(archives())
def test_each_offset_is_read_once_and_in_order(files: set[Span]) -> None:
    parts = parts_of(files)
    read = [offset for part in parts for offset in range(part.first, part.end)]
    assert read == sorted(offsets(files))
    assert all(part.span.begin <= part.first < part.end == part.span.end for part in parts)
    missing = {offset for first, end in holes_in(parts) for offset in range(first, end)}
    assert missing == set(range(read[0], read[-1] + 1)) - set(read) if read else not missing


@given(archives(), st.lists(st.integers(0, 3), max_size=40))
def test_merges_side_by_side_and_cut_short_lose_nothing(files: set[Span], turns: list[int]) -> None:
    whole = offsets(files)
    merges = [merging(files, HOUR + number % 2) for number in range(4)]
    for turn in turns:
        next(merges[turn], None)
        assert offsets(files) == whole
    for number in range(2):
        for _ in merging(files, HOUR + number):
            pass
        assert offsets(files) == whole
        left = of_hour(files, HOUR + number)
        assert not redundant(left)
        assert not runs_of(left)


def test_names() -> None:
    files = [span(100, 200), span(0, 5_000_000_000_000, 0)]
    assert files[0].path == "topic=raw.crypto.v1/date=2024-07-12/hour=16/3-000000000100-000000000200.parquet"
    assert [span_of(each.path) for each in files] == files
    folder = folder_of("raw.crypto.v1", HOUR)
    for name in (".0123.tmp", "3-5-5.parquet", "3-5.parquet", "x.parquet"):
        assert span_of(f"{folder}/{name}") is None
    assert span_of("topic=t/date=2024-13-01/hour=00/0-0-1.parquet") is None


def test_two_that_took_each_other_for_dead() -> None:
    files = [span(100, 250), span(100, 200), span(200, 300)]
    assert parts_of(files) == [Part(files[0], 100, 250), Part(files[2], 250, 300)]
    assert redundant(files) == [files[1]]
