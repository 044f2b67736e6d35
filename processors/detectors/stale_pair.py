"""A pair that has gone quiet, by its own expectation, while the feed has not."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec

from processors.detectors.base import Detector, Finding, QuoteSeen, TradeSeen, touches
from schemas.events import MINUTE_NS, NS_PER_S, Gap

MINUTES = 10  # that the longest silence is learned from
GIVEN_UP_NS = 5 * MINUTE_NS  # who was silent for so long is learned anew
LEAST_SILENCES = 20  # between seconds with something in them; fewer tell nothing of a pair

Stream = Literal["XT", "XQ"]


class _Flow:
    __slots__ = ("changed", "quote", "seen", "silences")

    def __init__(self) -> None:
        self.seen = 0  # the last event of any kind
        self.changed: int | None = None  # the last one with news; None: given up
        self.silences: dict[int, tuple[int, int]] = {}  # by the minute they end in: how many, the longest (ns)
        self.quote: tuple[float, float] | None = None

    def heard(self, at: int) -> None:
        if self.changed is not None and at > self.changed:
            count, longest = self.silences.get(at // MINUTE_NS, (0, 0))
            self.silences[at // MINUTE_NS] = count + 1, max(longest, at - self.changed)
        self.changed = at

    def longest(self, limit: Callable[[int], int]) -> int | None:
        """The longest silence of the minutes before the last sign of life, but for that of one minute which is past
        the limit that the others set; None where too few are known."""
        since = (self.changed or 0) // MINUTE_NS - MINUTES
        known = [silence for minute, silence in self.silences.items() if minute >= since]
        if sum(count for count, _ in known) < LEAST_SILENCES:
            return None
        *others, longest = sorted(longest for _, longest in known)
        return others[-1] if others and longest >= limit(others[-1]) else longest


class StalePair(Detector):
    """score = silence / longest silence of the ten minutes before it began, but for that of one minute which was itself
    out of the usual: one silence must not hide the next. Silent are trades without a trade, and quotes without another
    bid or ask: one that is sent again and again is frozen. Said once for each silence.

    Judged only at a tick that calls the stream itself fresh, and only for pairs whose threshold lies below five
    minutes: silence says nothing about a pair that is often as silent as that.
    """

    kind = "stale_pair"
    severity = "warning"
    memory_ns = 2 * GIVEN_UP_NS + (MINUTES + 1) * MINUTE_NS

    class Settings(Detector.Settings, frozen=True):
        times: Annotated[float, msgspec.Meta(gt=1)] = 4.0
        least_s: Annotated[float, msgspec.Meta(ge=1)] = 30.0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._flows: dict[tuple[str, Stream], _Flow] = {}
        self._least_ns: int = round(settings.least_s * NS_PER_S)

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        self._flow(symbol, "XT", at).heard(at)
        return ()

    def quotes(self, symbol: str, quotes: Sequence[QuoteSeen], at: int) -> Iterable[Finding]:
        flow = self._flow(symbol, "XQ", at)
        known = flow.quote
        for quote in quotes:
            if quote[:2] != known:
                flow.heard(at)
                flow.quote = quotes[-1][:2]
                break
        return ()

    def _flow(self, symbol: str, stream: Stream, at: int) -> _Flow:
        flow = self._flows.get((symbol, stream))
        if flow is None:
            flow = self._flows[symbol, stream] = _Flow()
        flow.seen = at
        return flow

    def gap(self, gap: Gap, at: int) -> None:
        for symbol, stream in list(self._flows):
            if stream in gap.streams and touches(gap, symbol):
                del self._flows[symbol, stream]

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None) -> Iterable[Finding]:
        findings = []
        least, given_up = tick - self._least_ns, tick - GIVEN_UP_NS
        for (symbol, stream), flow in list(self._flows.items()):
            if flow.changed is None or flow.changed > least:
                if flow.seen <= given_up:
                    del self._flows[symbol, stream]
                continue
            longest = flow.longest(self._limit)
            if longest is not None and (fresh is None or stream in fresh):
                limit = self._limit(longest)
                if before < flow.changed + limit <= tick and limit < GIVEN_UP_NS:
                    findings.append(self._finding(symbol, stream, flow.changed, longest, limit, tick))
            if flow.seen <= given_up:
                del self._flows[symbol, stream]
            elif flow.changed <= given_up:
                flow.changed, flow.silences = None, {}
        return findings

    def _limit(self, longest: int) -> int:
        limit: int = max(self._least_ns, round(self.settings.times * longest))
        return limit

    def _finding(self, symbol: str, stream: Stream, since: int, longest: int, limit: int, tick: int) -> Finding:
        silence = tick - since
        what = "trade" if stream == "XT" else "other quote"
        return Finding(
            symbol,
            f"{stream}:{since // NS_PER_S}",
            since,
            silence / NS_PER_S,
            longest / NS_PER_S,
            silence / longest,
            limit / longest,
            f"no {what} for {silence / NS_PER_S:.0f} s, before that for at most {longest / NS_PER_S:.0f} s",
        )

    def forget(self, tick: int) -> None:
        for flow in self._flows.values():
            since = (flow.changed or 0) // MINUTE_NS - MINUTES
            flow.silences = {minute: silence for minute, silence in flow.silences.items() if minute >= since}

    def state(self) -> object:
        return {key: (flow.seen, flow.changed, flow.silences, flow.quote) for key, flow in self._flows.items()}
