"""The feed's own record of what it published: a frames file with more keys a line, and beside it its faults.

`{"recv_ns": …, "clock_ns": …, "clients": …, "frame": […]}`: when it was sent (wall clock, ns), the market's
time then (ns), and how many clients each event of the line was handed to, 0 for what a fault withheld or
nobody was there for. `fault` and `label` follow `clients` where a fault made, changed or repeated the frame.
A line is with the operating system before its frame is.

The faults file has a line as each fault begins and one as it ends:
`{"event": "begin", "wall_ns": …, "clock_ns": …, "label": "stall-1", "kind": "stall", …}`.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

import msgspec

from simulator.faults import Incident
from simulator.frame import Frame


def faults_path(record: Path) -> Path:
    """Where the faults of a record are: RECORD.faults.ndjson."""
    return record.with_name(f"{record.name}.faults.ndjson")


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8, which a WebSocket text message must be."""
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def record_line(frame: Frame, recv_ns: int, clients: int, incident: Incident | None = None) -> bytes:
    """The line of a frame, newline included; in base64 unless it is a JSON array of events on one line."""
    head = b'{"recv_ns":%d,"clock_ns":%d,"clients":%d,' % (recv_ns, frame.clock_ns, clients)
    if incident is not None:
        head += b'"fault":"%b","label":%b,' % (incident.fault.kind.encode(), msgspec.json.encode(incident.label))
    data = frame.data
    if frame.events and b"\n" not in data and b"\r" not in data and is_text(data):
        return b'%b"frame":%b}\n' % (head, data)
    return b'%b"base64":"%b"}\n' % (head, base64.b64encode(data))


def fault_line(event: str, incident: Incident, wall_ns: int, clock_ns: int) -> bytes:
    """The line of a fault's begin or end, newline included."""
    times = {"event": event, "wall_ns": wall_ns, "clock_ns": clock_ns, "label": incident.label}
    return msgspec.json.encode(times | _asked(incident)) + b"\n"


def _asked(incident: Incident) -> dict[str, object]:
    asked: dict[str, object] = msgspec.to_builtins(incident.fault)
    asked.pop("label", None)
    return asked


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
