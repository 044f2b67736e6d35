"""The differences between tables and log, for people and for programs. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table

from sinks.mend import LEFT_ALONE, TARGETS, WRONG, Difference

MEANING = {
    "missing": "the log makes them, the table lacks them",
    "extra": "the table has them, the log does not make them",
    "changed": "the log makes them with other values",
    "foreign": "made by another pipeline (version or settings): left alone",
    "beyond": "older or newer than the log that was read: left alone",
}
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode  # numbers to the last digit


def line(difference: Difference) -> bytes:
    """One line of NDJSON: table, kind, the row as it stands and as it is due."""
    standing, due = (None if row is None else msgspec.Raw(row.encode()) for row in difference[2:])
    found = {"table": difference.table, "difference": difference.kind, "standing": standing, "due": due}
    return msgspec.json.encode(found) + b"\n"


def screen(counts: Mapping[tuple[str, str], int], listed: Iterable[Difference]) -> RenderableType:
    """How many of each kind, and those that are listed."""
    totals = Table(title="differences between tables and log", title_justify="left")
    for name in ("table", *WRONG, *LEFT_ALONE):
        totals.add_column(name, justify="left" if name == "table" else "right")
    for name in dict.fromkeys(name for name, _ in counts):
        totals.add_row(name, *(f"{counts.get((name, kind), 0):,}" for kind in (*WRONG, *LEFT_ALONE)))
    rows = Table(title="the first of them", title_justify="left")
    for name in ("table", "difference", "row", "stands -> is due"):
        rows.add_column(name)
    for difference in listed:
        rows.add_row(difference.table, difference.kind, *_texts(difference))
    said = [f"{kind}: {MEANING[kind]}" for kind in dict.fromkeys(kind for _, kind in counts)]
    return Group(totals, rows, *said) if rows.row_count else Group(totals, *said)


def _texts(difference: Difference) -> tuple[str, str]:
    """Its key, and the columns that differ."""
    keys = next(t.keys for targets in TARGETS.values() for t in targets if t.name == difference.table)
    standing, due = (None if row is None else _decode(row) for row in difference[2:])
    key = " ".join(_text((due or standing or {})[name]) for name in keys)
    if standing is None or due is None:
        return key, ""
    return key, ", ".join(
        f"{name} {_text(standing[name])} -> {_text(due[name])}" for name in due if standing[name] != due[name]
    )


def _text(value: Any) -> str:
    return bytes(value).decode().strip('"')
