"""A model of the raw log of one partition: any market, cut into records and sent in every way.

A script of steps becomes epochs of *atoms*, the things that take a number in the log, in the order and with
the feed clock that docs/design.md promises (a tick before the event that moved the clock, no record a second
or more past the last tick). Atoms are cut into records, and records are sent the way a producer on a bad day
sends them. What ought to be taken in the end is known by construction, not by another filter.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st

from processors.pipeline import Output, Pipeline
from processors.settings import PipelineSettings
from schemas.events import MINUTE_NS, NS_PER_MS, NS_PER_S
from schemas.raw import GapValue, RawRecord, TickValue
from schemas.wire import STREAMS
from tapedeck.history import Entry

PARTITION = 1
PAIRS = ("BTC-USD", "SOL-USD", "XRP-USD")  # murmur2 puts all three there
START_MS = 1_732_200_000_000  # a whole minute
SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000

SETTINGS = (
    PipelineSettings(),
    PipelineSettings(lateness_ns=2 * MINUTE_NS),
    PipelineSettings(lateness_ns=2 * MINUTE_NS, grace_ns=0),
    PipelineSettings(lateness_ns=150 * NS_PER_S + 500 * NS_PER_MS, grace_ns=30 * NS_PER_S),
)

# -- steps ------------------------------------------------------------------------------------------


class Wait(NamedTuple):
    """Time goes by on a living feed."""

    ms: int


class Trade(NamedTuple):
    """A trade `back_ms` before the clock, the last tick or the clock's minute; `id` None: one never used."""

    back_ms: int = 0
    anchor: str = "clock"
    id: int | None = None
    pair: str = "BTC-USD"
    exchange: int = 1
    price: str = "61837.63"
    size: str = "0.5"
    conditions: str = "[1]"


class Quote(NamedTuple):
    back_ms: int = 0
    pair: str = "BTC-USD"
    exchange: str = "1"
    bid: str = "61837.6"
    ask: str = "61837.70"


class Aggregate(NamedTuple):
    """The vendor's bar of the minute that began `minutes` ago."""

    minutes: int = 1
    pair: str = "BTC-USD"
    volume: str = "3.5"


class Odd(NamedTuple):
    """JSON that is no event of ours."""

    data: bytes


class Bad(NamedTuple):
    """Bytes that are not JSON."""

    data: bytes


class Hush(NamedTuple):
    """`silence_ms` in which the feed was away, and the gap that marks it; `since_ms`, `until_ms`: how far
    before its end the gap says that it began and ended (None: null)."""

    silence_ms: int
    since_ms: int | None
    until_ms: int | None = 0
    streams: tuple[str, ...] = STREAMS
    pairs: tuple[str, ...] = ("*",)
    reason: str = "reconnect"


class NothingMissed(NamedTuple):
    """The word that the gap `back` before the last one was empty."""

    back: int


class Crash(NamedTuple):
    """The producer dies and another takes over after `away_ms`."""

    away_ms: int


Step = Wait | Trade | Quote | Aggregate | Odd | Bad | Hush | NothingMissed | Crash

ODD = (
    b"5",
    b"null",
    b'"XT"',
    b"[]",
    b"{}",
    b'{"ev":"XL2","pair":"BTC-USD","t":1732200000000}',
    b'{"ev":"XT"}',
    b'{"ev":"XT","pair":"BTC-USD","p":-1,"s":1,"t":1732200000000,"i":1,"x":1}',
    b'{"ev":"XT","pair":"BTC-USD","p":1,"s":0,"t":1732200000000,"i":2,"x":1}',
    b'{"ev":"XT","pair":"BTC-USD","p":1,"s":1,"t":1732200000,"i":3,"x":1}',
    b'{"ev":"XT","pair":"nonsense!","p":1,"s":1,"t":1732200000000,"i":4,"x":1}',
    b'{"ev":"XT","pair":"BTC-USD","p":"NaN","s":1,"t":1732200000000,"i":5,"x":1}',
    b'{"ev":"XQ","pair":"SOL-USD","bp":1,"t":1732200000000}',
    b'{"ev":"XA","pair":"SOL-USD","o":1,"h":1,"l":1,"c":1,"v":1,"s":1732200060000,"e":1732200000000}',
    b'{"ev":"XT","pair":"BTC-USD","p":1,"s":1,"t":1732200000000,"i":"\xff","x":1}',
)

