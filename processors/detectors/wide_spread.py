"""A spread far wider than the pair's usual one."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from math import inf
from typing import Annotated, Any

import msgspec

from processors.detectors.base import Detector, Finding, Onsets, QuoteSeen
from schemas.events import MINUTE_NS

MINUTES = 15  # that the usual spread is learned from
LEAST_SPREADS = 30  # fewer tell nothing of a pair


class _Pair:
    __slots__ = ("minute", "spreads", "usual")

    def __init__(self) -> None:
        self.spreads: dict[int, array[float]] = {}  # by minute: the narrowest of each second, in bps
        self.minute = 0  # that `usual` is for
        self.usual = inf


class WideSpread(Detector):
    """score = spread / usual. The spread is the narrowest of the quotes since the last tick, in bps of the last middle:
    one exchange, or one moment between two levels, is none of it. The usual is the median over the 15 whole
    minutes before. It must be `least_bps` as well, for ten times one tick may be nothing."""

    kind = "wide_spread"
    severity = "warning"
    memory_ns = (MINUTES + 2) * MINUTE_NS

    class Settings(Detector.Settings, frozen=True):
        times: Annotated[float, msgspec.Meta(gt=1)] = 10.0
        least_bps: Annotated[float, msgspec.Meta(ge=0)] = 10.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._pairs: dict[str, _Pair] = {}
        self._onsets = Onsets(MINUTE_NS)

    def quotes(self, symbol: str, quotes: Sequence[QuoteSeen], at: int) -> Iterable[Finding]:
        whole = [quote for quote in quotes if quote[1] >= quote[0] > 0]
        if not whole:
            return ()
        relative = [(ask - bid) / (ask + bid) for bid, ask, _, _, _ in whole]
        bid, ask, ts, epoch, n = whole[relative.index(min(relative))]
        spread = 20_000 * (ask - bid) / (bid + ask)
        pair = self._pairs.get(symbol)
        if pair is None:
            pair = self._pairs[symbol] = _Pair()
        minute = at // MINUTE_NS
        if pair.minute != minute:
            pair.minute, pair.usual = minute, inf
            pair.spreads = {m: spreads for m, spreads in pair.spreads.items() if m >= minute - MINUTES}
            known = sorted(chain.from_iterable(pair.spreads.values()))
            if len(known) >= LEAST_SPREADS:
                pair.usual = known[len(known) // 2]
        spreads = pair.spreads.get(minute)
        if spreads is None:
            spreads = pair.spreads[minute] = array("d")
        spreads.append(spread)
        limit = max(self.settings.least_bps, self.settings.times * pair.usual)
        if spread < limit or not self._onsets.begins(symbol, at):
            return ()
        score = spread / pair.usual if pair.usual else None
        detail = f"no quote since the last tick is narrower than {spread:.4g} bps; usual are {pair.usual:.4g}"
        key = str(minute * 60)
        return [Finding(symbol, key, ts, spread, pair.usual, score, self.settings.times, detail, epoch, n)]

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)
        oldest = tick // MINUTE_NS - MINUTES
        for symbol, pair in list(self._pairs.items()):
            pair.spreads = {minute: spreads for minute, spreads in pair.spreads.items() if minute >= oldest}
            if not pair.spreads:
                del self._pairs[symbol]

    def state(self) -> object:
        return ({s: p.spreads for s, p in self._pairs.items()}, self._onsets.state())
