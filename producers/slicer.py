"""From events as they come to records as they stand in the raw topic: order, time, numbers. Pure.

Everything that makes the log what it is is decided here: slices, ticks, gaps, epochs and numbers, the
record's timestamp. Bytes and receive times go in; records come out of `take()` in the order to publish.
"""

from collections import Counter, deque
from collections.abc import Container, Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import msgspec

from producers.clock import HOLD_EVENTS, HOLD_NS, Claim, FeedClock
from producers.rhythm import Rhythm
from producers.split import Item
from schemas.events import NOTHING_MISSED, NS_PER_MS, NS_PER_S
from schemas.partition import partition_of
from schemas.raw import GapValue, RawRecord, Runs, TickValue
from schemas.topics import PARTITIONS
from schemas.wire import Head


class SlicerSettings(msgspec.Struct, frozen=True):
    """`linger_ns`: how long a slice waits for more events. `usual_ns`: a silence up to this long is nothing
    unusual for any stream; what is for each, it learns. `settle_ns`: how long the first events after a gap
    are held to see what time it is, for one of them may be a late one."""

    linger_ns: int = 5 * NS_PER_MS
    max_events: int = 500
    max_bytes: int = 64 * 1024
    usual_ns: int = 10 * NS_PER_S
    settle_ns: int = 100 * NS_PER_MS


class Resume(msgspec.Struct, frozen=True):
    """Where the log stands: highest epoch, feed clock and receive time of the newest record, and the
    timestamp of each partition's last record (ms; None where there is none). `reason`: of the gap since then;
    `silent`: streams that may have been missed for longer, since when (ns; as a tick has it)."""

    epoch: int
    clock_ms: int
    recv_ns: int
    last_ms: list[int | None]
    reason: str = "away"
    silent: dict[str, int] = {}


class Suspicion(NamedTuple):
    """A gap in which perhaps nothing was missed; both ends in ns, as its records have them."""

    since: int
    to: int
    streams: list[str]


OTHERS = "*"  # among silent streams: all that are not named
LAGGING = ("XA", "XAS")  # their time is their start: a minute behind, where trades or quotes tell better


class _Slice:
    __slots__ = ("bytes", "opened", "parts", "runs")

    def __init__(self, opened: int) -> None:
        self.opened = opened
        self.parts: list[bytes] = []
        self.runs: list[list[int]] = []
        self.bytes = 1


class _Pending(NamedTuple):
    """A gap that began and ends with the next events: `since` in ns for each partition."""

    reason: str
    streams: list[str]
    since: list[int | None]


def _away(resume: Resume, streams: list[str]) -> list[_Pending]:
    """The gaps since the log's end."""
    last = [None if ms is None else ms * NS_PER_MS for ms in resume.last_ms]
    return _begin(resume.reason, streams, resume.silent, resume.clock_ms * NS_PER_MS, last)


def _begin(
    reason: str,
    streams: Iterable[str],
    silent: Mapping[str, int],
    end: int,
    last: list[int | None],
    stalled: Container[str] = (),
) -> list[_Pending]:
    """The gaps that begin at `end`, in each partition with the last that is known there. Of a stream that is silent by
    then it is a stall, since it was last heard; what has been silent for less than a second, or not at all, shares one
    gap since the first of them was heard: that is hardly too long."""
    others = silent.get(OTHERS, end)
    since = {stream: silent.get(stream, others) for stream in streams}
    lately = min((at for at in since.values() if _lately(at, end)), default=end)
    groups: dict[tuple[str, int], list[str]] = {}
    for stream, at in since.items():
        stall = stream in stalled or (stream in silent and not _lately(at, end))
        groups.setdefault(("stall" if stall else reason, lately if _lately(at, end) else at), []).append(stream)
    return _trades_first(
        _Pending(why, of, [known and min(known, at) for known in last]) for (why, at), of in groups.items()
    )


def _lately(at: int, end: int) -> bool:
    return end - at <= NS_PER_S


def _trades_first(gaps: Iterable[_Pending]) -> list[_Pending]:
    """A gap is a tick, and what closes at it must know of the gap."""
    return sorted(gaps, key=lambda gap: "XT" not in gap.streams)


def _whole_ms(ns: int) -> int:
    return ns - ns % NS_PER_MS


