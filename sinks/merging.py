"""Small files of the archive made one. Blocks: to be called in a thread."""

from collections import defaultdict
from collections.abc import Iterable

from tapedeck.archive import Archive
from tapedeck.spans import Span, merged, parts_of, redundant, runs_of

Hour = tuple[str, int, int]  # topic, partition, hour


def mergeable(spans: Iterable[Span]) -> set[Hour]:
    """The hours of partitions in which there is something to merge, or to throw away."""
    hours: dict[Hour, list[Span]] = defaultdict(list)
    for span in spans:
        hours[span.topic, span.partition, span.hour].append(span)
    return {hour for hour, files in hours.items() if runs_of(files) or redundant(files)}


def merge(archive: Archive, hour: Hour) -> None:
    """Makes one file of each run of files, then removes those it covers. Cut off anywhere, no record is missing: a file
    goes only once another has all that it had, and who reads by the names takes each record from one. Raises OSError,
    Damaged.
    """
    topic, partition, number = hour
    files = archive.hour(topic, number, partition)
    for run in runs_of(files):
        if merged(run) not in files:
            try:
                archive.put(merged(run), (rows for part in parts_of(run) for rows in archive.rows(part)))
            except FileNotFoundError:
                return  # somebody else merges it
            files.append(merged(run))
    for span in redundant(files):
        archive.remove(span)
