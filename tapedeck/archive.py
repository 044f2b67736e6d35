"""The archive: raw topics as Parquet files, in a folder or an object store (docs/archive.md).

Everything here blocks: call it in a thread.
"""

import contextlib
import os
import re
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from tapedeck.errors import TapedeckError, UsageError
from tapedeck.history import Entry
from tapedeck.settings import Settings
from tapedeck.spans import Part, Span, folder_of, span_of

# Names and types as any reader sees them; `topic`, `date` and `hour` come from the path.
SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("timestamp", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("headers", pa.map_(pa.string(), pa.binary())),
        pa.field("value", pa.binary()),
    ]
)
READ_BYTES = 512 * 1024  # at once, uncompressed, by the average of a row group
GROUP_BYTES = 8 * 1024**2  # of a row group, uncompressed: a reader of one record reads it whole
ABANDONED_S = 24 * 3600  # files written aside that are older than this are nobody's any more
_ASIDE = re.compile(r"topic=[^/]+/date=[^/]+/hour=\d\d/\.[0-9a-f]{32}\.tmp")


class Damaged(TapedeckError):
    """A file of the archive cannot be read for what is in it."""


class Archive:
    """The files below ARCHIVE_URL. Methods raise OSError."""

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError when there is no archive, or its address is none."""
        if not settings.archive_url:
            raise UsageError("there is no archive: set ARCHIVE_URL to a folder, or to s3://bucket/path")
        self._files, self._root = _filesystem(settings.archive_url.get_secret_value())
        self._local = self._files.type_name == "local"

    def spans(self, topic: str) -> list[Span]:
        """All files of a topic."""
        return [span for span, _ in self._list(f"topic={topic}")]

    def hour(self, topic: str, hour: int, partition: int) -> list[Span]:
        """The files of a partition that lie in one hour."""
        return [span for span, _ in self._list(folder_of(topic, hour)) if span.partition == partition]

    def sizes(self, topic: str) -> dict[Span, int]:
        """All files of a topic and their bytes."""
        return dict(self._list(f"topic={topic}"))

    def _list(self, folder: str) -> Iterator[tuple[Span, int]]:
        where = fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True, recursive=True)
        for info in self._files.get_file_info(where):
            span = span_of(info.path[len(self._root) + 1 :]) if info.is_file else None
            if span is not None:
                yield span, info.size

    # -- reading -----------------------------------------------------------------------------------

    def rows(self, part: Part, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of a part, a few at a time, with all columns or these, of which `offset` must be one. Raises
        FileNotFoundError when a merge has taken the file away, and Damaged."""
        path = f"{self._root}/{part.span.path}"
        try:
            with self._files.open_input_file(path) as file:
                yield from _rows(pq.ParquetFile(file, page_checksum_verification=True), part, columns)
        except pa.ArrowException as error:
            raise Damaged(f"{path} of the archive is damaged, restore or remove it: {error}") from error
        except FileNotFoundError:
            raise
        except OSError as error:  # what cannot be decompressed is one as well, and does not say which file it is
            raise OSError(f"{path}: {error}") from error

    def entries(self, part: Part) -> Iterator[list[Entry]]:
        """The records of a part, as `rows` gives them."""
        return map(entries_of, self.rows(part))

    # -- writing -----------------------------------------------------------------------------------

    def put(self, span: Span, tables: Iterable[pa.Table | pa.RecordBatch]) -> int:
        """Writes a file, whole or not at all, and returns its bytes. Again is harmless. In an object store too it is
        written aside: an upload that is interrupted is closed by pyarrow, and stands there as if it were whole."""
        folder = f"{self._root}/{span.folder}"
        final = f"{self._root}/{span.path}"
        self._files.create_dir(folder)
        aside = f"{folder}/.{uuid.uuid4().hex}.tmp"
        try:
            with self._files.open_output_stream(aside) as out:
                size = _write(out, tables)
            if self._local:
                _sync(aside)
            self._files.move(aside, final)
            if self._local:
                _sync(folder)
        except BaseException:
            if self._files.get_file_info(aside).is_file:
                self._files.delete_file(aside)
            raise
        return size

    def remove(self, span: Span) -> None:
        """Somebody else may have been faster."""
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_file(f"{self._root}/{span.path}")

    def sweep(self, now_s: float) -> None:
        """Throws away what was written aside and left, by whom a crash ended."""
        for info in self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True, recursive=True)):
            ours = info.is_file and _ASIDE.fullmatch(info.path[len(self._root) + 1 :])
            if ours and info.mtime.timestamp() < now_s - ABANDONED_S:
                self._files.delete_file(info.path)


