"""When which frame is due: market time against elapsed wall time, both passed in."""

import math
from collections.abc import Iterator

from simulator.frame import Frame

BATCH_FRAMES = 256
"""At most so many frames are taken at once: they are recorded together, then sent."""


class Tape:
    """Frames that become due while `speed` market seconds pass per wall second (inf: all are due at once).

    Reads one frame ahead, so what is wrong with a source's first frame is raised here.
    """

    def __init__(self, frames: Iterator[Frame], speed: float) -> None:
        self._frames = frames
        self._speed = speed
        self._next = next(frames, None)

    @property
    def over(self) -> bool:
        return self._next is None

    def due(self, elapsed_s: float) -> list[Frame]:
        """The next frames that are due by now, in order; frames whose time has come once stay due."""
        now_ns = math.inf if math.isinf(self._speed) else elapsed_s * self._speed * 1e9
        batch: list[Frame] = []
        while self._next is not None and self._next.offset_ns <= now_ns and len(batch) < BATCH_FRAMES:
            batch.append(self._next)
            self._next = next(self._frames, None)
        return batch

    def wait_s(self, elapsed_s: float) -> float:
        """Wall seconds until the next frame is due: 0 if it is already, inf if there is none."""
        if self._next is None:
            return math.inf
        return max(0.0, self._next.offset_ns / 1e9 / self._speed - elapsed_s)
