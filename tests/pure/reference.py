"""Bars the slow way: everything is kept, nothing is summed before it is asked for, numbers are fractions.

Written from docs/design.md and not from processors/operators/bars.py, to be compared with it.
"""

import json
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from processors.settings import PipelineSettings
from schemas.raw import RawRecord

MINUTE_NS = 60_000_000_000
MS = 1_000_000


class Seen(NamedTuple):
    """A trade that counts, in the order of the log; `late`: its minute was closed when it came."""

    ts: int
    epoch: int
    n: int
    price: Fraction
    size: Fraction
    side: str
    late: bool


class Noted(NamedTuple):
    """A gap, and the last tick before it."""

    since: int | None
    to: int
    reason: str
    before: int
    streams: list[str]
    pairs: list[str]


class Reference:
    """All bars of one partition. Understands only the valid trades, quotes, ticks and gaps of the tests."""

    def __init__(self, settings: PipelineSettings) -> None:
        self.settings = settings
        self.tick: int | None = None
        self.trades: dict[tuple[int, str], list[Seen]] = {}
        self.gaps: list[Noted] = []
        self.ids: set[tuple[str, int, str, int]] = set()
        self.emitted: dict[tuple[int, str], tuple[int, int]] = {}  # what the last version was made of
        self.bars: list[dict[str, Any]] = []
        self.forming: list[dict[str, Any]] = []
        self.told: dict[tuple[int, str], tuple[int, int]] = {}  # the same of the last forming bar

    def take(self, records: Iterable[RawRecord]) -> "Reference":
        for record in records:
            at = record.timestamp_ms * MS
            if self.tick is None:
                self.tick = at // (1_000 * MS) * (1_000 * MS)
            if record.kind == "slice":
                for n, event in enumerate(json.loads(record.value, parse_float=Decimal), record.n):
                    if event["ev"] == "XT":
                        self._trade(event, record.epoch, n)
            elif record.kind == "gap":
                gap = json.loads(record.value)
                to = at if gap["to"] is None else min(at, gap["to"])
                since = None if gap["from"] is None else min(to, gap["from"])
                noted = Noted(since, to, gap["reason"], self.tick, gap["streams"], gap["pairs"])
                self.gaps.append(noted)
                self._tick(at)
            elif record.kind == "tick":
                self._tick(at)
        return self

    def _trade(self, event: dict[str, Any], epoch: int, n: int) -> None:
        assert self.tick is not None
        ts, symbol = event["t"] * MS, event["pair"]
        start = ts - ts % MINUTE_NS
        name = (symbol, event["x"], str(event["i"]), start)
        if ts > self.tick + self.settings.ahead_ns or ts < self.tick - self.settings.lateness_ns:
            return
        if name in self.ids:
            return
        self.ids.add(name)
        conditions = event["c"] or []
        side = {(True, False): "buy", (False, True): "sell"}.get((2 in conditions, 1 in conditions), "unknown")
        late = self._closed(start, self.tick)
        seen = Seen(ts, epoch, n, Fraction(event["p"]), Fraction(event["s"]), side, late)
        self.trades.setdefault((start, symbol), []).append(seen)

    def _closed(self, start: int, tick: int) -> bool:
        return tick >= start + MINUTE_NS + self.settings.grace_ns

    def _touching(self, start: int, symbol: str) -> list[Noted]:
        return [
            gap
            for gap in self.gaps
            if "XT" in gap.streams
            and ("*" in gap.pairs or symbol in gap.pairs)
            and gap.to >= start
            and (gap.since is None or gap.since < start + MINUTE_NS)
        ]

    def _revision(self, start: int, symbol: str) -> int:
        """Late trades, and gaps that touched the minute when it was closed and not yet forgotten."""
        late = sum(seen.late for seen in self.trades[start, symbol])
        touched = sum(
            self._closed(start, gap.before) and start + MINUTE_NS > gap.before - self.settings.lateness_ns
            for gap in self._touching(start, symbol)
        )
        return late + touched

    def _tick(self, tick: int) -> None:
        assert self.tick is not None
        for start, symbol in sorted(self.trades):
            forgotten = start + MINUTE_NS <= self.tick - self.settings.lateness_ns and (start, symbol) in self.emitted
            if self._closed(start, tick) and not forgotten:
                self._emit(start, symbol)
            made_of = len(self.trades[start, symbol]), len(self._touching(start, symbol))
            if not self._closed(start, tick) and self.told.get((start, symbol), (0, made_of[1])) != made_of:
                self.forming.append(self._bar(start, symbol, None) | {"status": "forming"})
            self.told[start, symbol] = made_of
        self.tick = tick

    def _emit(self, start: int, symbol: str, cut: int | None = None) -> None:
        made_of = (len(self.trades[start, symbol]), self._revision(start, symbol))
        if self.emitted.get((start, symbol)) != made_of:
            self.emitted[start, symbol] = made_of
            self.bars.append(self._bar(start, symbol, cut))

    def close(self) -> "Reference":
        """As if the recording ended at the last tick."""
        assert self.tick is not None
        for start, symbol in sorted(self.trades):
            forgotten = start + MINUTE_NS <= self.tick - self.settings.lateness_ns
            if not self._closed(start, self.tick):
                self._emit(start, symbol, max(start, self.tick))
            elif not forgotten:
                self._emit(start, symbol)
        return self

    def _bar(self, start: int, symbol: str, cut: int | None) -> dict[str, Any]:
        trades = sorted(self.trades[start, symbol], key=lambda seen: seen[:3])
        noted = self._touching(start, symbol)
        empty = [(word.since, word.to, word.pairs) for word in noted if word.reason == "empty"]
        gaps = [gap for gap in noted if (gap.since, gap.to, gap.pairs) not in empty]
        end = start + MINUTE_NS
        missing = [(start if gap.since is None else max(start, gap.since), min(end, gap.to)) for gap in gaps]
        missing += [] if cut is None else [(cut, end)]
        edges = sorted({edge for stretch in missing for edge in stretch})
        missing_ns = sum(
            b - a for a, b in zip(edges, edges[1:], strict=False) if any(s <= a and b <= e for s, e in missing)
        )
        volume = sum((seen.size for seen in trades), Fraction(0))
        flags = {
            "partial": bool(missing),
            "gap": any(gap.reason != "start" for gap in gaps),
            "late": any(seen.late for seen in trades),
        }
        return {
            "symbol": symbol,
            "interval": "1m",
            "start": start,
            "end": end,
            "open": trades[0].price,
            "high": max(seen.price for seen in trades),
            "low": min(seen.price for seen in trades),
            "close": trades[-1].price,
            "volume": volume,
            "notional": sum((seen.price * seen.size for seen in trades), Fraction(0)),
            "vwap": twelve_digits(sum((seen.price * seen.size for seen in trades), Fraction(0)) / volume),
            "trade_count": len(trades),
            "buy_volume": sum(seen.size for seen in trades if seen.side == "buy"),
            "sell_volume": sum(seen.size for seen in trades if seen.side == "sell"),
            "status": "final",
            "repair": 0,
            "revision": self._revision(start, symbol),
            "flags": [flag for flag, holds in flags.items() if holds],
            "missing_ns": missing_ns,
            "quality": round(1 - Fraction(missing_ns, MINUTE_NS), 4),
            "source": "trades",
            "fingerprint": self.settings.fingerprint(),
            "kind": "bar",
        }


def twelve_digits(number: Fraction) -> Fraction:
    """Rounded half-even to 12 significant digits."""
    exponent = 0
    while number >= Fraction(10) ** (exponent + 1):
        exponent += 1
    while number < Fraction(10) ** exponent:
        exponent -= 1
    unit = Fraction(10) ** (exponent - 11)
    return round(number / unit) * unit


def decoded(value: bytes) -> dict[str, Any]:
    """A bar as it was published, its numbers as fractions."""
    return json.loads(value, parse_float=Fraction)  # type: ignore[no-any-return]


def highest(bars: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """The one to keep of each (symbol, start)."""
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for bar in bars:
        key = bar["symbol"], bar["start"]
        if key not in kept or bar["revision"] > kept[key]["revision"]:
            kept[key] = bar
    return kept
