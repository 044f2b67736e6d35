"""Our events: typed, immutable, one name for each thing in topics, tables and DataFrames.

Times are integer nanoseconds since the epoch, UTC. Decimals are JSON numbers in plain notation, exact.
(epoch, partition, n) is the identity of the raw event that an event was made from.
"""

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Literal

import msgspec

from schemas.numbers import plain_json

Side = Literal["buy", "sell", "unknown"]
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
MINUTE_NS = 60 * NS_PER_S


class Trade(msgspec.Struct, frozen=True, gc=False):
    """One trade. Key: (symbol, exchange, trade_id). `flags`: `late` (its minute was closed, the bar is
    revised), `too_late` (past the lateness horizon, no live bar has it) or `repaired` (it came over REST; then
    its `epoch` is the repair number, negative, and `n` its place in the group)."""

    symbol: str
    ts_event: int
    ts_recv: int
    ts_vendor: int | None
    price: Decimal
    size: Decimal
    side: Side
    exchange: int
    trade_id: str
    conditions: list[int]
    flags: list[str]
    epoch: int
    partition: int
    n: int


class Quote(msgspec.Struct, frozen=True, gc=False):
    """Best bid and ask. Key: its identity, for equal quotes in one millisecond are all real."""

    symbol: str
    ts_event: int
    ts_recv: int
    bid_price: Decimal
    bid_size: Decimal | None
    ask_price: Decimal
    ask_size: Decimal | None
    exchange: int | None
    epoch: int
    partition: int
    n: int


class VendorBar(msgspec.Struct, frozen=True):
    """The vendor's own aggregate of [start, end), each message of it: the last one wins."""

    symbol: str
    interval: str
    start: int
    end: int
    ts_recv: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    vwap: Decimal | None
    epoch: int
    partition: int
    n: int


INTERVALS_NS = {
    "1m": MINUTE_NS,
    "5m": 5 * MINUTE_NS,
    "15m": 15 * MINUTE_NS,
    "30m": 30 * MINUTE_NS,
    "1h": 60 * MINUTE_NS,
    "4h": 240 * MINUTE_NS,
    "1d": 1440 * MINUTE_NS,
}


class Bar(msgspec.Struct, frozen=True, tag_field="kind", tag="bar"):
    """OHLCV of [start, end) from trades; the highest (repair, revision) is the one to keep.

    `notional` is the exact sum of price x size (the volume in quote currency) and vwap = notional / volume,
    half-even to 12 significant digits. `flags`: `partial` (trades may be missing: the recording began, broke or
    ended inside), `gap` (a marked gap lies in it), `late` (late trades were folded in), `repaired` (it, or a
    minute in it, was made from REST). `missing_ns` is how much of the bar marked gaps cover and
    quality = 1 - missing_ns / (end - start), to four digits. A `forming` bar is what is known of a minute still open.
    """

    symbol: str
    interval: str
    start: int
    end: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    vwap: Decimal
    notional: Decimal
    trade_count: int
    buy_volume: Decimal
    sell_volume: Decimal
    status: Literal["forming", "final"]
    repair: int
    revision: int
    flags: list[str]
    missing_ns: int
    quality: Decimal
    source: Literal["trades", "aggregates"]
    fingerprint: str


class Missed(msgspec.Struct, frozen=True):
    """A gap in trades, as the bars of a partition know it; the fields are those of Gap."""

    from_: int | None = msgspec.field(name="from")
    to: int
    pairs: list[str]
    reason: str


class MinuteClosed(msgspec.Struct, frozen=True, tag_field="kind", tag="minute_closed"):
    """In band with the bars of a partition: every minute that ends at or before `end` is closed there. `missed`:
    the gaps in trades noted since the marker before, so that a minute that was empty is told from one missed."""

    partition: int
    end: int
    missed: list[Missed]
    fingerprint: str


class MinuteEmpty(msgspec.Struct, frozen=True, tag_field="kind", tag="minute_empty"):
    """In band with the bars of a partition: REST says that a symbol's minute had no trades. Ordered with the
    bars of that minute by (repair, 0)."""

    symbol: str
    start: int
    end: int
    repair: int
    fingerprint: str


