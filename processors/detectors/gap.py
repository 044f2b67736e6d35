"""A stretch that may have been missed, as gaps.v1 has it."""

from collections.abc import Iterable, Sequence
from typing import Any

from processors.detectors.base import Detector, Finding
from schemas.events import NS_PER_S, Gap

HARMLESS = ("silence", "stop")  # perhaps nothing was missed; or it was meant


class GapMarked(Detector):
    """Every gap but the recording's own beginning; info for a silence that ended by itself and for an orderly stop."""

    kind = "gap"
    severity = "warning"
    memory_ns = NS_PER_S  # until the next tick

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._gaps: list[Gap] = []

    def gap(self, gap: Gap, at: int) -> None:
        if gap.reason != "start":
            self._gaps.append(gap)

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None) -> Iterable[Finding]:
        gaps, self._gaps = self._gaps, []
        return [self._finding(gap) for gap in gaps]

    def _finding(self, gap: Gap) -> Finding:
        seconds = None if gap.from_ is None else (gap.to - gap.from_) / NS_PER_S
        length = "of unknown length" if seconds is None else f"of {seconds:.3f} s"
        return Finding(
            None,
            f"{gap.epoch}:{gap.n}:{gap.reason}",
            gap.to,
            seconds,
            None,
            None,
            None,
            f"{gap.reason}, {length}: {','.join(gap.streams)} of {','.join(gap.pairs)}",
            gap.epoch,
            gap.n,
            severity="info" if gap.reason in HARMLESS else None,
        )

    def state(self) -> object:
        return self._gaps
