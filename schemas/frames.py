"""A frames file: NDJSON, plain or .gz, one line a WebSocket frame as it was received.

`{"recv_ns": 1723161255000000000, "frame": [{"ev":"XT", …}, …]}`; a frame that is no JSON array (or has line
breaks in it) stands in base64 instead: `{"recv_ns": …, "base64": "…"}`.
"""

import base64
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import msgspec

from schemas import wire


class Frame(NamedTuple):
    """The bytes of one WebSocket message and when they were received (ns)."""

    recv_ns: int
    data: bytes


class _Line(msgspec.Struct):
    recv_ns: int
    frame: msgspec.Raw = msgspec.Raw()
    base64: str | None = None


class NotAFramesFile(ValueError):
    """A line is not of the form above."""


def open_lines(path: Path) -> IO[bytes]:
    """A plain or gzipped file, for reading lines of bytes."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a file in its order; raises NotAFramesFile with the line's number, OSError."""
    decode = msgspec.json.Decoder(_Line).decode
    with open_lines(path) as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = decode(text)
                data = bytes(line.frame)
                if not data:
                    if line.base64 is None:
                        raise ValueError("has neither frame nor base64")
                    data = base64.b64decode(line.base64, validate=True)
            except (*wire.DECODE_ERRORS, ValueError) as error:
                raise NotAFramesFile(f"{path}, line {number}: {error}") from error
            yield Frame(line.recv_ns, data)


def frame_line(frame: Frame) -> bytes:
    """One line of a frames file, newline included."""
    try:
        wire.split_array(frame.data)
        if b"\n" in frame.data or b"\r" in frame.data:
            raise ValueError
        frame.data.decode()
    except (*wire.DECODE_ERRORS, ValueError):
        return b'{"recv_ns":%d,"base64":"%s"}\n' % (frame.recv_ns, base64.b64encode(frame.data))
    return b'{"recv_ns":%d,"frame":%s}\n' % (frame.recv_ns, frame.data)
