"""Quotes that cannot stand: bid above ask, or equal to it."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from processors.detectors.base import Detector, Finding, Onsets, QuoteSeen
from schemas.events import MINUTE_NS, Severity


class CrossedQuote(Detector):
    """bid > ask > 0 in one quote of one exchange; score = (bid - ask) / middle in bps."""

    kind = "crossed_quote"
    severity: ClassVar[Severity] = "warning"
    memory_ns = 2 * MINUTE_NS

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._onsets = Onsets(MINUTE_NS)

    def quotes(self, symbol: str, quotes: Sequence[QuoteSeen], at: int) -> Iterable[Finding]:
        wrong = self.wrong(quotes)
        if not wrong or not self._onsets.begins(symbol, at):
            return ()
        bid, ask, ts, epoch, n = max(wrong, key=lambda quote: quote[0] / quote[1])
        bps = 20_000 * (bid - ask) / (bid + ask)
        key = str(at // MINUTE_NS * 60)
        detail = f"bid {bid:.12g}, ask {ask:.12g}; {len(wrong)} of {len(quotes)} quotes since the last tick"
        return [Finding(symbol, key, ts, bid, ask, bps, 0.0, detail, epoch, n)]

    def wrong(self, quotes: Sequence[QuoteSeen]) -> list[QuoteSeen]:
        return [quote for quote in quotes if quote[0] > quote[1] > 0]

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)

    def state(self) -> object:
        return self._onsets.state()


class LockedQuote(CrossedQuote):
    """bid = ask > 0: free of charge, hence soon gone where all is well."""

    kind = "locked_quote"
    severity: ClassVar[Severity] = "info"

    def wrong(self, quotes: Sequence[QuoteSeen]) -> list[QuoteSeen]:
        return [quote for quote in quotes if quote[0] == quote[1] > 0]
