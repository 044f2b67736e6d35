"""The feed clock: what time it is on the exchanges, as far as the feed proves it. Pure.

It is the highest event time believed, moved on by elapsed receive time (less a margin) while the feed is
idle but alive. It never goes back; when it is ahead it stands still until events catch up. The wall clock's
only part is an upper bound, taken from receive times. The rules and the counterexamples that bought them
are in docs/feed-clock.md.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

from schemas.events import NS_PER_S

AHEAD_NS = 10 * NS_PER_S  # an event further past the extrapolated feed time than this is held back
HOLD_NS = 2 * NS_PER_S  # ... for at most this long
HOLD_EVENTS = 1_000  # ... or until this many events wait
WALL_AHEAD_NS = 60 * NS_PER_S  # nothing further past its own receive time is ever believed
MARGIN_NS = NS_PER_S  # how far an idle clock stays behind elapsed time: deliveries are never that uneven
LEAD_NS = NS_PER_S  # an exchange usually further ahead of all others than this does not move the clock
USUAL_EVENTS = 32  # ... judged by the median of so many of its events, half of them at least


class Claim(NamedTuple):
    """An event's claim about the time: `ts` in ns (None: it makes none), who claims it, and when it came."""

    ts: int | None
    exchange: int | None
    pair: str
    recv: int
    lagging: bool = False


class FeedClock:
    """`now` is the clock in ns, None until a first event is believed.

    `resume` is (clock, receive time) in ns of the log's last record: belief goes on across restarts.
    """

    def __init__(self, resume: tuple[int, int] | None = None) -> None:
        self.now: int | None = resume[0] if resume else None
        self._highest = self._last = resume
        # of its receive time, by exchange, its latest events
        self._ahead: defaultdict[int, deque[int]] = defaultdict(lambda: deque(maxlen=USUAL_EVENTS))
        self._leader: int | None = None

    def heard(self, claim: Claim) -> None:
        """Notes who speaks on this feed and how far ahead of its receive time, believed or not."""
        if claim.exchange is None:
            return
        ahead = self._ahead[claim.exchange]
        if claim.ts is not None:
            ahead.append(claim.ts - claim.recv)

    def find_leader(self) -> None:
        """Looks anew which exchange leads all others; once in a while is often enough. One that is further
        ahead than any clock is fast, the others are late, and its events must not be quarantined for it."""
        usual = ((median_low(ahead), x) for x, ahead in self._ahead.items() if len(ahead) >= USUAL_EVENTS // 2)
        first, second, *_ = [*sorted(usual, reverse=True), None, None]
        self._leader = first[1] if first and second and LEAD_NS < first[0] - second[0] < AHEAD_NS // 2 else None

    def leads(self, claim: Claim) -> bool:
        """Whether the claim comes from an exchange whose clock is usually fast: true enough, but it must not
        move ours. What is far ahead even of that is no habit, and judged like any other."""
        return self._leader is not None and claim.exchange == self._leader and self.in_bounds(claim)

    @staticmethod
    def possible(claim: Claim) -> bool:
        """Whether the claim makes sense at all, by the wall clock at which it was received."""
        return claim.ts is not None and claim.ts <= claim.recv + WALL_AHEAD_NS

    def in_bounds(self, claim: Claim) -> bool:
        """Whether the claim is at most 10 s past the time that the last believed events lead to."""
        if self._highest is None or not self.possible(claim):
            return False
        assert claim.ts is not None
        ts, recv = self._highest
        return claim.ts <= ts + max(0, claim.recv - recv) + AHEAD_NS

    def accept(self, ts: int, exchange: int | None, recv: int) -> int | None:
        """Hears and believes a claim that is in bounds; returns what the clock should be moved to. None: it is
        not in bounds, and nothing was done. The short way of `heard`, `in_bounds` and `believe`."""
        highest, now = self._highest, self.now
        if highest is None or now is None:
            return None
        since = recv - highest[1]
        if ts > highest[0] + (since if since > 0 else 0) + AHEAD_NS or ts > recv + WALL_AHEAD_NS:
            return None
        if exchange is not None:
            self._ahead[exchange].append(ts - recv)
            if exchange == self._leader:
                return now
        self._last = (ts, recv)
        if ts > highest[0]:
            self._highest = self._last
        return ts if ts > now else now

    def verdict(self, claim: Claim, later: Sequence[Claim], now: int) -> bool | None:
        """Whether to believe a claim, given the claims that came after it; None: too early to say.

        Believed when in bounds, when another exchange (another pair where the feed has one exchange)
        agrees within 10 s, or when nothing contradicted it in time.
        """
        if not self.possible(claim):
            return False
        if self.in_bounds(claim):
            return True
        assert claim.ts is not None
        contradicted = False
        for other in later:
            if other.ts is None or not self.possible(other):
                continue
            if abs(other.ts - claim.ts) > AHEAD_NS:
                behind = self._highest is None and other.ts < claim.ts
                contradicted = contradicted or behind or self.in_bounds(other)
            elif self._independent(claim, other):
                return True
        if now - claim.recv >= HOLD_NS or len(later) + 1 >= HOLD_EVENTS:
            return not contradicted
        return None

    def majority(self, claims: Sequence[Claim]) -> Claim | None:
        """The claim that most others are within 10 s of, the first of equals: who to believe first on a feed
        on which nobody independent agrees and some contradict."""
        times = sorted(claim.ts for claim in claims if claim.ts is not None and self.possible(claim))
        best, most = None, 0
        for claim in claims:
            if claim.ts is not None and self.possible(claim):
                near = bisect_right(times, claim.ts + AHEAD_NS) - bisect_left(times, claim.ts - AHEAD_NS)
                if near > most:
                    best, most = claim, near
        return best

    def _independent(self, one: Claim, other: Claim) -> bool:
        if len(self._ahead) > 1 and one.exchange is not None:
            return other.exchange is not None and other.exchange != one.exchange
        return other.pair != one.pair

    def believe(self, claim: Claim) -> int:
        """Takes a believed claim in; returns what the clock should be moved to (never back), in ns."""
        assert claim.ts is not None
        if self.now is not None and self.leads(claim):
            return self.now
        self._last = (claim.ts, claim.recv)
        if self._highest is None or claim.ts > self._highest[0]:
            self._highest = self._last
        return max(self.now or 0, claim.ts)

    def may_idle(self, now: int) -> bool:
        """Whether it is so long since the last believed event that an idle clock could move."""
        return self._last is not None and now - self._last[1] > MARGIN_NS

    def idle(self, now: int) -> int | None:
        """What an idle but living feed moves the clock to at receive time `now`."""
        if self._last is None or self.now is None:
            return None
        ts, recv = self._last
        return max(self.now, ts + now - recv - MARGIN_NS)