#: The reason of a gap that closes another.
NOTHING_MISSED = "empty"


class Gap(msgspec.Struct, frozen=True):
    """A stretch of feed time, both ends included, in which events may have been missed.

    `from` is null for the time before the recording began; `pairs` may be `["*"]`. `reason`: start, away,
    stop, reconnect, stall (a stream was silent far beyond its habit), silence (a shorter one that ended by
    itself: perhaps nothing was missed), journal (the producer's was full), hole (the producer's own sends failed
    and it never came back to them), log (records were deleted before a worker had read them).
    """

    from_: int | None = msgspec.field(name="from")
    to: int
    streams: list[str]
    pairs: list[str]
    reason: str
    epoch: int
    partition: int
    n: int


def still_open(gaps: Iterable[Gap]) -> list[Gap]:
    """Those in which something may have been missed: without the closed ones, and what closed them."""

    def stretch(gap: Gap) -> object:
        return gap.partition, gap.from_, gap.to, gap.streams, gap.pairs

    gaps = list(gaps)
    closed = [stretch(gap) for gap in gaps if gap.reason == NOTHING_MISSED]
    return [gap for gap in gaps if stretch(gap) not in closed]


class DeadLetter(msgspec.Struct, frozen=True):
    """Bytes that could not be normalised, whole. `encoding` says how they stand in `payload`."""

    reason: str
    ts_recv: int
    encoding: Literal["utf-8", "base64"]
    payload: str
    epoch: int
    partition: int
    n: int


class Quarantined(msgspec.Struct, frozen=True):
    """An event from too far in the future to be believed: `ahead_ns` past the last tick."""

    symbol: str
    ts_event: int
    ts_recv: int
    ahead_ns: int
    encoding: Literal["utf-8", "base64"]
    payload: str
    epoch: int
    partition: int
    n: int


Severity = Literal["info", "warning", "critical"]


class Anomaly(msgspec.Struct, frozen=True):
    """Something worth a look, found by the detector `kind`; docs/anomalies.md defines each. Key: `id`.

    `detected` is the tick at which it was found, `ts_event` the time of what it is about. `value` is what was
    measured, `expected` what it was compared with, `score` how far they lie apart in the detector's own unit,
    `threshold` from where on that is an anomaly; floats, for they judge and do not record. Refers to an event
    by (epoch, partition, n) or to a bar by (symbol, interval, start, repair, revision); the others are null.
    """

    id: str
    kind: str
    severity: Severity
    symbol: str | None
    ts_event: int
    detected: int
    value: float | None
    expected: float | None
    score: float | None
    threshold: float | None
    detail: str
    epoch: int | None
    partition: int
    n: int | None
    interval: str | None
    start: int | None
    repair: int | None
    revision: int | None
    fingerprint: str


#: The JSON of an event whose decimals are ready-made (numbers.Number.json).
encode_ready = msgspec.json.Encoder(decimal_format="number").encode
_scientific = re.compile(rb"[0-9]E-").search


def encode(event: msgspec.Struct) -> bytes:
    """The one JSON form of an event; decimals must be canonical.

    msgspec writes str() of a decimal, which is scientific below 1e-6: those few are written anew.
    """
    value = encode_ready(event)
    if b"E-" not in value or not _scientific(value):
        return value
    tiny: dict[str, Any] = {
        name: plain_json(number)
        for name, number in msgspec.structs.asdict(event).items()
        if isinstance(number, Decimal) and number.adjusted() < -6
    }
    return encode_ready(msgspec.structs.replace(event, **tiny))


decode_trade = msgspec.json.Decoder(Trade).decode
decode_quote = msgspec.json.Decoder(Quote).decode
decode_vendor_bar = msgspec.json.Decoder(VendorBar).decode
decode_bar = msgspec.json.Decoder(Bar | MinuteClosed | MinuteEmpty).decode
decode_gap = msgspec.json.Decoder(Gap).decode
decode_dead_letter = msgspec.json.Decoder(DeadLetter).decode
decode_quarantined = msgspec.json.Decoder(Quarantined).decode
decode_anomaly = msgspec.json.Decoder(Anomaly).decode