def _claim(head: Head | None, recv: int) -> Claim:
    if head is None:
        return Claim(None, None, "", recv)
    ms = head.time_ms
    return Claim(None if ms is None else ms * NS_PER_MS, head.x, head.pair, recv, head.ev in LAGGING)


class Slicer:
    """One producer epoch of the raw log. All times are receive times in ns, never decreasing."""

    def __init__(
        self,
        settings: SlicerSettings,
        streams: Iterable[str],
        pairs: Iterable[str],
        resume: Resume | None = None,
        epoch: int | None = None,
    ) -> None:
        self._settings = settings
        self._streams, self._pairs = list(streams), list(pairs)
        self.epoch = epoch or (resume.epoch + 1 if resume else 1)
        self.clock = FeedClock((resume.clock_ms * NS_PER_MS, resume.recv_ns) if resume else None)
        self._numbers = [0] * PARTITIONS
        self._open: dict[int, _Slice] = {}
        self._lingers_until = 0  # when the oldest open slice is due, or earlier
        self._held: deque[tuple[Item, Claim]] = deque()
        self._seen = 0  # of those held, how many the first one's verdict has taken into account
        self._settles_at: int | None = None
        self._now = 0
        self._connected = self._pongs = False
        silent, end = (resume.silent, resume.clock_ms * NS_PER_MS) if resume else ({}, 0)
        lively = {stream for stream, at in silent.items() if _lately(at, end)}
        self._rhythms = {stream: Rhythm(settings.usual_ns, stream in lively) for stream in self._streams}
        self._heard_at: dict[str, int] = {}  # the clock when a stream was last heard, once there is one
        self._unproven: dict[str, str] = {}  # streams that have not delivered since something, and what
        self.counts: Counter[str] = Counter()
        """Events so far, by subscribed stream; all else is `other`."""
        self._out: list[RawRecord] = []
        self._suspicions: list[Suspicion] = []
        self._gaps = _away(resume, self._streams) if resume else [_Pending("start", self._streams, [None] * PARTITIONS)]

    def take(self) -> list[RawRecord]:
        """The records made since the last call, in the order they must be published."""
        out, self._out = self._out, []
        return out

    def suspicions(self) -> list[Suspicion]:
        """The gaps since the last call that were made only because streams were silent."""
        out, self._suspicions = self._suspicions, []
        return out

    def nothing_missed(self, gap: Suspicion, now: int) -> bool:
        """Closes a gap that was suspected. False: not while another one is pending."""
        if self._gaps:
            return False
        for partition in list(self._open):
            self._close(partition)
        for partition in range(PARTITIONS):
            self._emit_gap(partition, gap.streams, gap.since, gap.to, NOTHING_MISSED, now)
        return True

    # -- what happens to the connection ------------------------------------------------------------

    def connected(self, now: int) -> None:
        """Subscribed: from here on the feed may be alive."""
        self._connected = True
        for rhythm in self._rhythms.values():
            rhythm.listen(now)
        if self._settles_at is not None:
            self._settles_at = now + self._settings.settle_ns

    def stalled(self, now: int) -> list[str]:
        """The streams that have been silent for longer than is usual for them, though connected."""
        return [stream for stream, rhythm in self._rhythms.items() if self._connected and rhythm.overdue(now)]

    def lost(self, reason: str, now: int) -> None:
        """The connection is gone. What came after the last frame or pong may have been missed; of a stream
        that was silent for longer than it usually is, whatever came after its own last event."""
        self.flush(now)
        if not self._gaps:
            self._gaps = self._missed_since(reason, now)
        self._connected = False
        self._unproven.clear()
        for rhythm in self._rhythms.values():
            rhythm.listen(now)  # what the vendor acknowledges first may flow before all is subscribed

    def _missed_since(self, reason: str, now: int) -> list[_Pending]:
        """The gaps that begin if nothing that comes is heard any more."""
        assert self.clock.now is not None
        last: list[int | None] = [self.clock.now] * PARTITIONS
        stalled = {*self._unproven, *self.stalled(now)}
        return _begin(reason, self._streams, self._silent(now), self.clock.now, last, stalled)

    def _silent(self, now: int) -> dict[str, int]:
        """The streams that may have been missed since, in feed time: those that have not delivered since something,
        and those whose silence is unusual, or will be if it lasts for another second."""
        silent = {
            stream: at
            for stream, at in self._heard_at.items()
            if stream in self._unproven or self._rhythms[stream].suspect(now + NS_PER_S)
        }
        known = [rhythm for rhythm in self._rhythms.values() if rhythm.known]
        # Where all that can be judged are silent, those that cannot are no better, and pongs prove nothing.
        if known and self._heard_at and all(rhythm.suspect(now) for rhythm in known):
            silent[OTHERS] = max(self._heard_at.values())
        return silent

    def dropped(self, tail: Resume) -> Resume:
        """What goes on from a log that ended at `tail` and could not take what was made since."""
        gaps = [gap.since for gap in self._gaps] + [[self.clock.now] * PARTITIONS]
        last = [
            None if ms is None or None in since else min(ms, *(at // NS_PER_MS for at in since if at is not None))
            for ms, *since in zip(tail.last_ms, *gaps, strict=True)
        ]
        return Resume(tail.epoch, tail.clock_ms, tail.recv_ns, last, "journal", self._silent(self._now))

    def pong(self, asked: int, now: int) -> None:
        """An answered ping: everything that the feed had sent when it was asked has arrived."""
        self._pongs = True
        self.advance(now)
        self._idle(asked, now)

    # -- events ------------------------------------------------------------------------------------

    def frame(self, items: list[Item], recv: int) -> None:
        """The events of one frame, in order."""
        self.advance(recv)
        if not self._pongs:  # they prove it better: a frame may have waited for long for a process that was stopped
            self._idle(recv, recv)
        heard: dict[str, int] = {}
        for item in items:
            ev = "bad" if item.head is None else item.head.ev
            heard[ev] = heard.get(ev, 0) + 1
        for ev, count in heard.items():
            rhythm = self._rhythms.get(ev)
            if rhythm is not None and rhythm.heard(recv) and not self._gaps:
                self._unproven.setdefault(ev, "silence")
            self.counts[ev if rhythm is not None else "other"] += count
        clock = self.clock
        for item in items:
            head = item.head
            if not self._held and not self._gaps:
                if head is None or (ms := head.time_ms) is None:
                    self._append(item, recv)
                    continue
                to = clock.accept(ms * NS_PER_MS, head.x, recv)
                if to is not None:
                    if to != clock.now:
                        self._move(to, recv)
                    self._append(item, recv)
                    continue
            claim = _claim(head, recv)
            clock.heard(claim)
            self._hold(item, claim)
        if clock.now is not None:
            for stream in (heard.keys() & self._rhythms.keys()) - self._unproven.keys():
                self._heard_at[stream] = clock.now

    def _hold(self, item: Item, claim: Claim) -> None:
        self._held.append((item, claim))
        if self._gaps and self._settles_at is None and (self.clock.now is not None or self.clock.possible(claim)):
            self._settles_at = claim.recv + self._settings.settle_ns
        self._release(claim.recv)

    def _release(self, now: int, final: bool = False) -> None:
        """Lets held events go, in order, as far as can be said now what to believe."""
        if self._gaps and not self._end_gap(now, final):
            return
        while self._held:
            item, claim = self._held[0]
            believed = self.clock.in_bounds(claim)
            if not believed and self.clock.possible(claim):
                verdict = self._verdict(claim, now)
                if verdict is None:
                    return
                believed = verdict
            self._held.popleft()
            self._seen = 0
            if believed:
                self._move(self.clock.believe(claim), claim.recv)
            self._append(item, claim.recv)

    def _verdict(self, claim: Claim, now: int) -> bool | None:
        """Of the first that is held. As long as it is too early to say, those that it was asked with before tell
        nothing new, and to ask a thousand with each that comes would take all the time there is."""
        seen, self._seen = self._seen, len(self._held)
        if now - claim.recv >= HOLD_NS or len(self._held) >= HOLD_EVENTS:
            seen = 0
        others = islice(self._held, max(1, seen), None)
        return self.clock.verdict(claim, [other for _, other in others], now)

    def _end_gap(self, now: int, final: bool) -> bool:
        """Ends the gap once the events after it say what time it is; whether it is ended.

        The first held event to be believed decides; if nothing in 2 s or 1,000 events tells the time, the
        clock goes by elapsed time. Where there is no clock yet the time begins to count with the first event
        that tells any: no wall clock must begin a log. The first event may be a late one, so those that came
        with it may move the end on, as far as they are in bounds. Nothing ends it before all is subscribed: what
        the vendor has acknowledged flows while the rest is still missed.
        """
        full = len(self._held) >= HOLD_EVENTS
        if self._settles_at is None:
            if full:  # and there is no clock yet: these lie in the gap `start`
                self._held.clear()
            return False
        if not (final or (self._connected and (full or now >= self._settles_at))):
            return False
        claims = [claim for _, claim in self._held]
        waited = final or full or now >= self._settles_at - self._settings.settle_ns + HOLD_NS
        possible = [claim for claim in claims if self.clock.possible(claim)]
        telling = [claim for claim in possible if not (claim.lagging or self.clock.leads(claim))] or possible
        believed = self._first_belief(telling, now, waited)
        if believed is not None:
            self.clock.believe(believed)
            first = [c for c in telling if c.recv <= self._settles_at]
            clock = max(c.ts or 0 for c in [believed, *first] if self.clock.in_bounds(c))
        elif waited and (idle := self.clock.idle(claims[-1].recv)) is not None:
            clock = idle
        else:
            return False
        clock = max(clock, self.clock.now or 0)
        gaps, self._gaps, self._settles_at = self._gaps, [], None
        for partition in list(self._open):
            self._close(partition)
        self.clock.now = clock
        for gap in gaps:
            for partition, since in enumerate(gap.since):
                reason = "start" if since is None else gap.reason
                self._emit_gap(partition, gap.streams, since, clock, reason, claims[-1].recv)
        delivered = {item.head.ev for item, _ in self._held if item.head is not None}
        for gap in gaps:
            if gap.reason == "stall":
                self._suspect(gap.streams, gap.since[0], clock)
                self._unproven |= dict.fromkeys(set(gap.streams) - delivered, "stall")
        self._heard_at = dict.fromkeys(self._streams, clock)
        for stream in self._rhythms.keys() - delivered:
            self._rhythms[stream].listen(now)  # its silence until now lies in the gap
        return True

    def _prove(self, stream: str, now: int) -> None:
        """A stream delivers again that was silent for suspiciously long, or that had stalled and that connecting
        anew had not mended."""
        reason = self._unproven.pop(stream)
        for partition in list(self._open):
            self._close(partition)
        since, until = self._heard_at[stream], self.clock.now
        for partition in range(PARTITIONS):
            self._emit_gap(partition, [stream], since, until, reason, now)
        self._suspect([stream], since, until)

    def _suspect(self, streams: list[str], since: int | None, to: int | None) -> None:
        if since is not None and to is not None:
            self._suspicions.append(Suspicion(since, _whole_ms(to), streams))

    def _first_belief(self, claims: list[Claim], now: int, waited: bool) -> Claim | None:
        """The first claim to be believed; None: there is none, or it is too early to say."""
        for at, claim in enumerate(claims):
            verdict = self.clock.verdict(claim, claims[at + 1 :], now)
            if verdict:
                return claim
            if verdict is None and not waited:
                return None
        return self.clock.majority(claims) if waited and self.clock.now is None else None

    def _append(self, item: Item, recv: int) -> None:
        head = item.head
        if head is None:
            self._close(0)
            self._emit(0, "bad", [(recv, 1)], item.data)
            return
        if self._unproven and head.ev in self._unproven:
            self._prove(head.ev, recv)
        partition = partition_of(head.pair)
        piece = self._open.get(partition)
        size = len(item.data) + 1
        if piece is not None and piece.bytes + size > self._settings.max_bytes:
            self._close(partition)
            piece = None
        if piece is None:
            if not self._open:
                self._lingers_until = recv + self._settings.linger_ns
            piece = self._open[partition] = _Slice(recv)
        piece.parts.append(item.data)
        piece.bytes += size
        runs = piece.runs
        if runs and runs[-1][0] == recv:
            runs[-1][1] += 1
        else:
            runs.append([recv, 1])
        if len(piece.parts) >= self._settings.max_events:
            self._close(partition)

    # -- time --------------------------------------------------------------------------------------

    def advance(self, now: int) -> None:
        """Does what is due at `now`: closes lingering slices, lets held events go."""
        self._now = now
        if self._held:
            self._release(now)
        if self._open and now >= self._lingers_until:
            for partition in [p for p, s in self._open.items() if now - s.opened >= self._settings.linger_ns]:
                self._close(partition)
            opened = min((s.opened for s in self._open.values()), default=now)
            self._lingers_until = opened + self._settings.linger_ns

    def _idle(self, until: int, now: int) -> None:
        """Moves the clock on by elapsed time, as far as a frame or a pong proves that nothing came meanwhile:
        by itself it would run on while a connection is dead and nobody knows yet, and what was missed then
        would lie before the last tick, in no gap."""
        if self.clock.may_idle(until):
            alive_until = self._alive_until()
            if alive_until is not None:
                idle = self.clock.idle(min(until, alive_until))
                if idle is not None:
                    self._move(idle, now)

    def deadline(self) -> int | None:
        """The receive time at which `advance` next has something to do, if nothing comes before."""
        due = [s.opened + self._settings.linger_ns for s in self._open.values()]
        if self._settles_at is not None and self._settles_at > self._now:
            due.append(self._settles_at)
        for _, claim in self._held:
            if claim.recv + HOLD_NS > self._now:
                due.append(claim.recv + HOLD_NS)
                break
        return min(due, default=None)

    def _alive_until(self) -> int | None:
        """The receive time up to which the feed may be taken for alive; None: it is not, or must not tick now."""
        if not self._connected or self._held or self._gaps:
            return None
        lively = [stream for stream in self._streams if stream not in LAGGING] or self._streams
        return max((until for name in lively if (until := self._rhythms[name].alive_until)), default=None)

    def _move(self, to: int, now: int) -> None:
        """Moves the clock; at a new whole second closes every slice and ticks, before what moved it."""
        second = to // NS_PER_S * NS_PER_S
        if self.clock.now is None or second > self.clock.now:
            for partition in list(self._open):
                self._close(partition)
            self.clock.now = second
            self.clock.find_leader()
            fresh = sorted(stream for stream, rhythm in self._rhythms.items() if rhythm.fresh(now))
            value = msgspec.json.encode(TickValue(fresh, self._silent(now)))
            for partition in range(PARTITIONS):
                self._emit(partition, "tick", [(now, 1)], value)
        self.clock.now = to

    # -- records -----------------------------------------------------------------------------------

    def _close(self, partition: int) -> None:
        piece = self._open.pop(partition, None)
        if piece is not None:
            runs = [(recv, count) for recv, count in piece.runs]
            self._emit(partition, "slice", runs, b"[" + b",".join(piece.parts) + b"]")

    def _emit_gap(
        self, partition: int, streams: list[str], since: int | None, to: int | None, reason: str, now: int
    ) -> None:
        """It ends within the millisecond that its record is stamped with."""
        value = GapValue(since, None if to is None else _whole_ms(to), streams, self._pairs, reason)
        self._emit(partition, "gap", [(now, 1)], msgspec.json.encode(value))

    def _emit(self, partition: int, kind: str, recv: Runs, value: bytes) -> None:
        assert self.clock.now is not None
        number = self._numbers[partition]
        record = RawRecord(partition, self.clock.now // NS_PER_MS, kind, self.epoch, number, recv, value)
        self._numbers[partition] = number + record.events
        self._out.append(record)

    def stop(self, now: int) -> None:
        """An orderly end: everything held goes out, and a `stop` gap opens that the next start closes.
        Without a clock there was never an event, and nothing is written."""
        self.flush(now)
        if self.clock.now is not None:
            for gap in self._gaps or self._missed_since("stop", now):
                for partition, since in enumerate(gap.since):
                    self._emit_gap(partition, gap.streams, since, None, "stop", now)

    def flush(self, now: int) -> None:
        """Everything held or lingering goes out now, as after the longest wait; but no record can be made while
        nothing has told the time yet."""
        if self._held:
            if self._settles_at is not None and not self._connected:
                self._settles_at = now
            self._release(max(now, *(claim.recv + HOLD_NS for _, claim in self._held)), final=True)
        for partition in list(self._open):
            self._close(partition)
