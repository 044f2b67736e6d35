"""A minute with far more volume than the pair's minutes usually have."""

from collections.abc import Iterable, Sequence
from math import exp, fsum, inf, log
from typing import Annotated, Any

import msgspec

from processors.detectors.base import Detector, Finding, Onsets, TradeSeen
from schemas.events import MINUTE_NS, NS_PER_S

WINDOW_NS = 10 * NS_PER_S
OF_A_MINUTE = MINUTE_NS // WINDOW_NS
WINDOWS = 25 * OF_A_MINUTE
LEAST_MINUTES = 30  # with volume, and at least half of all: fewer tell nothing of a pair
NORMAL_P80 = 0.8416  # of a normal distribution, in standard deviations


class _Pair:
    __slots__ = ("before", "largest", "limit", "middle", "past", "recent", "scale", "volume", "window")

    def __init__(self, window: int) -> None:
        self.past: dict[int, float] = {}  # log volume of the minute that ended with a window, where there was any
        self.recent: dict[int, float] = {}  # volume of those of the five windows before that had any
        self.window = window
        self.volume = self.largest = 0.0  # of the window so far, and of its largest trade
        self.before = 0.0  # of the five windows before
        self.middle = self.scale = 0.0
        self.limit = inf


class VolumeSpike(Detector):
    """score = (log(volume) - median) / scale, of minutes that end every ten seconds; the last one is of its last ten
    seconds so far. The largest trade of each ten seconds is left out: a large trade is no burst, and sizes spread so
    far to the right that most of what a calm market's minutes differ by is a single trade.

    Median, 20th and 80th percentile are those of the log volumes in the 25 minutes before; the scale is half the
    distance of the latter two / 0.8416, as a normal distribution's, at least such that `deviations` of it are
    `least_ratio` times the median. Volumes spread over orders of magnitude: hence the logarithm. A burst of a minute
    shows in eleven of these 150 minutes, so that two do not hide a third.
    """

    kind = "volume_spike"
    severity = "info"
    memory_ns = (WINDOWS + OF_A_MINUTE + 1) * WINDOW_NS

    class Settings(Detector.Settings, frozen=True):
        deviations: Annotated[float, msgspec.Meta(gt=0)] = 4.0
        least_ratio: Annotated[float, msgspec.Meta(gt=1)] = 3.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._pairs: dict[str, _Pair] = {}
        self._onsets = Onsets(MINUTE_NS)
        self._least_scale = log(settings.least_ratio) / settings.deviations

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        window = at // WINDOW_NS
        pair = self._pairs.get(symbol)
        if pair is None:
            pair = self._pairs[symbol] = _Pair(window)
        elif pair.window != window:
            self._turn(pair, window)
        sizes = [trade[1] for trade in trades]
        pair.volume += fsum(sizes)
        pair.largest = max(pair.largest, *sizes)
        volume = pair.before + pair.volume - pair.largest
        if volume <= pair.limit or not self._onsets.begins(symbol, at):
            return ()
        _, _, ts, epoch, n, _ = max(trades, key=lambda trade: trade[1])
        usual = exp(pair.middle)
        score = (log(volume) - pair.middle) / pair.scale
        detail = f"{volume:.6g} in a minute, {volume / usual:.3g} times the usual"
        key = str(at // MINUTE_NS * 60)
        return [Finding(symbol, key, ts, volume, usual, score, self.settings.deviations, detail, epoch, n)]

    def _turn(self, pair: _Pair, window: int) -> None:
        if pair.volume > pair.largest:
            pair.recent[pair.window] = pair.volume - pair.largest
        for ended in range(pair.window, min(window, pair.window + OF_A_MINUTE)):
            pair.recent = {w: volume for w, volume in pair.recent.items() if w > ended - OF_A_MINUTE}
            if pair.recent:
                pair.past[ended] = log(fsum(pair.recent.values()))
        pair.recent = {w: volume for w, volume in pair.recent.items() if w > window - OF_A_MINUTE}
        pair.before = fsum(pair.recent.values())
        pair.window, pair.volume, pair.largest, pair.limit = window, 0.0, 0.0, inf
        while pair.past and (oldest := next(iter(pair.past))) < window - WINDOWS:
            del pair.past[oldest]
        count = len(pair.past)
        if count >= LEAST_MINUTES and 2 * count >= window - next(iter(pair.past)):
            volumes = sorted(pair.past.values())
            pair.middle = volumes[count // 2]
            spread = volumes[4 * (count - 1) // 5] - volumes[(count - 1) // 5]
            pair.scale = max(spread / 2 / NORMAL_P80, self._least_scale)
            pair.limit = exp(min(700.0, pair.middle + self.settings.deviations * pair.scale))

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)
        window = tick // WINDOW_NS
        for symbol, pair in list(self._pairs.items()):
            if pair.window != window:
                self._turn(pair, window)
            if not pair.past and not pair.volume:
                del self._pairs[symbol]

    def state(self) -> object:
        pairs = {s: (p.past, p.recent, p.window, p.volume, p.largest) for s, p in self._pairs.items()}
        return (pairs, self._onsets.state())
