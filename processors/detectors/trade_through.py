"""A trade outside the quote that stood."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec

from processors.detectors.base import Detector, Finding, Onsets, QuoteSeen, TradeSeen
from schemas.events import NS_PER_S

EXPIRES_NS = 5 * NS_PER_S  # a quote stands for so long, by the trade's time and by the last tick
AHEAD_NS = NS_PER_S  # by so much a quote may be newer than a trade that came after it
BUCKET_NS = 10 * NS_PER_S


class TradeThrough(Detector):
    """score = distance from the nearer side of the quote / spread, of the quote of the trade's own exchange.

    A spread of one tick says little of a book's depth, and an order that sweeps several levels trades far outside
    the quote before the next one comes: the distance must be `least_bps` of the price as well.
    """

    kind = "trade_through"
    severity = "warning"
    memory_ns = 2 * BUCKET_NS + EXPIRES_NS

    class Settings(Detector.Settings, frozen=True):
        spreads: Annotated[float, msgspec.Meta(gt=0)] = 5.0
        least_bps: Annotated[float, msgspec.Meta(ge=0)] = 25.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._onsets = Onsets(BUCKET_NS)

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        worst = 0.0
        found: tuple[TradeSeen, QuoteSeen] | None = None
        for trade in trades:
            quote = trade[5]
            if quote is not None and not quote[0] <= trade[0] <= quote[1]:
                score = self._score(trade, quote, at)
                if score > worst:
                    worst, found = score, (trade, quote)
        if found is None or not self._onsets.begins(symbol, at):
            return ()
        (price, _, ts, epoch, n, _), (bid, ask, *_) = found
        expected = ask if price > ask else bid
        detail = f"{10_000 * abs(price / expected - 1):.4g} bps outside {bid:.12g} / {ask:.12g}"
        key = str(at // BUCKET_NS * (BUCKET_NS // NS_PER_S))
        return [Finding(symbol, key, ts, price, expected, worst, self.settings.spreads, detail, epoch, n)]

    def _score(self, trade: TradeSeen, quote: QuoteSeen, at: int) -> float:
        """Spreads outside; 0 where that is none."""
        price, _, ts, *_ = trade
        bid, ask, quoted, *_ = quote
        if not 0 < bid < ask or quoted < at - EXPIRES_NS or not -AHEAD_NS <= ts - quoted <= EXPIRES_NS:
            return 0.0
        distance = max(price - ask, bid - price)
        if distance < self.settings.least_bps / 10_000 * bid or distance < self.settings.spreads * (ask - bid):
            return 0.0
        return distance / (ask - bid)

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)

    def state(self) -> object:
        return self._onsets.state()
