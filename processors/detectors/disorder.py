"""Events in the wrong order, too late, twice, or from a time that cannot be: each a matter of numbers."""

from collections.abc import Iterable, Sequence
from typing import Any

from processors.detectors.base import Counting, Finding, Least, Note, QuoteSeen, TradeSeen
from schemas.events import MINUTE_NS, NS_PER_S

SLACK_NS = NS_PER_S  # exchanges overtake each other by less
KNOWN_NS = MINUTE_NS  # for so long the newest event of a pair is known


class OutOfOrder(Counting):
    """Trades (or quotes) more than 1 s older than the newest of their pair before them."""

    kind = "out_of_order"
    severity = "info"
    memory_ns = MINUTE_NS + KNOWN_NS
    what = "out of order"
    verb = "events came after one more than 1 s newer"

    class Settings(Counting.Settings, frozen=True):
        least: Least = 20

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._newest: dict[tuple[str, str], int] = {}

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        self._sort(symbol, "trade", trades, at)
        return ()

    def quotes(self, symbol: str, quotes: Sequence[QuoteSeen], at: int) -> Iterable[Finding]:
        self._sort(symbol, "quote", quotes, at)
        return ()

    def _sort(self, symbol: str, name: str, events: Sequence[TradeSeen] | Sequence[QuoteSeen], at: int) -> None:
        times = [event[2] for event in events]
        newest = self._newest.get((symbol, name), 0)
        if newest < at - KNOWN_NS:
            newest = 0
        latest = max(newest, max(times))
        if min(times) < latest - SLACK_NS:
            for event in events:
                _, _, ts, epoch, n, *_ = event
                if ts < newest - SLACK_NS:
                    detail = f"a {name} {(newest - ts) / NS_PER_S:.3f} s older than the newest"
                    self.count(Note(self.what, symbol, ts, detail, epoch, n), at)
                newest = max(newest, ts)
        self._newest[symbol, name] = latest

    def forget(self, tick: int) -> None:
        super().forget(tick)
        self._newest = {key: newest for key, newest in self._newest.items() if newest >= tick - KNOWN_NS}

    def state(self) -> object:
        return (super().state(), self._newest)


class LateData(Counting):
    """Trades for a minute that was closed already (flags `late` and `too_late`)."""

    kind = "late_data"
    severity = "info"
    what = "late"
    verb = "trades of closed minutes"

    class Settings(Counting.Settings, frozen=True):
        least: Least = 20


class Duplicate(Counting):
    """Trades that came again with the same exchange and id, within their minute."""

    kind = "duplicate"
    severity = "info"
    what = "duplicate"
    verb = "trades came again"


class TimestampOutOfBounds(Counting):
    """Events quarantined because they are more than 10 s ahead of the last tick."""

    kind = "timestamp_out_of_bounds"
    severity = "warning"
    what = "quarantined"
    verb = "events from the future"