pairs = st.sampled_from(PAIRS)
waits = st.builds(
    Wait,
    st.sampled_from([1, 40, 300, 999, SECOND, 2_500, 7_000, 30_000, MINUTE, 61_000, 5 * MINUTE, 16 * MINUTE]),
)
LATE_MS = (0, 1, 30, 500, 1_999, 9_000, 59_999, MINUTE, 119_999, 2 * MINUTE, 150_500, 151_000)
VERY_LATE_MS = (5 * MINUTE, 899_999, 15 * MINUTE, 900_001, 16 * MINUTE, 22 * MINUTE, HOUR)
AHEAD_MS = (-1, -900, -9_999, -10_000, -10_001, -5 * MINUTE, -HOUR, -650_000 * HOUR)
trades = st.builds(
    Trade,
    st.sampled_from((0, 0, 0, *LATE_MS, *LATE_MS, *VERY_LATE_MS, *AHEAD_MS)),
    st.sampled_from(["clock", "clock", "tick", "minute"]),
    st.sampled_from([None, None, None, 0, 1, 2]),
    pairs,
    st.sampled_from([1, 2]),
    st.sampled_from(["61837.63", "61837.630", "61790", "6.2e4", "0.000000012345", "99999999999.123456789"]),
    st.sampled_from(["0.5", "4.522e-05", "1", "0.1", "0.2", "1e-18", "7.000"]),
    st.sampled_from(["[1]", "[2]", "[0]", "[]", "null", "[1,2]"]),
)
quotes = st.builds(
    Quote,
    st.sampled_from([0, 5, 700, MINUTE, *AHEAD_MS]),
    pairs,
    st.sampled_from(["1", "2", "null"]),
    st.sampled_from(["61837.6", "61837.6", "61840", "0"]),
    st.sampled_from(["61837.70", "61837.70", "61837.6", "99999", "0"]),
)
aggregates = st.builds(Aggregate, st.sampled_from([1, 1, 2, 30, -1]), pairs, st.sampled_from(["3.5", "0", "1e3"]))
hushes = st.builds(
    Hush,
    st.sampled_from([0, 1, 700, 5_000, MINUTE, 10 * MINUTE, 40 * MINUTE, 3 * HOUR]),
    st.sampled_from([None, 0, 300, 5_000, 61_000, 10 * MINUTE, 40 * MINUTE, 3 * HOUR]),
    st.sampled_from([0, 0, 0, None, 100, MINUTE, 20 * MINUTE, -5_000]),
    st.sampled_from([STREAMS, STREAMS, ("XT",), ("XQ",), ()]),
    st.sampled_from([("*",), ("*",), PAIRS[:1], PAIRS[1:], ("ETH-USD",)]),
    st.sampled_from(["reconnect", "stop", "start"]),
)
oddities = st.one_of(
    st.builds(Odd, st.sampled_from(ODD)), st.builds(Bad, st.sampled_from([b"", b"[{", b"\xff\xfe", b"NaN"]))
)
words = st.builds(NothingMissed, st.sampled_from([0, 0, 0, 1, 2]))
market = st.one_of(trades, trades, trades, trades, waits, waits, quotes, aggregates, hushes, words, oddities)
crashes = st.builds(Crash, st.sampled_from([200, 3_000, 2 * MINUTE, 20 * MINUTE, 5 * HOUR]))


def scripts(steps: st.SearchStrategy[Any], longest: int = 90) -> st.SearchStrategy[list[Step]]:
    """Short scripts to shrink to, long ones to find something."""
    return st.one_of(st.lists(steps, max_size=12), st.lists(steps, min_size=25, max_size=longest))


# -- from steps to atoms ----------------------------------------------------------------------------


class Atom(NamedTuple):
    """An event, or a tick, gap or bad record; `at_ms` is the feed clock."""

    kind: str
    at_ms: int
    recv_ns: int
    data: bytes


def epochs_of(script: Iterable[Step], start_ms: int = START_MS + 20_500) -> list[list[Atom]]:
    """One list of atoms for each producer epoch."""
    return _Timeline(start_ms).play(script)


