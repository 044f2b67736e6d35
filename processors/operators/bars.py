"""Exact one-minute bars, closed by ticks and nothing else."""

from decimal import Decimal
from typing import Literal

from schemas.events import MINUTE_NS, NOTHING_MISSED, Bar, Gap, Missed, Side, Trade
from schemas.numbers import EXACT, VWAP, ZERO, canonical

_add, _fma = EXACT.add, EXACT.fma
_QUALITY, _WHOLE = Decimal("0.0001"), Decimal(1)


#: (ts_event, epoch, n, price, size, side) of a trade, which sorts by its place in time.
_Traded = tuple[int, int, int, Decimal, Decimal, Side]


class _Minute:
    """What is known of a symbol's minute. Open and close go by (ts_event, epoch, n). `trades` were only kept as they
    came, and are not in the sums yet; `unsided` is the volume neither bought nor sold."""

    __slots__ = (
        "buy",
        "count",
        "first",
        "high",
        "last",
        "late",
        "low",
        "notional",
        "revision",
        "sell",
        "trades",
        "unsided",
    )

    def __init__(self, first: _Traded, revision: int) -> None:
        self.trades: list[_Traded] = []
        self.first = self.last = first
        self.high = self.low = first[3]
        self.notional = self.buy = self.sell = self.unsided = ZERO
        self.count = 0
        self.revision = revision
        self.late = False

    def sum_up(self) -> None:
        """All that was kept, at once: sums are looked at at ticks only."""
        trades, self.trades = self.trades, []
        high, low, notional = self.high, self.low, self.notional
        for _, _, _, price, size, side in trades:
            if price > high:
                high = price
            elif price < low:
                low = price
            notional = _fma(price, size, notional)
            if side == "buy":
                self.buy = _add(self.buy, size)
            elif side == "sell":
                self.sell = _add(self.sell, size)
            else:
                self.unsided = _add(self.unsided, size)
        self.high, self.low, self.notional = high, low, notional
        self.first = min(self.first, *trades)
        self.last = max(self.last, *trades)
        self.count += len(trades)

    def state(self) -> object:
        return tuple(getattr(self, name) for name in self.__slots__)


class _SeenGap:
    """A gap, and the last tick before it came: minutes that were closed then count it as a revision."""

    __slots__ = ("before", "gap")

    def __init__(self, gap: Gap, before: int) -> None:
        self.gap = gap
        self.before = before

    def touches(self, start: int, symbol: str) -> bool:
        """Both ends of a gap belong to it; gaps without trades in them touch no bar."""
        gap = self.gap
        return (
            gap.to >= start
            and (gap.from_ is None or gap.from_ < start + MINUTE_NS)
            and "XT" in gap.streams
            and ("*" in gap.pairs or symbol in gap.pairs)
        )


def _open(gaps: list[Gap]) -> list[Gap]:
    """Those of which nobody has said that nothing was missed: such a word closes all gaps of its stretch."""
    empty = [(gap.from_, gap.to, gap.pairs) for gap in gaps if gap.reason == NOTHING_MISSED]
    return [gap for gap in gaps if (gap.from_, gap.to, gap.pairs) not in empty] if empty else gaps


