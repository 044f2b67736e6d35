"""Stage two: bars of 5m to 1d from a partition of `bars.1m.v1`. Pure, as the pipeline is.

A range's bar is a function of the newest record of each of its minutes and of the gaps noted, and is emitted only at
a minute marker higher than any before; hence records may repeat, and a lower order may follow a higher.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal, Inexact, InvalidOperation
from functools import reduce
from typing import NamedTuple

from processors.operators.rollup import AGGREGATES, EMPTY, FLAGS, HOUR_NS, Hour, merge, row_of
from processors.pipeline import Output, dead_letter
from schemas import topics, wire
from schemas.events import (
    INTERVALS_NS,
    MINUTE_NS,
    NOTHING_MISSED,
    NS_PER_MS,
    Bar,
    MinuteClosed,
    MinuteEmpty,
    Missed,
    decode_bar,
    encode,
)
from schemas.numbers import EXACT, VWAP, ZERO, canonical

DAY_NS = INTERVALS_NS["1d"]
SKEW_NS = HOUR_NS  # by which a record's time may be behind that of one before it
EMITTED_NS = 3 * DAY_NS  # a range that began longer before the marker is not emitted
KEPT_NS = EMITTED_NS + SKEW_NS
FOREIGN_EPOCH = -(2**62)  # of dead letters; the pipeline has its own, repairs have their numbers below 0
MOST = 2**48  # any count or number of ours is far below, and the sums of a day stay within 64 bits
LARGE = Decimal("1e50")  # far above the sums of a minute's accepted numbers
WIDE = Decimal("1e60")  # far above a day's: what can be added to it exactly can be added up
TOO_MUCH = WIDE + LARGE
_QUALITY = Decimal("0.0001")
_ROLLUPS_NS = {interval: length for interval, length in INTERVALS_NS.items() if interval in topics.ROLLUPS}


class BarRecord(NamedTuple):
    """A record of `bars.1m.v1`. Its offset is the identity of what turns out to be none."""

    timestamp_ms: int
    value: bytes
    offset: int


class _Gap(NamedTuple):
    """A gap in trades, or the word that one of this stretch was empty; `pairs` None: all of them. Both ends belong
    to it."""

    since: int
    to: int
    pairs: frozenset[str] | None
    start: bool
    empty: bool

    def touches(self, start: int, end: int) -> bool:
        """Whether it lies in [start, end), be it with one moment."""
        return self.since < end and self.to >= start

    def concerns(self, symbol: str) -> bool:
        return self.pairs is None or symbol in self.pairs


class Rollups:
    """The rollups of one partition. `cut`: the first record it is given is the first that retention left of the log,
    so that nobody knows what stood before it; ranges that began before it are then not emitted.

    A rebuild that begins at a later record, one that it found by time, is not cut: what stands before that is older
    than anything that counts.
    """

    memory_ns = 4 * DAY_NS + SKEW_NS

    def __init__(self, partition: int, cut: bool = False) -> None:
        self.partition = partition
        self.counts: Counter[str] = Counter()
        self._cut = cut
        self._clock = 0  # the highest time of a record
        self._kept = 0  # the first hour that is kept, and the first that can be in a bar
        self._covered = 0  # ranges that began earlier are not known whole
        self._closed = 0  # the end of the highest marker
        self._hours: dict[int, dict[str, Hour]] = {}
        self._open: dict[tuple[int, str], Hour] = {}  # those not packed, the one used last at the end
        self._gaps: set[_Gap] = set()
        self._noted: set[_Gap] = set()  # gaps since the highest marker
        self._changed: set[tuple[int, str]] = set()  # closed minutes with a newer record since then

    @property
    def tick(self) -> int | None:
        """How far it has come: the end of the highest marker, ns."""
        return self._closed or None

    @property
    def taken_ms(self) -> int | None:
        """The highest timestamp of a record that was taken, ms."""
        return self._clock // NS_PER_MS or None

    def process(self, record: BarRecord) -> list[Output]:
        """The bars that the next record of the log brings; what is no record of ours becomes a dead letter."""
        if self._cut:  # by the time of the first record there is, whatever it is
            self._cut, self._covered = False, record.timestamp_ms * NS_PER_MS + SKEW_NS
        try:
            event = decode_bar(record.value)
            clock = max(self._clock, record.timestamp_ms * NS_PER_MS)
            _check(event, clock + SKEW_NS)
        except (*wire.DECODE_ERRORS, _Unsound, Inexact, InvalidOperation) as error:
            self.counts["deadletter"] += 1
            reason = f"not a bar of one minute: {error}"
            letter = dead_letter(record.value, reason, 0, FOREIGN_EPOCH, self.partition, record.offset)
            return [Output(topics.DEAD_LETTERS.name, None, encode(letter), record.timestamp_ms)]
        if clock > self._clock:
            self._advance(clock)
        if isinstance(event, MinuteClosed):
            return [
                Output(topics.ROLLUPS[bar.interval].name, bar.symbol.encode(), encode(bar), record.timestamp_ms)
                for bar in self._marker(event)
            ]
        if event.start >= self._kept:
            self._minute(event)
        return []

    def _advance(self, clock: int) -> None:
        """Forgets what is too old to be in a bar that is still emitted."""
        self._clock = clock
        kept = clock - KEPT_NS
        kept -= kept % HOUR_NS
        if kept <= self._kept:
            return
        self._kept = kept
        self._closed = max(self._closed, kept)
        self._covered = max(self._covered, kept)
        for hour in [hour for hour in self._hours if hour < kept]:
            for symbol in self._hours.pop(hour):
                self._open.pop((hour, symbol), None)
        self._gaps = {gap for gap in self._gaps if gap.to >= kept}
        self._noted &= self._gaps
        self._changed = {(minute, symbol) for minute, symbol in self._changed if minute >= kept}

    def _minute(self, event: Bar | MinuteEmpty) -> None:
        start, symbol = event.start, event.symbol
        hour = start - start % HOUR_NS
        symbols = self._hours.setdefault(hour, {})
        held = symbols.get(symbol)
        if held is None:
            held = symbols[symbol] = Hour()
        if held.put(start // MINUTE_NS % 60, row_of(event)) and start < self._closed:
            self._changed.add((start, symbol))
        self._use(hour, symbol, held)

    def _use(self, hour: int, symbol: str, held: Hour) -> None:
        """Packs what was not worked with for longest: two hours of each symbol stay open."""
        before = self._open.pop((hour, symbol), None)
        self._open[hour, symbol] = held
        if before is None:
            most = 2 * max(map(len, self._hours.values()))
            while len(self._open) > most:
                self._open.pop(next(iter(self._open))).pack()

    # -- markers -----------------------------------------------------------------------------------

    def note(self, missed: Iterable[Missed]) -> None:
        """Gaps that a marker tells of, or that who knows more than the log so far knows of."""
        noted = {_gap_of(gap) for gap in missed if gap.to >= self._kept} - self._gaps
        self._gaps |= noted
        self._noted |= noted

    def _marker(self, marker: MinuteClosed) -> Iterator[Bar]:
        """What the marker closes, and what was closed and has changed since the one before."""
        self.note(marker.missed)
        if marker.end <= self._closed:
            return
        before, self._closed = self._closed, marker.end
        changed, self._changed = self._changed, set()
        noted, self._noted = self._noted, set()
        oldest = max(self._covered, marker.end - EMITTED_NS)
        for interval, length in _ROLLUPS_NS.items():
            first = -(-oldest // length) * length
            ranges: dict[int, set[str]] = {}
            for start in range(max(first, before - before % length), marker.end - length + 1, length):
                ranges[start] = self._symbols(start, length)
            for minute, symbol in changed:
                start = minute - minute % length
                if first <= start <= before - length:
                    ranges.setdefault(start, set()).add(symbol)
            for gap in noted:
                since = max(first, gap.since - gap.since % length)
                for start in range(since, min(before - length, gap.to) + 1, length):
                    symbols = self._symbols(start, length)
                    ranges.setdefault(start, set()).update(filter(gap.concerns, symbols))
            for start, symbols in sorted(ranges.items()):
                for symbol in sorted(symbols):
                    bar = self._bar(interval, start, start + length, symbol, marker.fingerprint)
                    if bar is not None:
                        yield bar

    def _symbols(self, start: int, length: int) -> set[str]:
        """Those that may have a bar in the range."""
        return set().union(*(self._hours.get(hour, ()) for hour in _hours(start, start + length)))

    def _bar(self, interval: str, start: int, end: int, symbol: str, fingerprint: str) -> Bar | None:
        """The bar as it stands; None where no minute has one."""
        rows = []
        known = 0  # a bit for each minute that has a record, from the first hour on
        hours = _hours(start, end)
        for hour in hours:
            held = self._hours.get(hour, {}).get(symbol)
            if held is not None:
                since = max(start, hour)
                row = held.part(since // MINUTE_NS % 60, (min(end, hour + HOUR_NS) - since) // MINUTE_NS)
                if row is not None:
                    rows.append(row)
                    known |= row.known << (hour - hours.start) // MINUTE_NS
        whole = merge(rows)
        if whole is None or whole.marks & EMPTY:
            return None
        marks, missing_ns = whole.marks, whole.missing_ns
        gaps = [gap for gap in self._gaps if gap.touches(start, end) and gap.concerns(symbol)]
        if gaps:
            unknown = ~(known >> (start - hours.start) // MINUTE_NS) & _minutes(0, end - start - 1)
            added, missed_ns = _missed(_still_open(gaps), start, end, unknown)
            marks |= added
            missing_ns += missed_ns
        return Bar(
            symbol,
            interval,
            start,
            end,
            whole.open,
            whole.high,
            whole.low,
            whole.close,
            canonical(whole.volume),
            canonical(VWAP.divide(whole.notional, whole.volume)),
            canonical(whole.notional),
            whole.count,
            canonical(whole.buy),
            canonical(EXACT.subtract(EXACT.subtract(whole.volume, whole.buy), whole.unsided)),
            "final",
            whole.repair,
            whole.revision + len(gaps),
            [flag for flag, mark in FLAGS.items() if marks & mark],
            missing_ns,
            canonical((1 - Decimal(missing_ns) / (end - start)).quantize(_QUALITY)),
            "aggregates" if marks & AGGREGATES else "trades",
            fingerprint,
        )

    def state(self) -> object:
        """Everything that later outputs depend on, comparable."""
        return (
            self._clock,
            self._closed,
            self._covered,
            {hour: {s: held.rows() for s, held in symbols.items()} for hour, symbols in self._hours.items()},
            self._gaps,
            self._noted,
            self._changed,
        )


class _Unsound(ValueError):
    """The record is of the right shape and yet none that a pipeline makes."""


def _check(event: Bar | MinuteClosed | MinuteEmpty, latest: int) -> None:
    """Raises _Unsound, Inexact or InvalidOperation. What is further ahead than `latest` would stand for ever in
    a state that a rebuild could not restore."""
    ends = [event.end]
    if isinstance(event, MinuteClosed):
        ends += [missed.to for missed in event.missed]
    elif event.start % MINUTE_NS or event.end != event.start + MINUTE_NS:
        raise _Unsound("not a minute")
    if event.end < 0 or max(ends) > latest:
        raise _Unsound("its time is ahead of the log's")
    if isinstance(event, Bar):
        if event.interval != "1m" or event.status != "final":
            raise _Unsound(f"{event.status} bar of {event.interval}")
        prices = (event.open, event.high, event.low, event.close)
        numbers = (*prices, event.volume, event.notional, event.buy_volume, event.sell_volume)
        if not (min(numbers) >= ZERO and event.volume and reduce(EXACT.add, numbers, WIDE) < TOO_MUCH):
            raise _Unsound("a number out of bounds")
        counts = (event.repair, event.revision, event.trade_count, event.missing_ns)
        if min(counts) < 0 or max(counts) >= MOST or event.missing_ns > MINUTE_NS:
            raise _Unsound("a count out of bounds")
    elif isinstance(event, MinuteEmpty) and not 0 < event.repair < MOST:
        raise _Unsound("not the number of a repair")


def _gap_of(missed: Missed) -> _Gap:
    pairs = None if "*" in missed.pairs else frozenset(missed.pairs)
    since = min(missed.from_ or 0, missed.to)
    return _Gap(since, missed.to, pairs, missed.reason == "start", missed.reason == NOTHING_MISSED)


def _still_open(gaps: Iterable[_Gap]) -> list[_Gap]:
    """Without those whose stretch was said to be empty, and without that word."""
    empty = {gap[:3] for gap in gaps if gap.empty}
    return [gap for gap in gaps if gap[:3] not in empty]


def _hours(start: int, end: int) -> range:
    """The hours that [start, end) has a part of."""
    return range(start - start % HOUR_NS, end, HOUR_NS)


def _missed(gaps: Iterable[_Gap], start: int, end: int, unknown: int) -> tuple[int, int]:
    """Of the minutes without a record, a bit each from `start` on: the flags for the gaps that touch them, as `marks`,
    and how much of them these cover, ns."""
    marks = missing_ns = 0
    reached = start
    for gap in sorted(gaps, key=lambda gap: gap.since):
        since, to = max(gap.since, start), min(gap.to, end)
        if unknown & _minutes(since - start, min(to, end - 1) - start):
            marks |= FLAGS["partial"] if gap.start else FLAGS["partial"] | FLAGS["gap"]
        if to > reached:
            missing_ns += _within(max(since, reached) - start, to - start, unknown)
            reached = to
    return marks, missing_ns


def _minutes(first: int, last: int) -> int:
    """A bit for each minute from that of `first` to that of `last`, ns since the start of the range."""
    return (2 << last // MINUTE_NS) - (1 << first // MINUTE_NS)


def _within(since: int, to: int, unknown: int) -> int:
    """How much of [since, to) is in those minutes, ns."""
    first, last = since // MINUTE_NS, (to - 1) // MINUTE_NS
    length = (unknown & _minutes(since, to - 1)).bit_count() * MINUTE_NS
    length -= (unknown >> first & 1) * (since - first * MINUTE_NS)
    return length - (unknown >> last & 1) * ((last + 1) * MINUTE_NS - to)