class _Timeline:
    def __init__(self, start_ms: int) -> None:
        self.clock = self.tick = start_ms
        self.ids = 1_000
        self.atoms: list[Atom] = []
        self.gaps: list[GapValue] = []  # as the pipeline understands them

    def play(self, script: Iterable[Step]) -> list[list[Atom]]:
        epochs = []
        self._gap(Hush(0, None, reason="start"))
        for step in script:
            if isinstance(step, Crash):
                epochs.append(self.atoms)
                self.atoms = []
                self._gap(Hush(step.away_ms, step.away_ms, reason="away"))
            else:
                self._take(step)
        return [*epochs, self.atoms]

    def _take(self, step: Step) -> None:
        match step:
            case Wait(ms):
                self._move(self.clock + ms)
            case Trade():
                self._trade(step)
            case Quote(back_ms, pair, exchange, bid, ask):
                t = self.clock - back_ms
                self._event(
                    b'{"ev":"XQ","pair":"%s","bp":%s,"bs":1e-3,"ap":%s,"as":0,"t":%d,"x":%s,"lp":0}'
                    % (pair.encode(), bid.encode(), ask.encode(), t, exchange.encode()),
                    t,
                )
            case Aggregate(minutes, pair, volume):
                start = (self.clock // MINUTE - minutes) * MINUTE
                numbers = b'"o":1.50,"h":2,"l":1,"c":1.7,"vw":1.6,"z":0.1,"v":%s' % volume.encode()
                self._event(
                    b'{"ev":"XA","pair":"%s",%s,"s":%d,"e":%d}' % (pair.encode(), numbers, start, start + MINUTE),
                    start,
                )
            case Odd(data):
                self._event(data, 0)
            case Bad(data):
                self._atom("bad", data)
            case Hush():
                self._gap(step)
            case NothingMissed(back):
                gap = self.gaps[max(-len(self.gaps), -1 - back)]
                self.tick = self.clock
                self._atom("gap", msgspec.json.encode(msgspec.structs.replace(gap, reason="empty")))

    def _trade(self, step: Trade) -> None:
        anchor = {"clock": self.clock, "tick": self.tick, "minute": self.clock - self.clock % MINUTE}
        t = max(START_MS - 10 * HOUR, anchor[step.anchor] - step.back_ms)
        self.ids += 1
        name = str(self.ids if step.id is None else step.id)
        self._event(
            b'{"ev":"XT","pair":"%s","p":%s, "t":%d,"s":%s,"c":%s,"i":"%s","x":%d,"r":%d,"new":{"a":[1.0]}}'
            % (
                step.pair.encode(),
                step.price.encode(),
                t,
                step.size.encode(),
                step.conditions.encode(),
                name.encode(),
                step.exchange,
                self.clock,
            ),
            t,
        )

    def _event(self, data: bytes, t_ms: int) -> None:
        if self.clock < t_ms <= self.clock + 10 * SECOND:  # believed: it moves the clock
            self._move(t_ms)
        self._atom("event", data)

    def _move(self, to: int) -> None:
        second = to - to % SECOND
        if second > self.clock:
            self.clock = self.tick = second
            self._atom("tick", msgspec.json.encode(TickValue(["XT"])))
        self.clock = to

    def _gap(self, step: Hush) -> None:
        self.clock += step.silence_ms
        since, until = (
            None if back is None else (self.clock - back) * NS_PER_MS for back in (step.since_ms, step.until_ms)
        )
        value = GapValue(since, until, list(step.streams), list(step.pairs), step.reason)
        self.tick = self.clock
        self._atom("gap", msgspec.json.encode(value))
        to = self.clock * NS_PER_MS if until is None else min(until, self.clock * NS_PER_MS)
        since = None if since is None else min(since, to)
        self.gaps.append(msgspec.structs.replace(value, from_=since, to=to))

    def _atom(self, kind: str, data: bytes) -> None:
        recv = (self.clock + 45) * NS_PER_MS + len(self.atoms)
        self.atoms.append(Atom(kind, self.clock, recv, data))


# -- from atoms to records --------------------------------------------------------------------------


def cut(epochs: Iterable[Sequence[Atom]], lengths: Sequence[int]) -> list[list[RawRecord]]:
    """The records of each epoch, with slices of at most `lengths` events, in turn."""
    return [list(_records(atoms, number, lengths)) for number, atoms in enumerate(epochs, 1)]


def _records(atoms: Sequence[Atom], epoch: int, lengths: Sequence[int]) -> Iterator[RawRecord]:
    n = at = 0
    length = cycle(lengths)
    while at < len(atoms):
        if atoms[at].kind == "event":
            most = at + next(length)
            end = at + 1
            while end < min(most, len(atoms)) and atoms[end].kind == "event":
                end += 1
            piece = atoms[at:end]
            kind, data = "slice", b"[" + b",".join(atom.data for atom in piece) + b"]"
        else:
            piece = atoms[at : at + 1]
            kind, data = piece[0].kind, piece[0].data
        recv = [(atom.recv_ns, 1) for atom in piece]
        yield RawRecord(PARTITION, piece[-1].at_ms, kind, epoch, n, recv, data)
        n += len(piece)
        at += len(piece)


lengths = st.lists(st.sampled_from([1, 1, 2, 3, 7, 100]), min_size=1, max_size=5)

# -- from records to a log --------------------------------------------------------------------------


class Fault(NamedTuple):
    """What goes wrong before record `at` (of its epoch, modulo). `resend`: the last `size` come again;
    `overtake`: it fails, the next `size` land, then all from it on is sent; `lost`: the crash comes before
    it was sent; `hole`: it fails, the next `size` land, and then the crash comes."""

    kind: str
    at: int
    size: int


class Zombie(NamedTuple):
    """`size` records of the epoch before, from `first`, land `after` records into the next epoch."""

    first: int
    size: int
    after: int


class Sent(NamedTuple):
    """`log`: what Kafka has. `clean`: what ought to be taken of it. `holes`: (since ms, first record after)
    for each stretch that was overtaken and never came."""

    log: list[RawRecord]
    clean: list[RawRecord]
    holes: list[tuple[int | None, RawRecord]]


sendable = st.builds(Fault, st.sampled_from(["resend", "overtake", "overtake"]), st.integers(0, 200), st.integers(1, 2))
fatal = st.builds(Fault, st.sampled_from(["lost", "hole"]), st.integers(0, 200), st.integers(1, 2))
zombies = st.builds(Zombie, st.integers(0, 200), st.integers(1, 3), st.integers(0, 50))


class Trouble(NamedTuple):
    """What happens to one epoch's records."""

    faults: list[Fault]
    end: Fault | None
    zombies: list[Zombie]


troubles = st.lists(
    st.builds(
        Trouble,
        st.lists(sendable, max_size=5),
        st.one_of(st.none(), fatal),
        st.lists(zombies, max_size=2),
    ),
    min_size=1,
    max_size=4,
)
CALM = Trouble([], None, [])


def send(epochs: Sequence[list[RawRecord]], trouble: Sequence[Trouble]) -> Sent:
    """The log that comes of it; the last epoch does not crash. A zombie lands after its successor began."""
    sent = Sent([], [], [])
    before: list[RawRecord] = []
    overtaken = False
    for number, records in enumerate(epochs):
        plan = trouble[number % len(trouble)]
        end = plan.end if number < len(epochs) - 1 else None
        landed, whole = _landed(records, plan.faults, end)
        if whole:
            if overtaken:
                sent.holes.append((sent.clean[-1].timestamp_ms if sent.clean else None, records[0]))
            overtaken = False
        overtaken = overtaken or (end is not None and end.kind == "hole" and len(records) > whole + 1)
        sent.log.extend(_haunted(landed, records[0], plan.zombies, before) if whole else landed)
        sent.clean.extend(records[:whole])
        before = records
    return sent


def _landed(records: list[RawRecord], faults: list[Fault], end: Fault | None) -> tuple[list[RawRecord], int]:
    """What of an epoch lands, in its order, and how many of its records get there in the end."""
    whole = len(records) if end is None else end.at % len(records)
    log: list[RawRecord] = []
    done = 0
    for fault in sorted(faults, key=lambda f: f.at % len(records)):
        at = fault.at % len(records)
        if at >= whole:
            break
        log += records[done:at]
        done = at
        if fault.kind == "resend":
            log += records[max(0, at - fault.size) : at]
        else:
            log += records[at + 1 : min(at + 1 + fault.size, whole)]
    log += records[done:whole]
    if end is not None and end.kind == "hole":
        log += records[whole + 1 : whole + 1 + end.size]
    return log, whole


def _haunted(
    landed: list[RawRecord], first: RawRecord, zombies: list[Zombie], before: list[RawRecord]
) -> list[RawRecord]:
    log = list(landed)
    for zombie in zombies:
        if before:
            at = log.index(first) + 1
            at += zombie.after % (len(log) - at + 1)
            start = zombie.first % len(before)
            log[at:at] = before[start : start + zombie.size]
    return log


# -- what becomes of it -----------------------------------------------------------------------------


def outputs_of(records: Iterable[RawRecord], settings: PipelineSettings) -> list[Output]:
    """One pass from the beginning."""
    pipeline = Pipeline(PARTITION, settings)
    return [output for record in records for output in pipeline.process(record)]


def contents(outputs: Iterable[Output]) -> list[tuple[str, bytes | None, bytes]]:
    """Without the timestamps, which go by the record and so by the cut."""
    return [(output.topic, output.key, output.value) for output in outputs]


class MemoryLog:
    """A partition of the raw topic in a list, as tapedeck.history gives one."""

    def __init__(self, records: Sequence[RawRecord], begin: int = 0) -> None:
        self._records = records
        self.begin, self.end = begin, len(records)

    async def first_since(self, timestamp_ms: int) -> int:
        later = (o for o in range(self.begin, self.end) if self._records[o].timestamp_ms >= timestamp_ms)
        return next(later, self.end)

    async def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        yield [
            Entry(r.partition, first + place, r.timestamp_ms, None, r.headers(), r.value)
            for place, r in enumerate(self._records[first:end])
        ]
