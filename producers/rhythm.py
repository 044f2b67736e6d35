"""What is usual for one stream of the feed: how long it is quiet when nothing is wrong with it. Pure."""

from schemas.events import NS_PER_S

SPELLS_NS = 1800 * NS_PER_S  # quiet spells are remembered for one to two of these
FACTOR = 4  # silence is unusual when it lasts this many times the longest remembered spell
FROZEN_NS = NS_PER_S  # who looks twice a second and has not looked for this long was not running
EXPERIENCE = 6  # a silence that ended by itself is judged only after so many times `floor_ns`
KNOWN_FRAMES = 10  # before so many frames, or before `floor_ns` has been listened to, nothing is judged


class Rhythm:
    """Times are receive times in ns, never decreasing. A quiet pair is quiet and a busy one is not: there is
    no fixed timer, only `floor_ns`, below which no silence is called unusual. `lively`: it was seldom silent for a
    second while a former process listened, so that this one may judge it before it has experience of its own."""

    def __init__(self, floor_ns: int, lively: bool = False) -> None:
        self._floor_ns = floor_ns
        self._lively = lively
        self.last: int | None = None  # heard, or began to listen
        self._silent_since = self._looked = 0  # `last`, but for the time that we did not look
        self._frames = 0
        self._listened = 0
        self._longest = self._longest_before = 0
        self._since = 0
        self._fresh_start = True
        self._patience, self._given_up = 1, False

    def listen(self, now: int) -> None:
        """The feed begins, or begins again: silence until now was ours. Where connecting anew did not mend a
        stream, more patience is had with it each time: the others must not pay for it for ever."""
        self.last = self._silent_since = now
        self._looked = 0
        self._fresh_start = True
        if self._given_up:
            self._patience, self._given_up = 2 * self._patience, False

    def heard(self, now: int) -> bool:
        """A frame of this stream has come. Whether it had been silent for so long that events may have been
        withheld, though not for so long that the connection was given up."""
        self._patience, self._given_up = 1, False
        self._excuse(now)
        spell = now - self._silent_since
        experienced = self._frames >= KNOWN_FRAMES and self._listened >= EXPERIENCE * self._floor_ns
        unusual_ns = max(self._floor_ns // 5, FACTOR * self.longest_ns)
        if self._fresh_start and experienced:  # beside a gap a doubt costs little
            unusual_ns = 2 * self.longest_ns
        suspect = (experienced or self._lively) and spell > unusual_ns
        if self._fresh_start:  # how long it took from connecting says nothing of its habits
            self._fresh_start = False
        else:
            self._listened += spell
            if now - self._since > SPELLS_NS:
                self._longest_before, self._longest, self._since = self._longest, 0, now
            # A suspect silence is no habit yet: were it learned whole, the next stall would hide behind it.
            self._longest = max(self._longest, min(spell, 2 * self.longest_ns or unusual_ns) if suspect else spell)
        self._frames += 1
        self.last = self._silent_since = now
        return suspect

    @property
    def known(self) -> bool:
        """Whether enough was heard to judge a silence."""
        return self._frames >= KNOWN_FRAMES and self._listened >= self._floor_ns

    @property
    def longest_ns(self) -> int:
        """The longest quiet spell of the last half hour to hour."""
        return max(self._longest, self._longest_before)

    @property
    def usual_ns(self) -> int:
        """A silence up to this long is nothing unusual."""
        return max(self._floor_ns, FACTOR * self.longest_ns)

    @property
    def alive_until(self) -> int | None:
        """Until when what it delivered last proves it alive; None: it never delivered."""
        return self.last + self.usual_ns if self._frames and self.last is not None else None

    def fresh(self, now: int) -> bool:
        """Whether the stream has delivered within its usual interval."""
        return self.alive_until is not None and now <= self.alive_until

    def overdue(self, now: int) -> bool:
        """Whether it has been silent for longer than is usual. Once asked, to be asked more often than each
        `FROZEN_NS`: a silence while nobody asked is that of a stopped process, and no stream's habit."""
        self._excuse(now)
        self._looked = now
        patience = self._patience * self.usual_ns
        overdue = self.known and self.last is not None and now - self._silent_since > patience
        self._given_up = self._given_up or overdue
        return overdue

    def _excuse(self, now: int) -> None:
        if self._looked and now - self._looked > FROZEN_NS:
            self._silent_since += now - max(self._looked, self._silent_since)
            self._looked = now

    def suspect(self, now: int) -> bool:
        """Whether, now that the connection is gone, its last silence may already have been a stall."""
        return (self.known or self._lively) and self.last is not None and now - self.last > 2 * self.longest_ns
