"""The archive's files by their names: which offsets each holds, and what is to be read, merged or thrown away.

`topic=raw.crypto.v1/date=2024-08-09/hour=03/5-000000000100-000000000200.parquet` holds the records of partition 5
from offset 100 to before 200; the timestamps of all of them lie in that hour of UTC. A file is never changed. The
files of a partition may overlap for a while, when two sinks took each other for dead or a merge was cut short: an
offset holds the same record in whichever file, so it is read from any one.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

HOUR_MS = 3_600_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_HOUR = (datetime(9999, 12, 31, 23, tzinfo=UTC) - _EPOCH) // timedelta(hours=1)
_PATH = re.compile(
    r"topic=(?P<topic>[^/]+)/date=(?P<date>\d{4}-\d\d-\d\d)/hour=(?P<hour>\d\d)/"
    r"(?P<partition>\d+)-(?P<begin>\d+)-(?P<end>\d+)\.parquet"
)


class Span(NamedTuple):
    """A file. `hour` counts from the epoch."""

    begin: int
    end: int
    hour: int
    topic: str
    partition: int

    @property
    def folder(self) -> str:
        """Below the archive's root."""
        return folder_of(self.topic, self.hour)

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.partition}-{self.begin:012}-{self.end:012}.parquet"

    def covers(self, other: "Span") -> bool:
        """Whether it holds all that another one holds, and more."""
        larger = self.end - self.begin > other.end - other.begin
        return larger and self.begin <= other.begin and other.end <= self.end

    def overlaps(self, other: "Span") -> bool:
        return self.begin < other.end and other.begin < self.end


class Part(NamedTuple):
    """What is to be read of a file: the offsets from `first` to before `end`."""

    span: Span
    first: int
    end: int


def hour_of(timestamp_ms: int) -> int:
    """The hour that a record is filed under: times that have no date of four digits are at either end."""
    return max(0, min(timestamp_ms // HOUR_MS, _LAST_HOUR))


def folder_of(topic: str, hour: int) -> str:
    at = _EPOCH + timedelta(hours=hour)
    return f"topic={topic}/date={at:%Y-%m-%d}/hour={at:%H}"


def span_of(path: str) -> Span | None:
    """The file of this path below the archive's root; None for what is none of the archive's."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    begin, end = int(found["begin"]), int(found["end"])
    try:
        at = datetime.fromisoformat(f"{found['date']}T{found['hour']}:00+00:00")
    except ValueError:
        return None
    if begin >= end:
        return None
    return Span(begin, end, (at - _EPOCH) // timedelta(hours=1), found["topic"], int(found["partition"]))


def parts_of(spans: Iterable[Span]) -> list[Part]:
    """Each offset that the files of a partition hold, once, in order."""
    parts: list[Part] = []
    position = 0
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        if span.end > position:
            parts.append(Part(span, max(position, span.begin), span.end))
            position = span.end
    return parts


def holes_in(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """Stretches of offsets between the parts of a partition that no file holds."""
    return [(before.end, after.first) for before, after in pairwise(parts) if before.end < after.first]


def redundant(spans: Iterable[Span]) -> list[Span]:
    """The files that another one covers. Whoever else removes files by this rule at the same time, what remains
    holds every offset: the largest is never removed."""
    left: list[Span] = []
    gone: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        covered = any(other.covers(span) for other in reversed(left))
        (gone if covered else left).append(span)
    return gone


def runs_of(spans: Iterable[Span]) -> list[list[Span]]:
    """The files of a partition and hour that are better one file: each run without a hole, of more than one."""
    runs: list[list[Span]] = []
    for part in parts_of(spans):
        last = runs[-1][-1] if runs else None
        if last is not None and last.hour == part.span.hour and last.end >= part.first:
            runs[-1].append(part.span)
        else:
            runs.append([part.span])
    return [run for run in runs if len(run) > 1]


def merged(run: list[Span]) -> Span:
    """The file that a run becomes."""
    return run[0]._replace(begin=min(span.begin for span in run), end=max(span.end for span in run))
