"""A record of the raw topic: what Polygon sent, byte for byte, and in band the time and what was missed.

Kinds: `slice` (JSON array of the very bytes of each event), `tick` (the feed clock reached a new second),
`gap` (a stretch that may have been missed, a tick as well), `bad` (bytes that are not JSON, whole).
"""

import base64
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import orjson

Runs = list[tuple[int, int]]

# Where a record comes from, header `src`, beside `ws` for the vendor's WebSocket: a replay, and the first record of a
# partition's replay that began in the middle of the log.
REPLAY, REPLAY_BEGINS = "replay", "replay-begins"


class RawRecord(NamedTuple):
    """One raw record. `n` numbers its first event within (epoch, partition); `recv` holds runs of
    (receive time in ns, number of events), one per frame; `timestamp_ms` is the feed clock."""

    partition: int
    timestamp_ms: int
    kind: str
    epoch: int
    n: int
    recv: Runs
    value: bytes
    src: str = "ws"

    @property
    def events(self) -> int:
        """How many numbers the record uses up."""
        return sum([count for _, count in self.recv])

    def headers(self) -> list[tuple[str, bytes]]:
        return [
            ("kind", self.kind.encode()),
            ("epoch", b"%d" % self.epoch),
            ("n", b"%d" % self.n),
            ("recv", orjson.dumps(self.recv)),
            ("src", self.src.encode()),
        ]


class TickValue(msgspec.Struct, frozen=True, omit_defaults=True):
    """`fresh`: the streams that have delivered within their usual interval. `silent`: those that may have been missed
    since they were last heard, and when that was (ns): their silence is unusual, or will be before the next tick
    unless they come again meanwhile. `*` there is any other, where nothing at all is heard that can be judged."""

    fresh: list[str]
    silent: dict[str, int] = {}


class GapValue(msgspec.Struct, frozen=True):
    """As events.Gap, but `to` is null while the gap is still open (reason `stop`)."""

    from_: int | None = msgspec.field(name="from")
    to: int | None
    streams: list[str]
    pairs: list[str]
    reason: str


class Foreign(NamedTuple):
    """A record of the raw topic that no producer of ours wrote, and why it is none; its place is its identity."""

    partition: int
    timestamp_ms: int
    offset: int
    value: bytes
    reason: str


LARGEST = 2**62  # of epochs, numbers and times: what is larger is nobody's, and would stand for ever
MAX_EVENTS = 100_000  # far more than any slice has


class NotARawRecord(ValueError):
    """Headers or value are not what the raw topic's contract says."""


_decode_runs = msgspec.json.Decoder(Runs).decode
decode_tick_value = msgspec.json.Decoder(TickValue).decode
decode_gap_value = msgspec.json.Decoder(GapValue).decode


def from_kafka(
    partition: int, timestamp_ms: int, headers: Iterable[tuple[str, bytes]], value: bytes | None
) -> RawRecord:
    """Reads a Kafka record back; raises NotARawRecord."""
    found = dict(headers)
    try:
        runs = _decode_runs(found["recv"])
        epoch, n = int(found["epoch"]), int(found["n"])
        counts = [count for _, count in runs]
        if not runs or min(counts) <= 0 or sum(counts) > MAX_EVENTS:
            raise ValueError(f"recv counts no events, or too many: {runs[:3]}")
        if not (0 <= epoch < LARGEST and 0 <= n < LARGEST and min(runs)[0] >= 0 and max(runs)[0] < LARGEST):
            raise ValueError("epoch, n or recv is out of bounds")
        return RawRecord(
            partition,
            timestamp_ms,
            found["kind"].decode(),
            epoch,
            n,
            runs,
            value or b"",
            found["src"].decode(),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise NotARawRecord(f"not a record of the raw topic: {error!r}") from error


class LogLine(msgspec.Struct, frozen=True):
    """A raw record as `tapedeck log` dumps it, one JSON object a line."""

    partition: int
    offset: int
    timestamp: int
    headers: list[tuple[str, str]]
    value: str
    encoding: Literal["utf-8", "base64"]


SHORT = 4096  # below this, escapes may make text as long as they like


def text_of(data: bytes) -> tuple[Literal["utf-8", "base64"], str]:
    """(encoding, text) that carries any bytes in JSON, and never much larger than base64 would."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "base64", base64.b64encode(data).decode()
    if "\0" in text:  # which no column of text can hold
        return "base64", base64.b64encode(data).decode()
    if len(text) > SHORT and len(msgspec.json.encode(text)) > len(data) * 4 / 3:
        return "base64", base64.b64encode(data).decode()
    return "utf-8", text


def bytes_of(encoding: str, text: str) -> bytes:
    """The inverse of `text_of`."""
    return base64.b64decode(text) if encoding == "base64" else text.encode()


def log_line(
    partition: int, offset: int, timestamp_ms: int, headers: Iterable[tuple[str, bytes]], value: bytes | None
) -> bytes:
    """One line of a log file, newline included."""
    encoding, text = text_of(value or b"")
    named = [(name, data.decode("latin-1")) for name, data in headers]
    return msgspec.json.encode(LogLine(partition, offset, timestamp_ms, named, text, encoding)) + b"\n"


def read_log(lines: Iterable[bytes]) -> Iterator[tuple[LogLine, RawRecord | Foreign]]:
    """The records of a log file in its order; raises NotARawRecord with the number of a line that is of no log."""
    decode: Any = msgspec.json.Decoder(LogLine).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry: LogLine = decode(line)
            headers = [(name, data.encode("latin-1")) for name, data in entry.headers]
            value = bytes_of(entry.encoding, entry.value)
        except (msgspec.MsgspecError, ValueError) as error:
            raise NotARawRecord(f"line {number}: {error}") from error
        yield entry, record_of(entry.partition, entry.timestamp, headers, value, entry.offset)


def record_of(
    partition: int, timestamp_ms: int, headers: Iterable[tuple[str, bytes]], value: bytes | None, offset: int
) -> RawRecord | Foreign:
    """A Kafka record of the raw topic, whatever it is."""
    try:
        return from_kafka(partition, timestamp_ms, headers, value)
    except NotARawRecord as error:
        return Foreign(partition, timestamp_ms, offset, value or b"", str(error))
