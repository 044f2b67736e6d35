"""The screen of `tapedeck status`. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tapedeck.status import Archived, Newest, Status, Tables, Topic

SHOWN = 20  # symbols


def screen(status: Status) -> RenderableType:
    """All that is known, and what could not be asked."""
    parts: list[RenderableType] = []
    if status.topics is not None:
        parts.append(_topics(status.topics) if status.topics else Text("no topics yet: start any process of the line"))
    if status.tables is not None:
        parts += _tables(status.tables)
    elif not any(name.startswith("PostgreSQL") for name in status.trouble):
        parts.append(Text("no tables yet: start a sink, it makes them"))
    if status.archive is not None:
        parts.append(_archive(status.archive))
    parts += [Text(f"{name} cannot be asked: {why}", style="bold red") for name, why in status.trouble.items()]
    return Group(*parts)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    return table


def _topics(topics: list[Topic]) -> Table:
    table = _table("topics", "topic", "records", "on disk", "records behind, by group")
    for topic in topics:
        lag = ", ".join(f"{group} {count:,}" for group, count in topic.lag.items())
        table.add_row(topic.name, f"{topic.records:,}", _bytes(topic.bytes), lag)
    return table


def _tables(tables: Tables) -> list[RenderableType]:
    """Newest events, what is missing or odd, sizes."""
    sizes = _table("tables", "table", "rows, about", "on disk")
    for size in tables.sizes:
        sizes.add_row(size.table, f"{size.rows:,}", _bytes(size.bytes))
    gaps = _table("newest open gaps", "reason", "from", "to", "streams", "pairs", left=5)
    for gap in tables.recent_gaps:
        gaps.add_row(gap.reason, _time(gap.since_ns), _time(gap.until_ns), " ".join(gap.streams), " ".join(gap.pairs))
    return [
        _newest(tables.newest),
        gaps,
        Text(f"open gaps: {_counts(tables.gaps)}"),
        Text(f"1m bars of the last day with a gap, not repaired: {tables.minutes_with_gap:,}"),
        Text(f"kept aside: {_counts(tables.kept_aside)}"),
        Text(f"anomalies of the last day: {_counts(tables.anomalies)}"),
        sizes,
    ]


def _newest(newest: list[Newest]) -> Table:
    """A row a symbol, a column a table."""
    names = list(dict.fromkeys(row.table for row in newest))
    by_symbol: dict[str, dict[str, Newest]] = {}
    for row in newest:
        by_symbol.setdefault(row.symbol, {})[row.table] = row
    # Those that trade most recently come first, where there are more than a screen holds.
    youngest = {symbol: min(row.age_s for row in rows.values()) for symbol, rows in by_symbol.items()}
    shown = sorted(sorted(by_symbol, key=youngest.__getitem__)[:SHOWN])
    more = len(by_symbol) - len(shown)
    title = f"age of the newest rows{f' ({more} more symbols: --json)' if more else ''}"
    table = _table(title, "symbol", *names, "newest, UTC")
    for symbol in shown:
        rows = by_symbol[symbol]
        ages = (_age(rows[name].age_s) if name in rows else "" for name in names)
        table.add_row(symbol, *ages, _time(max(row.time_ns for row in rows.values())))
    return table


def _archive(archived: list[Archived]) -> Table:
    table = _table("archive", "topic", "files", "size")
    for topic in archived:
        table.add_row(topic.topic, f"{topic.files:,}", _bytes(topic.bytes))
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _time(ns: int | None) -> str:
    return "the beginning" if ns is None else f"{datetime.fromtimestamp(ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}"


def _age(age_s: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= 2 * length:
            return f"{age_s / length:.0f} {unit}"
    return f"{age_s:.0f} s"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
