"""A stream that stopped delivering while the feed is alive."""

from collections.abc import Iterable, Sequence
from typing import Any

from processors.detectors.base import Detector, Finding, Onsets
from schemas.events import MINUTE_NS, Gap

STEADY_MINUTES = 3
NO_STREAMS: frozenset[str] = frozenset()


class StaleFeed(Detector):
    """A stream that a tick does not call fresh, and that every tick of the three whole minutes before did.

    Fresh is what the producer has proof of: the stream delivered within four times its longest usual silence
    (docs/feed-clock.md). A stream whose habits it is still learning comes and goes, hence the three minutes.
    """

    kind = "stale_feed"
    severity = "critical"
    memory_ns = (STEADY_MINUTES + 1) * MINUTE_NS

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._always: dict[int, frozenset[str]] = {}  # by minute: the streams that every tick called fresh
        self._onsets = Onsets(MINUTE_NS)

    def gap(self, gap: Gap, at: int) -> None:
        self._always = {minute: streams.difference(gap.streams) for minute, streams in self._always.items()}

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None) -> Iterable[Finding]:
        if fresh is None:
            return ()
        minute = tick // MINUTE_NS
        now = frozenset(fresh)
        self._always[minute] = self._always.get(minute, now) & now
        if self._always.get(minute - 1, NO_STREAMS) <= now:
            return ()
        return self._stale(minute, tick, now)

    def _stale(self, minute: int, tick: int, fresh: frozenset[str]) -> Iterable[Finding]:
        past = [self._always.get(minute - back, NO_STREAMS) for back in range(1, STEADY_MINUTES + 1)]
        for stream in sorted(frozenset.intersection(*past).difference(fresh)):
            if self._onsets.begins(stream, tick):
                detail = f"{stream} is not fresh any more"
                yield Finding(None, f"{stream}:{60 * minute}", tick, None, None, None, None, detail)

    def forget(self, tick: int) -> None:
        self._onsets.forget(tick)
        oldest = tick // MINUTE_NS - STEADY_MINUTES
        self._always = {minute: streams for minute, streams in self._always.items() if minute >= oldest}

    def state(self) -> object:
        return (self._always, self._onsets.state())
