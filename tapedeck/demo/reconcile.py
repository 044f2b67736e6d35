"""The accounting: what the feed says it sent against what the tables hold. Pure, and independent.

Nothing of the pipeline is used: bars are recomputed here from the feed's own record. Each copy of an event
that was sent falls in the first term that fits: stored, duplicate, quarantined, dead-lettered, inside a
marked gap (by the feed clock when it was sent). What fits nowhere is left over.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any

import msgspec

from schemas import wire
from schemas.events import MINUTE_NS, NS_PER_MS, Gap
from schemas.numbers import decimal_of
from schemas.partition import partition_of

STREAMS = ("XT", "XQ", "XA")
_SUM = Context(prec=150)
_VWAP = Context(prec=12, rounding=ROUND_HALF_EVEN)


class SentLine(msgspec.Struct):
    """A line of the feed's record: a frame, or bytes that are none, and market time when it was sent."""

    frame: msgspec.Raw = msgspec.Raw()
    base64: bytes = b""
    clock_ns: int | None = None


@dataclass
class Tables:
    """Rows as fetched: trades by (symbol, exchange, trade_id, ts_event), the rest by content or key."""

    trades: Mapping[tuple[str, int, str, int], tuple[Decimal, Decimal, str, bool]]
    quotes: Counter[tuple[Any, ...]]
    vendor_bars: Counter[tuple[Any, ...]]
    bars: Mapping[tuple[str, int], tuple[Any, ...]]


@dataclass
class Report:
    """The terms by stream, and the bars. `ok` is the demo's verdict."""

    sent: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(STREAMS, 0)))
    stored: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    deadletters: Counter[str] = field(default_factory=Counter)
    in_gaps: Counter[str] = field(default_factory=Counter)
    left_over: Counter[str] = field(default_factory=Counter)
    extra: Counter[str] = field(default_factory=Counter)
    bars_checked: int = 0
    bars_wrong: int = 0
    bars_missing: int = 0
    bars_extra: int = 0
    unchecked_symbols: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def complaints(self, streams: Iterable[str]) -> list[str]:
        """Why it is not in order; empty when it is."""
        found = []
        if self.left_over.total():
            found.append(f"{self.left_over.total()} events that were sent are nowhere")
        if self.extra.total():
            found.append(f"{self.extra.total()} rows were never sent")
        if self.bars_wrong or self.bars_missing or self.bars_extra:
            found.append(f"bars: {self.bars_wrong} wrong, {self.bars_missing} missing, {self.bars_extra} extra")
        if silent := [stream for stream in streams if not self.sent[stream]]:
            found.append(f"nothing was sent on {', '.join(silent)}")
        if self.unchecked_symbols:
            found.append(f"no final bar to check for {', '.join(self.unchecked_symbols)}: let it run longer")
        elif not self.bars_checked:
            found.append("no bar could be checked")
        return found + self.examples[:5]


@dataclass
class _Bar:
    first: tuple[int, int]
    last: tuple[int, int]
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal = Decimal(0)
    notional: Decimal = Decimal(0)
    count: int = 0
    buy: Decimal = Decimal(0)
    sell: Decimal = Decimal(0)

    def add(self, at: tuple[int, int], price: Decimal, size: Decimal, side: str) -> None:
        if at < self.first:
            self.first, self.open = at, price
        if at >= self.last:
            self.last, self.close = at, price
        self.high, self.low = max(self.high, price), min(self.low, price)
        self.volume = _SUM.add(self.volume, size)
        self.notional = _SUM.add(self.notional, _SUM.multiply(price, size))
        self.count += 1
        if side == "buy":
            self.buy = _SUM.add(self.buy, size)
        if side == "sell":
            self.sell = _SUM.add(self.sell, size)

    def values(self) -> tuple[Any, ...]:
        vwap = _VWAP.divide(self.notional, self.volume)
        return (
            self.open,
            self.high,
            self.low,
            self.close,
            self.volume,
            vwap,
            self.count,
            self.buy,
            self.sell,
        )


