"""The tables that sinks write: what a topic's events become as rows. Pure.

`insert` moves a staged batch into the table; it says how many rows it changed. Keys make a repeated record
a no-op; a bar is replaced only by a higher order.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
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


def _trades(values: Sequence[bytes]) -> list[tuple[Any, ...]]:
    trades = map(events.decode_trade, values)
    return [(timestamp(t.ts_event), *msgspec.structs.astuple(t)) for t in trades]


def _quotes(values: Sequence[bytes]) -> list[tuple[Any, ...]]:
    quotes = map(events.decode_quote, values)
    return [(timestamp(q.ts_event), *msgspec.structs.astuple(q)) for q in quotes]


def _vendor_bars(values: Sequence[bytes]) -> list[tuple[Any, ...]]:
    bars = map(events.decode_vendor_bar, values)
    return [(timestamp(b.start), *msgspec.structs.astuple(b)) for b in bars]


def _bars(values: Sequence[bytes]) -> list[tuple[Any, ...]]:
    """The highest order of each bar in the batch: a statement may touch a row only once. No markers."""
    best: dict[tuple[str, str, int], events.Bar] = {}
    for bar in map(events.decode_bar, values):
        if isinstance(bar, events.Bar):
            key = (bar.symbol, bar.interval, bar.start)
            held = best.get(key)
            if held is None or (bar.repair, bar.revision) >= (held.repair, held.revision):
                best[key] = bar
    return [(timestamp(b.start), *msgspec.structs.astuple(b)) for b in best.values()]


def _keyed(sink: str, name: str, topic: topics.Topic, event: type[msgspec.Struct], rows: Any) -> Table:
    columns = _columns(event)
    insert = (
        f"INSERT INTO {name} ({_quoted(columns)}) SELECT {_quoted(columns)} FROM staged ON CONFLICT DO NOTHING"
    )
    return Table(sink, name, topic, columns, rows, insert)


def _replaced(name: str, topic: topics.Topic) -> Table:
    columns = _columns(events.Bar)
    updates = ", ".join(f'"{column}" = excluded."{column}"' for column in columns)
    insert = (
        f"INSERT INTO {name} ({_quoted(columns)}) SELECT {_quoted(columns)} FROM staged "
        f"ON CONFLICT (symbol, interval, time) DO UPDATE SET {updates} "
        f"WHERE (excluded.repair, excluded.revision) > ({name}.repair, {name}.revision)"
    )
    return Table("bars", name, topic, columns, _bars, insert)


TRADES = _keyed("trades", "crypto_trades", topics.TRADES, events.Trade, _trades)
QUOTES = _keyed("quotes", "crypto_quotes", topics.QUOTES, events.Quote, _quotes)
VENDOR_BARS = _keyed("bars", "vendor_bars", topics.VENDOR_BARS, events.VendorBar, _vendor_bars)
BARS = _replaced("crypto_aggregates", topics.BARS_1M)

ALL = (TRADES, QUOTES, VENDOR_BARS, BARS)
