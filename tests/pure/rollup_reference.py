"""Rollups the slow way: at each marker every range is made anew from the whole log, in fractions.

Written from docs/bars.md and not from processors/rollups.py, to be compared with it.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from .reference import decoded, twelve_digits

MINUTE_NS = 60_000_000_000
HOUR_NS, DAY_NS = 60 * MINUTE_NS, 1440 * MINUTE_NS
LENGTHS_NS = {"5m": 5, "15m": 15, "30m": 30, "1h": 60, "4h": 240, "1d": 1440}
ORDER = ["partial", "gap", "late", "repaired"]


class Noted(NamedTuple):
    since: int
    to: int
    pairs: frozenset[str]
    start: bool
    empty: bool

    @property
    def stretch(self) -> object:
        return self.since, self.to, self.pairs


class RollupReference:
    """`emitted` grows by what each record brings. Understands only records that are sound."""

    def __init__(self, cut: bool = False) -> None:
        self.cut = cut
        self.newest: dict[tuple[str, int], dict[str, Any]] = {}
        self.gaps: set[Noted] = set()
        self.clock = 0
        self.first: int | None = None
        self.marker = 0
        self.before: dict[tuple[str, int, str], object] = {}  # what each range was made of at the last marker

    def seen(self, timestamp_ms: int) -> None:
        """A record, whatever it is."""
        if self.first is None:
            self.first = timestamp_ms * 1_000_000

    def take(self, timestamp_ms: int, value: bytes) -> list[dict[str, Any]]:
        """The bars that a record brings, by interval, start and symbol."""
        record = decoded(value)
        self.clock = max(self.clock, timestamp_ms * 1_000_000)
        self.seen(timestamp_ms)
        if record["kind"] != "minute_closed":
            key = record["symbol"], record["start"]
            if key not in self.newest or order(record) > order(self.newest[key]):
                self.newest[key] = record
            return []
        for gap in record["missed"]:
            start, empty = gap["reason"] == "start", gap["reason"] == "empty"
            self.gaps.add(Noted(gap["from"] or 0, gap["to"], frozenset(gap["pairs"]), start, empty))
        oldest = (self.clock - 3 * DAY_NS - HOUR_NS) // HOUR_NS * HOUR_NS
        if record["end"] <= max(self.marker, oldest):
            return []
        self.marker = record["end"]
        oldest = max(oldest, self.marker - 3 * DAY_NS, (self.first or 0) + HOUR_NS if self.cut else 0)
        now, bars = {}, []
        for interval, minutes in LENGTHS_NS.items():
            length = minutes * MINUTE_NS
            ranges = {(start // length * length, symbol) for symbol, start in self.newest}
            for start, symbol in sorted(ranges):
                if start < oldest or start + length > self.marker:
                    continue
                records = [self.newest.get((symbol, m)) for m in range(start, start + length, MINUTE_NS)]
                gaps = [g for g in self.gaps if touches(g, start, start + length, symbol)]
                now[interval, start, symbol] = made_of = ([r and order(r) for r in records], set(gaps))
                bar = self.bar(interval, start, length, symbol, records, gaps)
                if bar is not None and self.before.get((interval, start, symbol)) != made_of:
                    bars.append({**bar, "fingerprint": record["fingerprint"]})
        self.before = now
        return bars

    @staticmethod
    def bar(
        interval: str, start: int, length: int, symbol: str, records: Sequence[dict[str, Any] | None], gaps: list[Noted]
    ) -> dict[str, Any] | None:
        bars = [record for record in records if record is not None and record["kind"] == "bar"]
        if not bars:
            return None
        flags = {flag for bar in bars for flag in bar["flags"]}
        missing_ns = 0
        empty = [gap.stretch for gap in gaps if gap.empty]
        missed = [gap for gap in gaps if gap.stretch not in empty]
        for minute, record in enumerate(records):
            begin = start + minute * MINUTE_NS
            if record is None:
                touching = [g for g in missed if touches(g, begin, begin + MINUTE_NS, symbol)]
                flags |= {"partial"} if touching else set()
                flags |= {"gap"} if any(not g.start for g in touching) else set()
                missing_ns += covered(touching, begin)
            elif record["kind"] == "bar":
                missing_ns += record["missing_ns"]
            else:
                flags.add("repaired")

        def total(name: str) -> Any:
            return sum(Fraction(bar[name]) for bar in bars)

        return {
            "symbol": symbol,
            "interval": interval,
            "start": start,
            "end": start + length,
            "open": bars[0]["open"],
            "high": max(bar["high"] for bar in bars),
            "low": min(bar["low"] for bar in bars),
            "close": bars[-1]["close"],
            "volume": total("volume"),
            "notional": total("notional"),
            "vwap": twelve_digits(total("notional") / total("volume")),
            "trade_count": total("trade_count"),
            "buy_volume": total("buy_volume"),
            "sell_volume": total("sell_volume"),
            "status": "final",
            "repair": sum(order(record)[0] for record in records if record),
            "revision": sum(order(record)[1] + 1 for record in records if record) + len(gaps),
            "flags": sorted(flags, key=ORDER.index),
            "missing_ns": missing_ns,
            "quality": round(1 - Fraction(missing_ns, length), 4),
            "source": "aggregates" if any(bar["source"] == "aggregates" for bar in bars) else "trades",
            "kind": "bar",
        }


def order(record: dict[str, Any]) -> tuple[int, int]:
    return record["repair"], record.get("revision", 0)


def touches(gap: Noted, begin: int, end: int, symbol: str) -> bool:
    return gap.since < end and begin <= gap.to and not gap.pairs.isdisjoint({"*", symbol})


def covered(gaps: list[Noted], begin: int) -> int:
    """How much of the minute is in any of the gaps, ns."""
    inside = [(max(begin, g.since), min(begin + MINUTE_NS, g.to)) for g in gaps]
    edges = sorted({edge for stretch in inside for edge in stretch})
    return sum(b - a for a, b in zip(edges, edges[1:], strict=False) if any(s <= a and b <= e for s, e in inside))