class Reconciler:
    """Takes the feed's record line by line, then gives the report."""

    def __init__(
        self,
        tables: Tables,
        gaps: Iterable[Gap],
        dead: Iterable[bytes],
        quarantined: Iterable[bytes],
        closed_ns: int,
    ) -> None:
        """`closed_ns`: minutes that end at or before it should be final by now."""
        self._tables = tables
        self._gaps = list(gaps)
        self._dead = Counter(dead)
        self._quarantined = Counter(quarantined)
        self._closed_ns = closed_ns
        self._clock = 0
        self._used: set[tuple[str, int, str, int]] = set()
        self._known = {(*key[:3], key[3] // MINUTE_NS) for key in tables.trades}
        self._quotes, self._vendor_bars = tables.quotes.copy(), tables.vendor_bars.copy()
        self._bars: dict[tuple[str, int], _Bar] = {}
        self._symbols: set[str] = set()
        self._place = 0
        self._report = Report()

    def line(self, text: bytes) -> None:
        """One line of the feed's record."""
        line = _decode_line(text)
        data = line.base64 or bytes(line.frame)
        try:
            parts = wire.split_array(data)
        except wire.DECODE_ERRORS:
            self._unparsed(data)
            return
        try:
            messages: list[Any] = wire.decode_slice(data)
        except wire.DECODE_ERRORS:
            messages = [_message(part) for part in parts]
        sent_ns = line.clock_ns
        for message in messages:
            time_ms = message.s if isinstance(message, wire.XA) else getattr(message, "t", 0)
            time_ns = time_ms * NS_PER_MS if wire.EARLIEST_MS <= time_ms < wire.LATEST_MS else 0
            if sent_ns is None or time_ns <= sent_ns:
                self._clock = max(self._clock, time_ns)
        for message, part in zip(messages, parts, strict=True):
            self._copy(message, bytes(part), self._clock if sent_ns is None else sent_ns)

    def _copy(self, message: Any, data: bytes, sent_ns: int) -> None:
        if isinstance(message, str):
            if _STATUS not in data:  # a vendor's session is no part of its tape
                self._unparsed(data)
            return
        stream = "XA" if isinstance(message, wire.XA) else type(message).__name__
        self._report.sent[stream] += 1
        self._place += 1
        term = self._refused(data)
        if term is not None:
            term[stream] += 1
            return
        symbol = wire.symbol_of(message.pair)
        if isinstance(message, wire.XT):
            found = self._trade(message, symbol)
            if found == "stored":
                self._symbols.add(symbol)
        elif isinstance(message, wire.XQ):
            found = self._content(self._quotes, quote_content(message, symbol))
        else:
            found = self._content(self._vendor_bars, vendor_content(message, symbol))
        if found:
            getattr(self._report, found)[stream] += 1
        else:
            self._missing(stream, type(message).__name__, data, symbol, sent_ns)

    def _refused(self, data: bytes) -> Counter[str] | None:
        """The term of a copy whose very bytes were quarantined or dead-lettered: it is in no table."""
        for rest, term in (
            (self._quarantined, self._report.quarantined),
            (self._dead, self._report.deadletters),
        ):
            if rest[data] > 0:
                rest[data] -= 1
                return term
        return None

    def _trade(self, message: wire.XT, symbol: str) -> str:
        ts = message.t * NS_PER_MS
        key = (symbol, message.x, str(message.i), ts)
        row = self._tables.trades.get(key)
        if row is None or key in self._used:
            return "duplicates" if (*key[:3], ts // MINUTE_NS) in self._known else ""
        price, size, side, too_late = row
        self._used.add(key)
        if (price, size) != (decimal_of(bytes(message.p)), decimal_of(bytes(message.s))):
            self._report.examples.append(f"trade {key} is stored as {price} x {size}, sent as {message}")
            return "left_over"
        if not too_late:
            at, start = (ts, self._place), ts - ts % MINUTE_NS
            bar = self._bars.get((symbol, start))
            if bar is None:
                bar = self._bars[symbol, start] = _Bar(at, at, price, price, price, price)
            bar.add(at, price, size, side)
        return "stored"

    @staticmethod
    def _content(rows: Counter[tuple[Any, ...]], content: tuple[Any, ...]) -> str:
        if rows[content] <= 0:
            return ""
        rows[content] -= 1
        return "stored"

    def _missing(self, stream: str, ev: str, data: bytes, pair: str, sent_ns: int) -> None:
        """In no table and no repeat: in a gap, or left over."""
        report = self._report
        for gap in self._gaps:
            begins_before = gap.from_ is None or gap.from_ <= max(self._clock, sent_ns)
            if _names(gap, ev, pair) and begins_before and self._clock <= gap.to:
                report.in_gaps[stream] += 1
                return
        report.left_over[stream] += 1
        report.examples.append(f"left over: {data[:200].decode(errors='replace')}")

    def _unparsed(self, data: bytes) -> None:
        """Bytes that are no event: they must be in the dead letters, whole."""
        self._report.sent["other"] += 1
        term = self._refused(data)
        if term is not None:
            term["other"] += 1
        else:
            self._missing("other", "", data, "", self._clock)

    def report(self) -> Report:
        """After the last line."""
        report = self._report
        report.extra["XT"] = len(self._tables.trades) - len(self._used)
        report.extra["XQ"] = sum(self._quotes.values())
        report.extra["XA"] = sum(self._vendor_bars.values())
        checked: set[str] = set()
        for key, bar in self._bars.items():
            row = self._tables.bars.get(key)
            if row is None:
                if key[1] + MINUTE_NS <= self._closed_ns:
                    report.bars_missing += 1
                    report.examples.append(f"bar {key} is missing")
                continue
            report.bars_checked += 1
            checked.add(key[0])
            if row != bar.values():
                report.bars_wrong += 1
                report.examples.append(f"bar {key} is {row}, recomputed {bar.values()}")
        report.bars_extra = len(self._tables.bars.keys() - self._bars.keys())
        report.unchecked_symbols = sorted(self._symbols - checked)
        return report


def _names(gap: Gap, ev: str, pair: str) -> bool:
    """Whether an event of this kind and pair may have been missed in a gap; bytes that are no event, in any."""
    if gap.partition != partition_of(pair):
        return False
    return not pair or (ev in gap.streams and ("*" in gap.pairs or pair in gap.pairs))


_STATUS = b'"status"'
_decode_line = msgspec.json.Decoder(SentLine).decode


def _message(part: msgspec.Raw) -> Any:
    try:
        return wire.decode_message(part)
    except wire.DECODE_ERRORS as error:
        return str(error)


def quote_content(message: wire.XQ, symbol: str) -> tuple[Any, ...]:
    """What identifies a quote to someone who does not know its place in the log."""
    ts = message.t * NS_PER_MS
    bid, bid_size, ask, ask_size = (decimal_of(bytes(raw)) for raw in (message.bp, message.bs, message.ap, message.as_))
    return (symbol, ts, bid, bid_size, ask, ask_size, message.x)


def vendor_content(message: wire.XA, symbol: str) -> tuple[Any, ...]:
    """The same for an aggregate."""
    ts = message.s * NS_PER_MS
    numbers = (message.o, message.h, message.l, message.c, message.v, message.vw)
    return (symbol, ts, *(decimal_of(bytes(number)) for number in numbers))
