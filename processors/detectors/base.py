"""What detectors share: what they are shown, what they find, and the two ways not to say it twice.

Detectors know event time only, as ticks tell it: what happened since the last tick is judged together, `at` is that
last tick. Whatever a detector keeps, it keeps for at most `memory_ns`; after `forget(tick)` nothing in its state is
older, so that a rebuild which starts that far back has the very same state.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec

from schemas.events import MINUTE_NS, Bar, Gap, Severity, VendorBar

#: (bid, ask, ts_event, epoch, n) of a quote; a side of 0 is absent.
QuoteSeen = tuple[float, float, int, int, int]
#: (price, size, ts_event, epoch, n, the quote of its exchange that stood when it came) of a trade.
TradeSeen = tuple[float, float, int, int, int, QuoteSeen | None]

# The 90th percentile of the absolute value of a normal distribution, in standard deviations.
NORMAL_ABS_P90 = 1.6449

Least = Annotated[int, msgspec.Meta(ge=1)]


class Finding(NamedTuple):
    """What becomes an events.Anomaly. `key` makes its id unique among those of its kind and symbol."""

    symbol: str | None
    key: str
    ts_event: int
    value: float | None
    expected: float | None
    score: float | None
    threshold: float | None
    detail: str
    epoch: int | None = None
    n: int | None = None
    bar: Bar | None = None
    severity: Severity | None = None  # the kind's own


class Note(NamedTuple):
    """Something that happened to one event on its way through the pipeline. `what`: duplicate, late, quarantined or
    impossible."""

    what: str
    symbol: str | None
    ts_event: int
    detail: str
    epoch: int
    n: int


class Detector:
    """A kind of anomaly. Of the hooks it overrides what it needs; the others cost nothing."""

    kind: ClassVar[str]
    severity: ClassVar[Severity]
    memory_ns: ClassVar[int]
    uses_bars: ClassVar[bool] = False  # its memory comes on top of that of the bars

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Its thresholds."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def trades(self, symbol: str, trades: Sequence[TradeSeen], at: int) -> Iterable[Finding]:
        """A symbol's trades since the last tick, at least one, in the order of the log."""
        return ()

    def quotes(self, symbol: str, quotes: Sequence[QuoteSeen], at: int) -> Iterable[Finding]:
        """A symbol's quotes since the last tick, at least one, in the order of the log."""
        return ()

    def note(self, note: Note, at: int) -> None:
        """Something happened to an event."""

    def vendor_bar(self, bar: VendorBar, at: int) -> None:
        """The vendor's aggregate, each message of it."""

    def bars(self, bars: Sequence[Bar], tick: int) -> None:
        """Our final bars, emitted at this tick."""

    def gap(self, gap: Gap, at: int) -> None:
        """A marked gap. What was before it and what comes after belong apart."""

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None) -> Iterable[Finding]:
        """The feed clock went from `before` to `tick`; `fresh` is None where the tick does not say. It comes after
        all that happened since `before`."""
        return ()

    def forget(self, tick: int) -> None:
        """Drops all that cannot matter any more."""

    def state(self) -> object:
        """What later findings depend on, comparable; right after `forget`."""
        return None


class Onsets:
    """Says when a condition begins: it held in this bucket of event time and not in the one before. A condition
    that goes on for ever is said once, and whether it is said depends on two buckets only."""

    def __init__(self, bucket_ns: int) -> None:
        self._bucket_ns = bucket_ns
        self.memory_ns = 2 * bucket_ns
        self._last: dict[str, int] = {}

    def begins(self, symbol: str, at: int) -> bool:
        """The condition holds for the symbol."""
        bucket = at // self._bucket_ns
        last = self._last.get(symbol, 0)
        self._last[symbol] = bucket
        return bucket > last + 1

    def forget(self, tick: int) -> None:
        oldest = tick // self._bucket_ns - 1
        self._last = {symbol: bucket for symbol, bucket in self._last.items() if bucket >= oldest}

    def state(self) -> object:
        return self._last


class Counting(Detector):
    """What is worth a look only by its number: said once per symbol and minute of event time, at the first tick at
    which there were `least` of it, with the first of them."""

    memory_ns = MINUTE_NS
    what: ClassVar[str]
    verb: ClassVar[str]

    class Settings(Detector.Settings, frozen=True):
        least: Least = 1

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._minute = 0
        self._counts: dict[str | None, tuple[int, Note]] = {}  # of the minute; how many, the first
        self._said: set[str | None] = set()

    def note(self, note: Note, at: int) -> None:
        if note.what == self.what:
            self.count(note, at)

    def count(self, note: Note, at: int) -> None:
        if at // MINUTE_NS != self._minute:
            self._minute, self._counts, self._said = at // MINUTE_NS, {}, set()
        count, first = self._counts.get(note.symbol, (0, note))
        self._counts[note.symbol] = count + 1, first

    def tick(self, before: int, tick: int, fresh: Sequence[str] | None) -> Iterable[Finding]:
        return self._enough() if self._counts else ()

    def _enough(self) -> Iterable[Finding]:
        for symbol, (count, first) in self._counts.items():
            if count >= self.settings.least and symbol not in self._said:
                self._said.add(symbol)
                yield Finding(
                    symbol,
                    str(self._minute * 60),
                    first.ts_event,
                    count,
                    None,
                    count,
                    self.settings.least,
                    f"{count} {self.verb} so far in this minute, first: {first.detail}",
                    first.epoch,
                    first.n,
                )

    def forget(self, tick: int) -> None:
        if tick // MINUTE_NS != self._minute:
            self._counts, self._said = {}, set()

    def state(self) -> object:
        return (self._minute if self._counts else None, self._counts, self._said)


def touches(gap: Gap, symbol: str) -> bool:
    """Whether a gap is one of this pair."""
    return "*" in gap.pairs or symbol in gap.pairs


def percentile_90(ordered: Sequence[float]) -> float:
    """The 90th percentile of sorted numbers, at least one."""
    return ordered[9 * (len(ordered) - 1) // 10]
