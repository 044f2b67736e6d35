"""The journal: raw records on their way to Kafka, in segment files.

There is one path: the feed's side appends, the publisher reads in file order and acknowledges, and sealed
segments are deleted once acknowledged. Nothing is synced to disk: the page cache survives the death of the
process, not of the machine. Only whole records are read; a torn tail is cut off.
"""

import asyncio
import contextlib
import fcntl
import os
import struct
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from schemas.raw import RawRecord

log = structlog.get_logger()

SEGMENT_BYTES = 16 * 1024**2  # what a start may have to read again of what Kafka has already
ROUND_BYTES = 2 * 1024**2
ROUND_RECORDS = 2_000  # small ones need 20 times their size in memory, which never comes back
SUFFIX = ".segment"
_FRAME = struct.Struct(">II")  # length and crc32 of what follows

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RawRecord).decode


class JournalFull(Exception):
    """Nothing more can be appended: the size limit is reached, or the disk does not take it."""


class Place(NamedTuple):
    """A place between two records: the number of its segment, and the bytes before it in there."""

    segment: int
    offset: int


class _Segment:
    """One file; `size` is that of its whole records. Recovery found `records` of them, `last` is the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.size = self.records = 0
        self.last = b""

    def recover(self) -> bool:
        """Counts what a former process left; cuts off what is torn or damaged. Whether there was such."""
        length = os.fstat(self.file).st_size
        while (found := _read(self.file, self.size, length)) is not None:
            self.size += _FRAME.size + len(found)
            self.records += 1
            self.last = found
        if self.size == length:
            return False
        os.ftruncate(self.file, self.size)
        return True

    def append(self, data: bytes) -> None:
        """All or nothing; raises OSError."""
        written, view = 0, memoryview(data)
        try:
            while written < len(data):
                written += os.pwrite(self.file, view[written:], self.size + written)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file, self.size)
            raise
        self.size += len(data)

    def remove(self) -> None:
        os.close(self.file)
        self.path.unlink()


class Journal:
    """`append` never waits. Raises OSError when the folder cannot be used.

    `folder` holds one folder for each producer that may run at the same time; the first that is free is
    taken and locked. `name` is its own, and stable over restarts.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._segment_bytes = min(SEGMENT_BYTES, limit_bytes // 8)  # room comes back by whole segments
        self._folder, self._lock = _claim(folder)
        self.name = _name(self._folder)
        self._segments: dict[int, _Segment] = {}
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            segment = self._segments[int(path.stem)] = _Segment(path)
            if segment.recover():
                log.warning("the end of a journal's segment was torn and is cut off", path=str(path))
        if not self._segments:
            self._segments[1] = _Segment(self._path(1))
        self._last = max(self._segments)
        last = [segment.last for segment in self._segments.values() if segment.last]
        self.epoch = _decode(last[-1]).epoch if last else 0
        """Of the last record in here; 0: there has been none."""
        self._mark = self._read = Place(min(self._segments), 0)
        self._handed = 0  # records between the mark and what was read
        self._pending = sum(segment.records for segment in self._segments.values())
        self._set()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}{SUFFIX}"

    def __len__(self) -> int:
        """Records that are not acknowledged."""
        return self._pending

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments.values())

    def append(self, records: list[RawRecord]) -> None:
        """Raises JournalFull, and then has appended none of them."""
        if not records:
            return
        parts: list[bytes] = []
        for record in records:
            data = _encode(record)
            parts += (_FRAME.pack(len(data), zlib.crc32(data)), data)
        block = b"".join(parts)
        if not self._pending and self._segments[self._last].size >= self._segment_bytes:
            with contextlib.suppress(OSError):
                self._roll()
        if self.size + len(block) > self._limit:
            raise JournalFull(f"it has reached its limit of {self._limit:,} bytes (JOURNAL_MAX_BYTES)")
        try:
            if self._segments[self._last].size >= self._segment_bytes:
                self._extend()
            self._segments[self._last].append(block)
        except OSError as error:
            raise JournalFull(f"its disk does not take more: {error}") from error
        self._pending += len(records)
        self.epoch = records[-1].epoch
        self._set()

    def _extend(self) -> None:
        """One more segment, to which is appended from now on."""
        self._segments[self._last + 1] = _Segment(self._path(self._last + 1))
        self._last += 1

    def _roll(self) -> None:
        """All is acknowledged: begins anew, for room comes back by whole segments."""
        old = list(self._segments)
        self._extend()
        self._mark = self._read = Place(self._last, 0)
        for number in old:
            self._segments.pop(number).remove()

    async def next(self) -> list[RawRecord]:
        """The oldest records that were not handed out since the last `rewind`, at least one."""
        await self._filled.wait()
        return self.read()

    def read(self) -> list[RawRecord]:
        """The same without waiting: empty when there are none."""
        number, offset = self._read
        while offset >= self._segments[number].size and number < self._last:
            number, offset = number + 1, 0
        records: list[RawRecord] = []
        segment, begin = self._segments[number], offset
        while offset < segment.size and offset - begin < ROUND_BYTES and len(records) < ROUND_RECORDS:
            block = os.pread(segment.file, min(ROUND_BYTES, segment.size - offset), offset)
            at = 0
            while len(block) - at >= _FRAME.size and len(records) < ROUND_RECORDS:
                length, _ = _FRAME.unpack_from(block, at)
                end = at + _FRAME.size + length
                if end > len(block):
                    break
                records.append(_decode(memoryview(block)[at + _FRAME.size : end]))
                at = end
            if not at:  # one record that is longer than a round
                length, _ = _FRAME.unpack_from(block)
                data = os.pread(segment.file, length, offset + _FRAME.size)
                records.append(_decode(data))
                at = _FRAME.size + length
            offset += at
        self._read = Place(number, offset)
        self._handed += len(records)
        self._set()
        return records

    def acknowledge(self) -> None:
        """All that was handed out is safe in Kafka: segments that are behind it go."""
        for number in [n for n in self._segments if n < self._read.segment]:
            self._segments.pop(number).remove()
        self._pending -= self._handed
        self._handed = 0
        self._mark = self._read
        self._set()

    def rewind(self) -> None:
        """What was handed out and not acknowledged will be handed out again."""
        self._read, self._handed = self._mark, 0
        self._set()

    async def empty(self) -> None:
        """Waits until everything is acknowledged."""
        await self._emptied.wait()

    def set_aside(self) -> Path:
        """Another producer has gone on with the log: what is left is kept, but will never be published.
        Returns the folder where it is."""
        number = 1
        while (kept := self._folder / f"superseded-{number}").exists():
            number += 1
        kept.mkdir()
        for segment in self._segments.values():
            os.close(segment.file)
            segment.path.rename(kept / segment.path.name)
        self._segments.clear()
        self._extend()
        self._mark = self._read = Place(self._last, 0)
        self._pending = self._handed = 0
        self._set()
        return kept

    def close(self) -> None:
        """What is acknowledged need not be read by the next process."""
        for segment in self._segments.values():
            if self._pending:
                os.close(segment.file)
            else:
                segment.remove()
        os.close(self._lock)

    def _set(self) -> None:
        unread = self._read.offset < self._segments[self._read.segment].size or self._read.segment < self._last
        for event, holds in ((self._filled, unread), (self._emptied, not self._pending)):
            if holds:
                event.set()
            else:
                event.clear()


def _read(file: int, offset: int, length: int) -> bytes | None:
    """The whole, undamaged record at a place; None where there is none."""
    head = os.pread(file, _FRAME.size, offset)
    if len(head) < _FRAME.size:
        return None
    size, crc = _FRAME.unpack(head)
    if not size:  # zeros, where power was lost
        return None
    if offset + _FRAME.size + size > length:
        return None
    data = os.pread(file, size, offset + _FRAME.size)
    return data if len(data) == size and zlib.crc32(data) == crc else None


def _name(folder: Path) -> str:
    """What no other folder is called, on no machine, and this one after every restart."""
    path = folder / "name"
    if not path.exists() or not path.read_text():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def _claim(folder: Path) -> tuple[Path, int]:
    """The first folder in here that no other process has, and the descriptor that holds its lock."""
    number = 0
    while True:
        own = folder / str(number)
        own.mkdir(parents=True, exist_ok=True)
        lock = os.open(own / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            number += 1
        else:
            return own, lock
