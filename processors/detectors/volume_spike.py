"""Ten seconds with far more volume than the pair's ten seconds usually have."""

from collections.abc import Iterable, Sequence
from math import exp, inf, log
from typing import Annotated, Any

import msgspec

from processors.detectors.base import Detector, Finding, Onsets, TradeSeen
from schemas.events import MINUTE_NS, NS_PER_S

WINDOW_NS = 10 * NS_PER_S
WINDOWS = 20 * MINUTE_NS // WINDOW_NS
LEAST_WINDOWS = 30  # with trades, and at least half of all: fewer tell nothing of a pair
NORMAL_P75 = 0.6745  # of a normal distribution, in standard deviations
LEAST_SCALE = 0.3  # of log volume: volumes that are always the same may vary by a third


class _Pair:
    __slots__ = ("limit", "middle", "past", "scale", "volume", "window")

    def __init__(self) -> None:
        self.past: dict[int, float] = {}  # log volume by window, of those with trades
        self.window = 0
        self.volume = 0.0  # of the window so far
        self.middle = self.scale = 0.0
        self.limit = inf


class VolumeSpike(Detector):
    """score = (log(volume) - median) / scale, of windows of 10 s aligned to the clock.

    Median and 75th percentile are those of the log volumes of the windows with trades in the 20 minutes before; the
    scale is their distance / 0.6745, as a normal distribution's. Volumes spread over orders of magnitude, to the right
    above all: hence the logarithm, and a scale from the upper side. One burst fills two windows, so that of the 90th
    percentile six in 20 minutes would hide all others.
    """

    kind = "volume_spike"
    severity = "info"
    memory_ns = (WINDOWS + 2) * WINDOW_NS

    class Settings(Detector.Settings, frozen=True):
        deviations: Annotated[float, msgspec.Meta(gt=0)] = 4.5
        least_ratio: Annotated[float, msgspec.Meta(ge=1)] = 10.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._pairs: dict[str, _Pair] = {}
        self._onsets = Onsets(WINDOW_NS)

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        pair = self._pairs.get(symbol)
        if pair is None:
            pair = self._pairs[symbol] = _Pair()
        window = at // WINDOW_NS
        if pair.window != window:
            self._turn(pair, window)
        pair.volume += sum([trade[1] for trade in trades])
        if pair.volume <= pair.limit or not self._onsets.begins(symbol, at):
            return ()
        _, _, ts, epoch, n, _ = max(trades, key=lambda trade: trade[1])
        usual = exp(pair.middle)
        score = (log(pair.volume) - pair.middle) / pair.scale
        detail = f"{pair.volume:.6g} in less than 10 s, {pair.volume / usual:.3g} times the usual"
        key = str(window * (WINDOW_NS // NS_PER_S))
        deviations = self.settings.deviations
        return [Finding(symbol, key, ts, pair.volume, usual, score, deviations, detail, epoch, n)]

    def _turn(self, pair: _Pair, window: int) -> None:
        if pair.volume:
            pair.past[pair.window] = log(pair.volume)
        pair.window, pair.volume, pair.limit = window, 0.0, inf
        while pair.past and (oldest := next(iter(pair.past))) < window - WINDOWS:
            del pair.past[oldest]
        count = len(pair.past)
        if count >= LEAST_WINDOWS and 2 * count >= window - next(iter(pair.past)):
            volumes = sorted(pair.past.values())
            pair.middle = volumes[count // 2]
            pair.scale = max((volumes[3 * (count - 1) // 4] - pair.middle) / NORMAL_P75, LEAST_SCALE)
            above = max(self.settings.deviations * pair.scale, log(self.settings.least_ratio))
            pair.limit = exp(min(700.0, pair.middle + above))

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)
        window = tick // WINDOW_NS
        for symbol, pair in list(self._pairs.items()):
            if pair.window != window:
                self._turn(pair, window)
            if not pair.past and not pair.volume:
                del self._pairs[symbol]

    def state(self) -> object:
        pairs = {s: (p.past, p.window, p.volume) for s, p in self._pairs.items()}
        return (pairs, self._onsets.state())
