"""The tables that sinks write: what a topic's events become as rows. Pure.

A row travels as a line of COPY's text format, which costs a fifth of what binary rows of Python objects do; the
database reads the decimals from it, exact as they are. What our own encoder wrote is not even decoded: a pattern checks
it and takes its cells out, half the cost again. `insert` moves a staged batch into the table. Keys make a
repeated record a no-op; a bar is replaced only by a higher order.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from schemas import events, topics

#: Ends the `insert` of a table without a channel.
FIRST_STAYS = " ON CONFLICT DO NOTHING"


class Table(NamedTuple):
    """One destination: a consumer group of its own reads `topics` into `name`.

    `line` makes a row of a record's value, None of one that is no row (a marker); it raises ValueError and
    RecursionError. `selected` is what a staged row becomes in it: `time` and the columns. Where
    there is a `channel`, `insert` returns what its listeners are told of each row it changed.
    """

    sink: str
    name: str
    topics: tuple[topics.Topic, ...]
    columns: tuple[str, ...]
    line: Callable[[bytes], bytes | None]
    selected: str
    insert: str
    channel: str | None = None


_special = re.compile(r"[\\\t\n\r]").search
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _text(value: str) -> str:
    return value.translate(_ESCAPES) if _special(value) else value


def _array(values: list[Any]) -> str:
    return _array_of(tuple(values))


@lru_cache  # of conditions and flags there are only so many
def _array_of(values: tuple[Any, ...]) -> str:
    quoted = (str(value).replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return _text("{" + ",".join(f'"{value}"' for value in quoted) + "}")


_CELLS: dict[type, Callable[[Any], str]] = {
    str: _text,
    int: str,
    Decimal: str,
    float: repr,
    list: _array,
    type(None): lambda _: r"\N",
}


_ASCII = r"[ !#-\[\]-~]*+"  # nothing that JSON or COPY would escape
_INTEGER = r"-?(?:0|[1-9][0-9]*+)"
_NUMBER = _INTEGER + r"(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_CELL = {str: f'"({_ASCII})"', int: f"({_INTEGER})", Decimal: f"({_NUMBER})", float: f"({_NUMBER})"}
_ITEM = {str: f'"{_ASCII}"', int: _INTEGER}


def _written(kind: Any) -> str:
    """A pattern of what our encoder nearly always writes of a type, the cell a group."""
    if get_origin(kind) is Literal:
        return f'"({"|".join(get_args(kind))})"'
    if get_origin(kind) is UnionType:
        return f"(?:null|{_written(get_args(kind)[0])})"
    if get_origin(kind) is list:
        item = _ITEM[get_args(kind)[0]]
        return rf"\[((?:{item}(?:,{item})*+)?)\]"
    return _CELL[kind]


def _lines(event: type[msgspec.Struct], decode: Callable[[bytes], Any]) -> Callable[[bytes], bytes | None]:
    """A value of the form that our encoder gives it is a row as it stands; any other is decoded first."""
    config, kinds = event.__struct_config__, get_type_hints(event)
    fields = [(field.encode_name, kinds[field.name]) for field in msgspec.structs.fields(event)]
    tag = [f'"{config.tag_field}":"{config.tag}"'] if config.tag else []
    whole = ",".join(tag + [f'"{name}":{_written(kind)}' for name, kind in fields])
    match = re.compile(rf"\{{{whole}\}}".encode()).fullmatch
    row = "\t".join("{%b}" if get_origin(kind) is list else "%b" for _, kind in fields).encode() + b"\n"
    cells, astuple, markers = _CELLS, msgspec.structs.astuple, (events.MinuteClosed, events.MinuteEmpty)

    def line(value: bytes) -> bytes | None:
        if matched := match(value):
            return row % matched.groups(rb"\N")
        event = decode(value)
        if isinstance(event, markers):
            return None
        return ("\t".join([cells[type(cell)](cell) for cell in astuple(event)]) + "\n").encode()

    return line


def _columns(event: type[msgspec.Struct]) -> tuple[str, ...]:
    return tuple(field.encode_name for field in msgspec.structs.fields(event))


def _quoted(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _selected(event: type[msgspec.Struct], time: str) -> tuple[str, str]:
    """The columns of a table and where they come from. `time` is the field that becomes the timestamp: whole
    microseconds, which is all PostgreSQL can hold, rounded down."""
    columns = _quoted(_columns(event))
    return f"time, {columns}", f"'epoch'::timestamptz + \"{time}\" / 1000 * INTERVAL '1 microsecond' AS time, {columns}"


def _kept(
    sink: str,
    name: str,
    topic: topics.Topic,
    event: type[msgspec.Struct],
    decode: Callable[[bytes], Any],
    time: str,
    channel: str | None = None,
    told: Sequence[str] = (),
) -> Table:
    """The first of each key stays."""
    columns, selected = _selected(event, time)
    insert = f"INSERT INTO {name} ({columns}) SELECT {selected} FROM staged{FIRST_STAYS}{_returning(told)}"
    return Table(sink, name, (topic,), _columns(event), _lines(event, decode), selected, insert, channel)


def _returning(told: Sequence[str]) -> str:
    """What is told of a row, as JSON."""
    pairs = ", ".join(f"'{name}', \"{name}\"" for name in told)
    return f" RETURNING json_build_object({pairs})::text" if told else ""


def _bars() -> Table:
    """The highest order of each key stays, and the history keeps them all. DISTINCT, for a statement may touch a row
    only once."""
    name = "crypto_aggregates"
    columns, selected = _selected(events.Bar, "start")
    updates = ", ".join(f'"{column}" = excluded."{column}"' for column in _columns(events.Bar))
    insert = (
        f"WITH every AS (INSERT INTO crypto_aggregates_history ({columns}) "
        f"SELECT {selected} FROM staged ON CONFLICT DO NOTHING) "
        f"INSERT INTO {name} ({columns}) "
        f"SELECT DISTINCT ON (symbol, interval, start) {selected} FROM staged "
        "ORDER BY symbol, interval, start, repair DESC, revision DESC "
        f"ON CONFLICT (symbol, interval, time) DO UPDATE SET {updates} "
        f"WHERE (excluded.repair, excluded.revision) > ({name}.repair, {name}.revision)"
    )
    told = _returning(("symbol", "interval", "start", "repair", "revision"))
    read = (topics.BARS_1M, *topics.ROLLUPS.values())
    line = _lines(events.Bar, events.decode_bar)
    return Table("bars", name, read, _columns(events.Bar), line, selected, insert + told, "tapedeck_bars")


TRADES = _kept("trades", "crypto_trades", topics.TRADES, events.Trade, events.decode_trade, "ts_event")
QUOTES = _kept("quotes", "crypto_quotes", topics.QUOTES, events.Quote, events.decode_quote, "ts_event")
VENDOR_BARS = _kept("bars", "vendor_bars", topics.VENDOR_BARS, events.VendorBar, events.decode_vendor_bar, "start")
BARS = _bars()
ANOMALIES = _kept(
    "audit",
    "anomalies",
    topics.ANOMALIES,
    events.Anomaly,
    events.decode_anomaly,
    "ts_event",
    "tapedeck_anomalies",
    ("id", "kind", "severity", "symbol", "ts_event"),
)
GAPS = _kept("audit", "gaps", topics.GAPS, events.Gap, events.decode_gap, "to")
DEAD_LETTERS = _kept(
    "audit", "dead_letters", topics.DEAD_LETTERS, events.DeadLetter, events.decode_dead_letter, "ts_recv"
)
QUARANTINE = _kept("audit", "quarantine", topics.QUARANTINE, events.Quarantined, events.decode_quarantined, "ts_recv")

ALL = (TRADES, QUOTES, VENDOR_BARS, BARS, ANOMALIES, GAPS, DEAD_LETTERS, QUARANTINE)


_BY_TOPIC = {topic.name: table for table in ALL for topic in table.topics}


def copied(topic: str, values: Iterable[bytes]) -> bytes:
    """The rows of a topic's values, as COPY wants them. Raises as `line` does."""
    line = _BY_TOPIC[topic].line
    return b"".join([row for value in values if (row := line(value)) is not None])