class Bars:
    """The minutes of one partition inside the lateness horizon.

    A minute is closed once a tick has reached its end plus grace. A bar is emitted when its minute closes,
    and again at the next tick after something changed it: a late trade, or a gap that touches it. `forming`: whether
    anybody wants the open ones.
    """

    def __init__(self, lateness_ns: int, grace_ns: int, fingerprint: str, forming: bool = True) -> None:
        self.memory_ns = lateness_ns + MINUTE_NS + grace_ns
        self._lateness_ns = lateness_ns
        self._grace_ns = grace_ns
        self._fingerprint = fingerprint
        self._forming = forming
        self._minutes: dict[int, dict[str, _Minute]] = {}
        self._gaps: list[_SeenGap] = []
        self._changed: set[tuple[int, str]] = set()  # which the next tick tells of
        self._missed: list[Missed] = []  # gaps in trades since the last marker
        self._oldest = 0  # the first minute that may still change
        self.known_from = 0
        """Of minutes that began before it others were told, of which nothing is known here: they take no trades."""

    def closed(self, start: int, tick: int) -> bool:
        """Whether the minute from `start` is closed as of the tick."""
        return tick >= start + MINUTE_NS + self._grace_ns

    def add(self, start: int, trade: Trade, price: Decimal, size: Decimal, closed: bool) -> None:
        """Takes in a trade that is inside the horizon. `start`: of its minute, which is `closed` or not."""
        symbol = trade.symbol
        traded = (trade.ts_event, trade.epoch, trade.n, price, size, trade.side)
        symbols = self._minutes.get(start)
        if symbols is None:
            symbols = self._minutes[start] = {}
        minute = symbols.get(symbol)
        if minute is None:
            missed = 0
            if closed:  # its closing as empty was the bar's first version; gaps since then count too
                missed = sum(self.closed(start, g.before) and g.touches(start, symbol) for g in self._gaps)
            minute = symbols[symbol] = _Minute(traded, missed)
        if not minute.trades:
            self._changed.add((start, symbol))
        minute.trades.append(traded)
        if closed:
            minute.revision += 1
            minute.late = True

    def gap(self, gap: Gap, tick: int) -> None:
        """Notes a gap, or the word that one was empty; `tick` is the last tick before it. Closed bars that it touches
        are revised."""
        seen = _SeenGap(gap, tick)
        self._gaps.append(seen)
        if "XT" in gap.streams:
            self._missed.append(Missed(gap.from_, gap.to, gap.pairs, gap.reason))
        for start, symbols in self._minutes.items():
            for symbol, minute in symbols.items():
                if seen.touches(start, symbol):
                    minute.revision += self.closed(start, tick)
                    self._changed.add((start, symbol))

    def _sum_up(self) -> None:
        for start, symbol in self._changed:
            minute = self._minutes[start][symbol]
            if minute.trades:
                minute.sum_up()

    def tick(self, before: int, tick: int) -> tuple[list[Bar], list[Bar]]:
        """What a tick closes or finds changed, final and forming, by (start, symbol); then forgets what is past
        the horizon."""
        final, forming = [], []
        self._sum_up()
        if (tick - self._grace_ns) // MINUTE_NS != (before - self._grace_ns) // MINUTE_NS:
            closing = [s for s in self._minutes if self.closed(s, tick) and not self.closed(s, before)]
            self._changed.update((start, symbol) for start in closing for symbol in self._minutes[start])
        for start, symbol in sorted(self._changed):
            minute = self._minutes[start][symbol]
            if self.closed(start, tick):
                final.append(self._bar(symbol, start, minute, "final"))
            elif self._forming:
                forming.append(self._bar(symbol, start, minute, "forming"))
        self._changed.clear()
        horizon = tick - self._lateness_ns
        oldest = horizon - horizon % MINUTE_NS
        if oldest != self._oldest:
            self._oldest = oldest
            for start in [s for s in self._minutes if s < oldest]:
                del self._minutes[start]
            self._gaps = [g for g in self._gaps if g.gap.to >= oldest]
        return final, forming

    def nothing_before(self, tick: int) -> None:
        """What came before the tick is not known: the minutes that are closed then were told by somebody else."""
        last = tick - self._grace_ns
        self.known_from = last - last % MINUTE_NS

    def missed(self) -> list[Missed]:
        """The gaps in trades noted since this was asked the last time."""
        missed, self._missed = self._missed, []
        return missed

    def close(self, tick: int) -> list[Bar]:
        """Every bar still open or changed, as if the recording ended at the tick: the open are `partial`.
        Not at the last record, whose time goes by how events were cut into records."""
        bars = []
        self._sum_up()
        for start, symbols in sorted(self._minutes.items()):
            for symbol, minute in sorted(symbols.items()):
                if not self.closed(start, tick):
                    bars.append(self._bar(symbol, start, minute, "final", tick))
                elif (start, symbol) in self._changed:
                    bars.append(self._bar(symbol, start, minute, "final"))
        return bars

    def _bar(
        self, symbol: str, start: int, minute: _Minute, status: Literal["forming", "final"], cut: int | None = None
    ) -> Bar:
        volume = _add(_add(minute.buy, minute.sell), minute.unsided)
        end = start + MINUTE_NS
        gaps = _open([g.gap for g in self._gaps if g.touches(start, symbol)])
        missing = [(start if g.from_ is None else max(g.from_, start), min(g.to, end)) for g in gaps]
        if cut is not None:
            missing.append((max(start, min(cut, end)), end))
        missing_ns = _covered(missing)
        flags = []
        if gaps or cut is not None:
            flags.append("partial")
        if any(g.reason != "start" for g in gaps):
            flags.append("gap")
        if minute.late:
            flags.append("late")
        return Bar(
            symbol,
            "1m",
            start,
            end,
            minute.first[3],
            minute.high,
            minute.low,
            minute.last[3],
            canonical(volume),
            canonical(VWAP.divide(minute.notional, volume)),
            canonical(minute.notional),
            minute.count,
            canonical(minute.buy),
            canonical(minute.sell),
            status,
            0,
            minute.revision,
            flags,
            missing_ns,
            canonical((1 - Decimal(missing_ns) / MINUTE_NS).quantize(_QUALITY)) if missing_ns else _WHOLE,
            "trades",
            self._fingerprint,
        )

    def state(self) -> object:
        """What decides about later bars. A gap from before the horizon came before those minutes closed, whatever
        its tick: a rebuild that begins with it does not know the tick before it."""
        self._sum_up()
        return (
            {start: {s: m.state() for s, m in symbols.items()} for start, symbols in self._minutes.items()},
            [(g.gap, max(g.before, self._oldest)) for g in self._gaps],
            list(self._missed),
            set(self._changed),
            max(self.known_from, self._oldest),
        )


def _covered(stretches: list[tuple[int, int]]) -> int:
    """The length of the union of stretches [from, to]."""
    total, reached = 0, None
    for begin, end in sorted(stretches):
        if reached is None or begin > reached:
            total += end - begin
            reached = end
        elif end > reached:
            total += end - reached
            reached = end
    return total