def tables_of(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    """Records as tables, each large enough for a row group."""
    held: list[Entry] = []
    size = 0
    for entry in entries:
        held.append(entry)
        size += len(entry.value or b"")
        if size >= GROUP_BYTES:
            yield table_of(held)
            held, size = [], 0
    if held:
        yield table_of(held)


def table_of(entries: Sequence[Entry]) -> pa.Table:
    partitions, offsets, timestamps, keys, headers, values = zip(*entries, strict=True)
    columns = [partitions, offsets, timestamps, keys, headers, values]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def entries_of(batch: pa.RecordBatch) -> list[Entry]:
    partitions, offsets, timestamps, keys, headers, values = batch.columns
    columns = [partitions, offsets, timestamps.cast(pa.int64()), keys, headers, values]
    return list(map(Entry, *(column.to_pylist() for column in columns)))


def _rows(parquet: pq.ParquetFile, part: Part, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    place = parquet.schema_arrow.get_field_index("offset")
    # One group at a time, for a batch goes beyond the end of one, and records may be large.
    for group in range(parquet.num_row_groups):
        found = parquet.metadata.row_group(group)
        if not _overlaps(found.column(place).statistics, part):
            continue
        rows = max(1, READ_BYTES * found.num_rows // found.total_byte_size)
        # What a thread for each column gains is less than what it costs to wake them.
        for batch in parquet.iter_batches(rows, [group], columns=columns, use_threads=False):
            offsets = batch.column("offset").to_pylist()
            first, end = bisect_left(offsets, part.first), bisect_left(offsets, part.end)
            if first < end:
                yield batch.slice(first, end - first)


def _overlaps(statistics: Any, part: Part) -> bool:
    return bool(statistics.min < part.end and part.first <= statistics.max)


def _write(out: pa.NativeFile, tables: Iterable[pa.Table | pa.RecordBatch]) -> int:
    """The bytes of a Parquet file with these rows, in row groups of moderate size; returns their number."""
    held: list[pa.Table] = []
    repeating = ["partition", "headers.key_value.key"]
    with pq.ParquetWriter(
        out, SCHEMA, compression="zstd", use_dictionary=repeating, write_page_checksum=True
    ) as writer:
        for table in tables:
            if isinstance(table, pa.RecordBatch):
                table = pa.Table.from_batches([table])
            held.append(table)
            if sum(each.nbytes for each in held) >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(held))
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held))
    size: int = out.tell()
    return size


def _sync(path: str) -> None:
    """A name says what a file holds, so it must not be there before the bytes are, whatever the machine does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _filesystem(url: str) -> tuple[fs.FileSystem, str]:
    if "://" not in url:
        try:
            return fs.LocalFileSystem(), str(Path(url).expanduser().absolute())
        except RuntimeError as error:  # nobody's home
            raise UsageError(f"ARCHIVE_URL is no folder: {error}") from None
    try:
        files, root = fs.FileSystem.from_uri(url)
        root = re.sub("/+", "/", root).rstrip("/")  # there are no empty names
        if not root:
            raise ValueError
    # Without their words: they have the address in them, which may have a key in it.
    except (ValueError, pa.ArrowException) as error:
        raise UsageError(
            f"ARCHIVE_URL is no address that pyarrow can open ({type(error).__name__}): "
            "give a folder, or s3://bucket/path"
        ) from None
    except OSError:  # S3 is asked for the bucket's region, where the address does not have it
        raise TapedeckError(
            "ARCHIVE_URL names a storage that does not answer, or a bucket that is not there: try again, or see to "
            "network, name and credentials"
        ) from None
    return files, root
