"""The vendor's minute aggregate says something else than our bar."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Annotated, Any

import msgspec

from processors.detectors.base import Detector, Finding, touches
from schemas.events import MINUTE_NS, NS_PER_S, Bar, Gap, VendorBar

KNOWN_NS = 10 * MINUTE_NS  # after a minute's end its bars are kept for so long
PRICES = ("open", "high", "low", "close")


class _Minute:
    __slots__ = ("changed", "judged", "ours", "theirs")

    def __init__(self) -> None:
        self.ours: Bar | None = None
        self.theirs: VendorBar | None = None
        self.changed = 0  # the last tick at which either did
        self.judged = False


class VendorMismatch(Detector):
    """score = the largest difference / its tolerance, of the prices (relative, `price_bps`) and the volume (relative,
    `volume_percent`).

    The vendor's last message for the minute against our highest revision, once: at the first tick that is `settle_s`
    past the minute's end and past the last change of either. Not where a marked gap touches the minute (`partial`). A
    minute with volume at the vendor's and no bar of ours counts as volume 0, where we have bars of the pair at all.
    """

    kind = "vendor_mismatch"
    severity = "warning"
    memory_ns = KNOWN_NS + 2 * MINUTE_NS
    uses_bars = True

    class Settings(Detector.Settings, frozen=True):
        price_bps: Annotated[float, msgspec.Meta(gt=0)] = 1.0
        volume_percent: Annotated[float, msgspec.Meta(gt=0)] = 0.1
        settle_s: Annotated[float, msgspec.Meta(ge=5, le=300)] = 60.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._minutes: dict[tuple[int, str], _Minute] = {}
        self._gaps: list[Gap] = []
        self._settle_ns = round(settings.settle_s * NS_PER_S)
        self._due = 0  # before this no minute is to be judged or dropped; it follows from the minutes

    def vendor_bar(self, bar: VendorBar, at: int) -> None:
        if bar.interval == "1m" and (minute := self._minute(bar.start, bar.symbol, at)) is not None:
            minute.theirs, minute.changed = bar, at

    def bars(self, bars: Sequence[Bar], tick: int) -> None:
        for bar in bars:
            if (minute := self._minute(bar.start, bar.symbol, tick)) is not None:
                minute.ours, minute.changed = bar, tick

    def _minute(self, start: int, symbol: str, at: int) -> _Minute | None:
        """One that is about to change; None for one that is too old to be known."""
        if start + MINUTE_NS + KNOWN_NS <= at:
            return None
        self._due = 0
        return self._minutes.setdefault((start, symbol), _Minute())

    def gap(self, gap: Gap, at: int) -> None:
        if "XT" in gap.streams or "XA" in gap.streams:
            self._gaps.append(gap)

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None) -> Iterable[Finding]:
        return self._settled(tick) if tick >= self._due else ()

    def _settled(self, tick: int) -> Iterable[Finding]:
        due, findings = [], []
        for (start, symbol), minute in list(self._minutes.items()):
            dropped = start + MINUTE_NS + KNOWN_NS
            if dropped <= tick:
                del self._minutes[start, symbol]
                continue
            due.append(dropped)
            if not minute.judged and minute.theirs is not None:
                settled = max(start + MINUTE_NS, minute.changed) + self._settle_ns
                if settled > tick:
                    due.append(settled)
                    continue
                minute.judged = True
                finding = self._judge(minute.ours, minute.theirs)
                if finding is not None:
                    findings.append(finding)
        self._due = min(due, default=tick)
        return findings

    def _judge(self, ours: Bar | None, theirs: VendorBar) -> Finding | None:
        if any(
            touches(gap, theirs.symbol) and gap.to >= theirs.start and (gap.from_ is None or gap.from_ < theirs.end)
            for gap in self._gaps
        ):
            return None
        if ours is not None and "partial" in ours.flags:
            return None
        if ours is None and not any(
            symbol == theirs.symbol and minute.ours is not None for (_, symbol), minute in self._minutes.items()
        ):
            return None
        scores = {
            "volume": _apart(ours.volume if ours else Decimal(0), theirs.volume) / self.settings.volume_percent * 100
        }
        if ours is not None:
            for name in PRICES:
                scores[name] = _apart(getattr(ours, name), getattr(theirs, name)) / self.settings.price_bps * 10_000
        wrong = {name: score for name, score in scores.items() if score > 1}
        if not wrong:
            return None
        worst = max(wrong, key=lambda name: wrong[name])
        detail = "; ".join(
            f"{name} {getattr(ours, name) if ours else 'none'}, the vendor's {getattr(theirs, name)}"
            for name in sorted(wrong)
        )
        return Finding(
            theirs.symbol,
            str(theirs.start // NS_PER_S),
            theirs.start,
            float(getattr(ours, worst)) if ours else 0.0,
            float(getattr(theirs, worst)),
            wrong[worst],
            1.0,
            detail,
            theirs.epoch,
            theirs.n,
            ours,
        )

    def forget(self, tick: int) -> None:
        oldest = tick - KNOWN_NS - MINUTE_NS
        self._gaps = [gap for gap in self._gaps if gap.to > oldest]

    def state(self) -> object:
        minutes = {key: (m.ours, m.theirs, m.changed, m.judged) for key, m in self._minutes.items()}
        return (minutes, self._gaps)


def _apart(one: Decimal, other: Decimal) -> float:
    """How far two numbers lie apart, relative to the larger."""
    largest = max(abs(one), abs(other))
    return float(abs(one - other) / largest) if largest else 0.0
