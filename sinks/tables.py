"""The tables that sinks write: what a topic's events become as rows. Pure.

`insert` moves a staged batch into the table; it says how many rows it changed. Keys make a repeated record
a no-op; a bar is replaced only by a higher order.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from schemas import events, topics

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Table(NamedTuple):
    """One destination: a consumer group of its own reads `topics` into `name`."""

    sink: str
    name: str
    topics: tuple[topics.Topic, ...]
    columns: Sequence[str]
    rows: Callable[[Sequence[bytes]], list[tuple[Any, ...]]]
    insert: str


def timestamp(ns: int) -> datetime:
    """ns since the epoch as PostgreSQL can hold it: whole microseconds, rounded down."""
    return _EPOCH + timedelta(microseconds=ns // 1000)


def _columns(event: type[msgspec.Struct]) -> tuple[str, ...]:
    return ("time", *(field.encode_name for field in msgspec.structs.fields(event)))


def _quoted(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _rows(decode: Callable[[bytes], Any], time: str) -> Callable[[Sequence[bytes]], list[tuple[Any, ...]]]:
    """`time` is the field that becomes the timestamp. Markers are no rows."""
    ns = attrgetter(time)

    def rows(values: Sequence[bytes]) -> list[tuple[Any, ...]]:
        return [
            (timestamp(ns(event)), *msgspec.structs.astuple(event))
            for event in map(decode, values)
            if not isinstance(event, events.MinuteClosed | events.MinuteEmpty)
        ]

    return rows


def _kept(
    sink: str, name: str, topic: topics.Topic, event: type[msgspec.Struct], decode: Callable[[bytes], Any], time: str
) -> Table:
    """The first of each key stays."""
    columns = _columns(event)
    insert = f"INSERT INTO {name} ({_quoted(columns)}) SELECT {_quoted(columns)} FROM staged ON CONFLICT DO NOTHING"
    return Table(sink, name, (topic,), columns, _rows(decode, time), insert)


def _bars() -> Table:
    """The highest order of each key stays, and the history keeps them all. DISTINCT, for a statement may touch a row
    only once."""
    name, columns = "crypto_aggregates", _columns(events.Bar)
    updates = ", ".join(f'"{column}" = excluded."{column}"' for column in columns)
    insert = (
        f"WITH every AS (INSERT INTO crypto_aggregates_history ({_quoted(columns)}) "
        f"SELECT {_quoted(columns)} FROM staged ON CONFLICT DO NOTHING) "
        f"INSERT INTO {name} ({_quoted(columns)}) "
        f"SELECT DISTINCT ON (symbol, interval, time) {_quoted(columns)} FROM staged "
        "ORDER BY symbol, interval, time, repair DESC, revision DESC "
        f"ON CONFLICT (symbol, interval, time) DO UPDATE SET {updates} "
        f"WHERE (excluded.repair, excluded.revision) > ({name}.repair, {name}.revision)"
    )
    read = (topics.BARS_1M, *topics.ROLLUPS.values())
    return Table("bars", name, read, columns, _rows(events.decode_bar, "start"), insert)


TRADES = _kept("trades", "crypto_trades", topics.TRADES, events.Trade, events.decode_trade, "ts_event")
QUOTES = _kept("quotes", "crypto_quotes", topics.QUOTES, events.Quote, events.decode_quote, "ts_event")
VENDOR_BARS = _kept("bars", "vendor_bars", topics.VENDOR_BARS, events.VendorBar, events.decode_vendor_bar, "start")
BARS = _bars()
ANOMALIES = _kept("audit", "anomalies", topics.ANOMALIES, events.Anomaly, events.decode_anomaly, "ts_event")
GAPS = _kept("audit", "gaps", topics.GAPS, events.Gap, events.decode_gap, "to")
DEAD_LETTERS = _kept(
    "audit", "dead_letters", topics.DEAD_LETTERS, events.DeadLetter, events.decode_dead_letter, "ts_recv"
)
QUARANTINE = _kept("audit", "quarantine", topics.QUARANTINE, events.Quarantined, events.decode_quarantined, "ts_recv")

ALL = (TRADES, QUOTES, VENDOR_BARS, BARS, ANOMALIES, GAPS, DEAD_LETTERS, QUARANTINE)
