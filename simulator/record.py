"""The feed's own record of what it sent: a frames file with two more keys a line.

`{"recv_ns": …, "clock_ns": …, "clients": …, "frame": […]}`: when it was sent (wall clock, ns), the market's
time then (ns), and how many clients it was sent to. A line is with the operating system before its frame is.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

from simulator.frame import Frame


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8, which a WebSocket text message must be."""
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def record_line(frame: Frame, recv_ns: int, clients: int) -> bytes:
    """The line of a frame, newline included; in base64 unless it is a JSON array of events on one line."""
    head = b'{"recv_ns":%d,"clock_ns":%d,"clients":%d,' % (recv_ns, frame.clock_ns, clients)
    data = frame.data
    if frame.events and b"\n" not in data and b"\r" not in data and is_text(data):
        return b'%b"frame":%b}\n' % (head, data)
    return b'%b"base64":"%b"}\n' % (head, base64.b64encode(data))


class Recorder:
    """Appends lines to a file; raises OSError if it cannot."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, lines: Iterable[bytes]) -> None:
        """Returns when the operating system has the lines; they survive the death of this process."""
        self._file.write(b"".join(lines))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
