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
    """One destination: a consumer group of its own reads `topic` into `name`."""

    sink: str
    name: str
    topic: topics.Topic
    columns: Sequence[str]
    rows: Callable[[Sequence[bytes]], list[tuple[Any, ...]]]
    insert: str


def timestamp(ns: int) -> datetime:
    """ns since the epoch as PostgreSQL can hold it: whole microseconds, rounded down."""
    return _EPOCH + timedelta(microseconds=ns // 1000)


def _columns(event: type[msgspec.Struct]) -> tuple[str, ...]:
    return ("time", *event.__struct_fields__)


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


def _kept(sink: str, name: str, topic: topics.Topic, event: type[msgspec.Struct], rows: Any) -> Table:
    """The first of each key stays."""
    columns = _columns(event)
    insert = f"INSERT INTO {name} ({_quoted(columns)}) SELECT {_quoted(columns)} FROM staged ON CONFLICT DO NOTHING"
    return Table(sink, name, topic, columns, rows, insert)


def _replaced(sink: str, name: str, topic: topics.Topic, event: type[msgspec.Struct], rows: Any) -> Table:
    """The highest order of each key stays. DISTINCT, for a statement may touch a row only once."""
    columns = _columns(event)
    updates = ", ".join(f'"{column}" = excluded."{column}"' for column in columns)
    insert = (
        f"INSERT INTO {name} ({_quoted(columns)}) "
        f"SELECT DISTINCT ON (symbol, interval, time) {_quoted(columns)} FROM staged "
        "ORDER BY symbol, interval, time, repair DESC, revision DESC "
        f"ON CONFLICT (symbol, interval, time) DO UPDATE SET {updates} "
        f"WHERE (excluded.repair, excluded.revision) > ({name}.repair, {name}.revision)"
    )
    return Table(sink, name, topic, columns, rows, insert)


TRADES = _kept("trades", "crypto_trades", topics.TRADES, events.Trade, _rows(events.decode_trade, "ts_event"))
QUOTES = _kept("quotes", "crypto_quotes", topics.QUOTES, events.Quote, _rows(events.decode_quote, "ts_event"))
VENDOR_BARS = _kept(
    "bars", "vendor_bars", topics.VENDOR_BARS, events.VendorBar, _rows(events.decode_vendor_bar, "start")
)
BARS = _replaced("bars", "crypto_aggregates", topics.BARS_1M, events.Bar, _rows(events.decode_bar, "start"))

ALL = (TRADES, QUOTES, VENDOR_BARS, BARS)
