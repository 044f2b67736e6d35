"""Runs the detectors over a partition: shows them what happened, tick by tick, and names what they find."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from processors.detectors.base import Detector, Finding, Note, QuoteSeen, TradeSeen
from processors.detectors.registry import DETECTORS, Thresholds
from schemas.events import MINUTE_NS, Anomaly, Bar, Gap, VendorBar

STANDS_NS = MINUTE_NS  # an older quote is not kept; detectors may let it expire sooner


class _Pair:
    """What a pair did since the last tick, in the order of the log, and the newest quote of each exchange."""

    __slots__ = ("quotes", "standing", "trades")

    def __init__(self) -> None:
        self.trades: list[TradeSeen] = []
        self.quotes: list[QuoteSeen] = []
        self.standing: dict[int | None, QuoteSeen] = {}


class _Found(NamedTuple):
    order: int
    detector: Detector
    finding: Finding


class Anomalies:
    """Between two ticks events are only kept, in lists; at a tick the pairs that had some are judged. Hence nothing
    depends on how events were cut into records, and an event costs two appends and its share of a few passes in C."""

    def __init__(self, partition: int, thresholds: Thresholds, fingerprint: str) -> None:
        self._partition = partition
        self._fingerprint = fingerprint
        self._detectors = [detector(dict(thresholds)[detector.kind]) for detector in DETECTORS]
        self._pairs: dict[str, _Pair] = {}
        self._notes: list[Note] = []
        self._vendor_bars: list[VendorBar] = []
        self._found: list[_Found] = []  # before a gap, not yet said
        self._on_trades = self._using("trades")
        self._on_quotes = self._using("quotes")
        self._on_note = self._using("note")
        self._on_vendor_bar = self._using("vendor_bar")
        self._on_bars = self._using("bars")
        self._on_gap = self._using("gap")
        self._on_tick = self._using("tick")

    def _using(self, hook: str) -> list[tuple[int, Detector]]:
        """The detectors that have a hook of their own, and their places."""
        return [
            (order, detector)
            for order, detector in enumerate(self._detectors)
            if getattr(type(detector), hook) is not getattr(Detector, hook)
        ]

    @property
    def memory_ns(self) -> int:
        """What detectors remember of events."""
        return max(MINUTE_NS + STANDS_NS, *(d.memory_ns for d in self._detectors if not d.uses_bars))

    @property
    def bars_memory_ns(self) -> int:
        """What detectors remember of bars; it comes on top of the memory of the bars."""
        return max(d.memory_ns for d in self._detectors if d.uses_bars)

    # -- between ticks -----------------------------------------------------------------------------

    def trade(self, symbol: str, ts: int, price: float, size: float, exchange: int | None, epoch: int, n: int) -> None:
        """A valid trade that is no repeat."""
        pair = self._pairs.get(symbol)
        if pair is None:
            pair = self._pairs[symbol] = _Pair()
        pair.trades.append((price, size, ts, epoch, n, pair.standing.get(exchange)))

    def quote(self, symbol: str, ts: int, bid: float, ask: float, exchange: int | None, epoch: int, n: int) -> None:
        """A valid quote; a side of 0 is absent."""
        pair = self._pairs.get(symbol)
        if pair is None:
            pair = self._pairs[symbol] = _Pair()
        pair.standing[exchange] = quote = (bid, ask, ts, epoch, n)
        pair.quotes.append(quote)

    def note(self, what: str, symbol: str | None, ts: int, detail: str, epoch: int, n: int) -> None:
        """An event that was `duplicate`, `late`, `quarantined` or `impossible`."""
        self._notes.append(Note(what, symbol, ts, detail, epoch, n))

    def vendor_bar(self, bar: VendorBar) -> None:
        self._vendor_bars.append(bar)

    def gap(self, gap: Gap, at: int) -> None:
        """A gap record or a hole; `at` is the last tick. What came before is judged now and said at the next tick."""
        self._judge(at)
        self._found.sort(key=_by_order)
        if "XQ" in gap.streams:
            for symbol, pair in self._pairs.items():
                if "*" in gap.pairs or symbol in gap.pairs:
                    pair.standing.clear()
        for _, detector in self._on_gap:
            detector.gap(gap, at)

    # -- at ticks ----------------------------------------------------------------------------------

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None, bars: Sequence[Bar]) -> list[Anomaly]:
        """What was found since the tick before. `bars`: those final bars that this tick emits; `fresh`: the streams it
        calls fresh, None where it does not say (a gap)."""
        self._judge(before)
        if bars:
            for _, detector in self._on_bars:
                detector.bars(bars, tick)
        for order, detector in self._on_tick:
            findings = detector.tick(before, tick, fresh)
            if findings:
                self._keep(order, detector, findings)
        if tick // MINUTE_NS != before // MINUTE_NS:
            self._forget(tick)
        if not self._found:
            return []
        found, self._found = self._found, []
        return [self._anomaly(one.detector, one.finding, tick) for one in sorted(found, key=_by_order)]

    def _judge(self, at: int) -> None:
        """Shows the detectors what happened since the last tick, and forgets it."""
        notes, self._notes = self._notes, []
        for note in notes:
            for _, detector in self._on_note:
                detector.note(note, at)
        vendor_bars, self._vendor_bars = self._vendor_bars, []
        for bar in vendor_bars:
            for _, detector in self._on_vendor_bar:
                detector.vendor_bar(bar, at)
        for symbol, pair in self._pairs.items():
            if trades := pair.trades:
                pair.trades = []
                for order, detector in self._on_trades:
                    if findings := detector.trades(symbol, trades, at):
                        self._keep(order, detector, findings)
            if quotes := pair.quotes:
                pair.quotes = []
                for order, detector in self._on_quotes:
                    if findings := detector.quotes(symbol, quotes, at):
                        self._keep(order, detector, findings)

    def _keep(self, order: int, detector: Detector, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._found.append(_Found(order, detector, finding))

    def _anomaly(self, detector: Detector, finding: Finding, tick: int) -> Anomaly:
        bar = finding.bar
        return Anomaly(
            f"{detector.kind}:{self._partition}:{finding.symbol or '*'}:{finding.key}",
            detector.kind,
            finding.severity or detector.severity,
            finding.symbol,
            finding.ts_event,
            tick,
            finding.value,
            finding.expected,
            finding.score,
            finding.threshold,
            finding.detail,
            finding.epoch,
            self._partition,
            finding.n,
            bar.interval if bar else None,
            bar.start if bar else None,
            bar.repair if bar else None,
            bar.revision if bar else None,
            self._fingerprint,
        )

    def _forget(self, tick: int) -> None:
        """Once a minute and before the state is told: what is older than its memory changes nothing any more."""
        for symbol, pair in list(self._pairs.items()):
            pair.standing = {x: quote for x, quote in pair.standing.items() if quote[2] >= tick - STANDS_NS}
            if not (pair.standing or pair.trades or pair.quotes):
                del self._pairs[symbol]
        for detector in self._detectors:
            detector.forget(tick)

    def state(self, tick: int) -> object:
        """Everything that later anomalies depend on, comparable."""
        self._forget(tick)
        pairs = {}
        for symbol, pair in self._pairs.items():
            standing = [None if q is None or q[2] < tick - STANDS_NS else q for *_, q in pair.trades]
            pairs[symbol] = ([trade[:5] for trade in pair.trades], standing, pair.quotes, pair.standing)
        found = [(one.order, one.finding) for one in self._found]
        return (pairs, self._notes, self._vendor_bars, found, [detector.state() for detector in self._detectors])


class Silent(Anomalies):
    """Nobody wants anomalies: nothing is kept and nothing found."""

    def trade(self, *_: object) -> None: ...
    def quote(self, *_: object) -> None: ...
    def note(self, *_: object) -> None: ...
    def vendor_bar(self, bar: VendorBar) -> None: ...
    def gap(self, gap: Gap, at: int) -> None: ...

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None, bars: Sequence[Bar]) -> list[Anomaly]:
        return []


def _by_order(one: _Found) -> tuple[int, str, str]:
    return (one.order, one.finding.symbol or "", one.finding.key)
