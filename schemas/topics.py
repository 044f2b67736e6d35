"""The topic registry: the one place that says which topics there are and what is in them.

Topics are created and checked from it, and docs/asyncapi.json is generated from it. Every topic with records
has the same number of partitions, for an output goes to the partition number of its raw record. Changing that
number changes every identity: it takes a new topic version filled by replay.
"""

from typing import NamedTuple

import msgspec

from schemas import events, raw

PARTITIONS = 8
GIB = 1024**3


class Topic(NamedTuple):
    """A topic. `retention_bytes` is per partition; none deletes by age, for records carry the feed's time
    and a recording from 2024 would be gone within minutes. `values`: what a record's value may be."""

    name: str
    key: str
    values: tuple[type[msgspec.Struct], ...]
    doc: str
    retention_bytes: int = 16 * GIB
    max_message_bytes: int = 1024**2
    partitions: int = PARTITIONS

    def config(self) -> dict[str, str]:
        """The settings a broker must hold for it."""
        return {
            "cleanup.policy": "delete",
            "retention.ms": "-1",
            "retention.bytes": str(self.retention_bytes),
            "max.message.bytes": str(self.max_message_bytes),
            "message.timestamp.type": "CreateTime",
        }


# The largest frame taken from the vendor; one that cannot be parsed travels whole, in base64 at worst.
MAX_FRAME_BYTES = 16 * 1024**2
MAX_RECORD_BYTES = 24 * 1024**2

RAW = Topic(
    "raw.crypto.v1",
    "none",
    (raw.TickValue, raw.GapValue),
    "What Polygon sent, byte for byte, with ticks and gaps in band. A slice is a JSON array of Polygon's own "
    "messages; headers kind, recv, src, epoch and n say what a record is.",
    retention_bytes=64 * GIB,
    max_message_bytes=MAX_RECORD_BYTES,
)
RAW_REST = Topic(
    "raw.rest.v1",
    "none",
    (),
    "What Polygon's REST said of the trades of a whole (pair, minute), byte for byte: a JSON array of its results, in "
    "parts; header repair names number, pair, minute, part and parts.",
    max_message_bytes=MAX_RECORD_BYTES,
)
TRADES = Topic("trades.v1", "symbol", (events.Trade,), "Every valid trade, normalised, once.")
QUOTES = Topic("quotes.v1", "symbol", (events.Quote,), "Every valid quote, normalised.")
VENDOR_BARS = Topic("bars.vendor.v1", "symbol", (events.VendorBar,), "Every aggregate message of the vendor.")
BARS_1M = Topic(
    "bars.1m.v1",
    "symbol; none on minute_closed",
    (events.Bar, events.MinuteClosed, events.MinuteEmpty),
    "One-minute bars from trades, again with a higher revision when late trades or gaps touch them or with a higher "
    "repair when they were made anew from REST, and a marker when a minute is closed on the partition.",
)
ROLLUPS = {
    interval: Topic(
        f"bars.{interval}.v1",
        "symbol",
        (events.Bar,),
        f"Bars of {interval} from those of 1m, again with a higher order when one of these changes.",
    )
    for interval in events.INTERVALS_NS
    if interval != "1m"
}
FORMING = Topic(
    "bars.forming.v1",
    "symbol",
    (events.Bar,),
    "The open minute of each symbol that had a trade since the last tick, as it stands.",
    retention_bytes=GIB,
)
ANOMALIES = Topic("anomalies.v1", "symbol", (events.Anomaly,), "What the detectors found, by event or bar.")
GAPS = Topic("gaps.v1", "none", (events.Gap,), "Stretches in which events may have been missed.")
DEAD_LETTERS = Topic(
    "deadletters.v1",
    "none",
    (events.DeadLetter,),
    "Bytes that could not be normalised, whole, with the reason.",
    max_message_bytes=MAX_RECORD_BYTES,
)
QUARANTINE = Topic(
    "quarantine.v1",
    "symbol",
    (events.Quarantined,),
    "Events from too far in the future to be believed.",
    max_message_bytes=MAX_RECORD_BYTES,
)
LEASE = Topic(
    "lease.producer.v1",
    "none",
    (),
    "Who is assigned its one partition in the producers' group is the one that records; each claims its epoch here.",
    partitions=1,
)

ALL = (
    RAW,
    RAW_REST,
    TRADES,
    QUOTES,
    VENDOR_BARS,
    BARS_1M,
    *ROLLUPS.values(),
    FORMING,
    ANOMALIES,
    GAPS,
    DEAD_LETTERS,
    QUARANTINE,
    LEASE,
)

#: What all else can be made from again.
ARCHIVED = (RAW, RAW_REST)
