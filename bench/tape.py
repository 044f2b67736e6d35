"""The tape that processors are measured with, and what its bars are by the plainest of arithmetic.

Ordered trades (and quotes, where asked for) of some pairs weighted 1/rank, then trades of every pair for two
minutes more, so that all windows before them close, whatever closes them. Numbers come again about as often as they do
on a record of a real market: prices nearly always, sizes more often than not.
"""

import bisect
import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any, NamedTuple

from bench.saturate import BASES
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas.frames import Frame
from schemas.partition import partition_of
from schemas.raw import RawRecord
from schemas.topics import PARTITIONS

BEGIN_MS = 1_763_715_600_000
MINUTE_MS = 60_000
CLOSING_STEP_MS, CLOSING_MS = 4_000, 120_000
PRICE_UNITS, SIZE_UNITS = 10**6, 10**8
VWAP = Context(prec=12, rounding=ROUND_HALF_EVEN)

Fields = dict[str, Any]


class Event(NamedTuple):
    """One event as the vendor writes it."""

    pair: str
    t_ms: int
    data: bytes


class Sums:
    """A bar in whole units of price and size: open, high, low, close, volume, notional, count."""

    __slots__ = ("close", "count", "high", "low", "notional", "open", "volume")

    def __init__(self, price: int) -> None:
        self.open = self.high = self.low = self.close = price
        self.volume = self.notional = self.count = 0

    def add(self, price: int, size: int) -> None:
        self.high, self.low, self.close = max(self.high, price), min(self.low, price), price
        self.volume += size
        self.notional += price * size
        self.count += 1

    def exact(self) -> Fields:
        """By our names for the fields."""
        prices = {name: Decimal(getattr(self, name)) / PRICE_UNITS for name in ("open", "high", "low", "close")}
        vwap = VWAP.divide(Decimal(self.notional), Decimal(self.volume)) / PRICE_UNITS
        return {**prices, "volume": Decimal(self.volume) / SIZE_UNITS, "vwap": vwap, "trade_count": self.count}


class Tape:
    """`events` and, once they were walked through, the `bars` by (pair, start in ms) of the `minutes`."""

    def __init__(self, events: int, minutes: int = 60, pairs: int = 20, quotes: int = 0, seed: int = 7) -> None:
        """`quotes`: how many to a trade. Pairs past the twenty best known are numbered."""
        self.minutes, self.total, self._quotes, self._seed = minutes, events, quotes, seed
        self.pairs = [f"{BASES[n % len(BASES)]}{n // len(BASES) or ''}-USD" for n in range(pairs)]
        self.bars: dict[tuple[str, int], Sums] = {}
        closing = CLOSING_MS // CLOSING_STEP_MS * pairs
        self._body = events - closing
        if self._body <= 0:
            raise ValueError(f"{events} events are too few: {closing} only close what is open")

    def events(self) -> Iterator[Event]:
        rng = random.Random(self._seed)
        end_ms = BEGIN_MS + self.minutes * MINUTE_MS
        prices = {pair: 10 ** rng.uniform(-1, 4.5) * PRICE_UNITS for pair in self.pairs}
        weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(self.pairs))))
        self.bars.clear()
        for number in range(self.total):
            if number < self._body:
                pair = self.pairs[bisect.bisect(weights, rng.random() * weights[-1])]
                t_ms = BEGIN_MS + number * self.minutes * MINUTE_MS // self._body
                quote = number % (self._quotes + 1) != 0
            else:
                round_, rank = divmod(number - self._body, len(self.pairs))
                pair, quote = self.pairs[rank], False
                t_ms = end_ms + round_ * CLOSING_STEP_MS + CLOSING_STEP_MS
            walk = prices[pair] = prices[pair] * (1 + rng.gauss(0, 2e-5))
            price = max(100, _rounded(walk, 5))
            size = _size(rng)
            if quote:
                spread = max(2, price // 5_000)
                yield Event(pair, t_ms, _quote(pair, price, spread, size, t_ms, rng))
                continue
            data = b'{"ev":"XT","pair":"%s","p":%s,"t":%d,"s":%s,"c":[%d],"i":"%d","x":%d,"r":%d}' % (
                pair.encode(),
                _text(price, 6),
                t_ms,
                _text(size, 8),
                1 + (rng.random() < 0.5),
                14_272_084 + number,
                (1, 2, 6, 10, 23)[number % 5],
                t_ms + 20,
            )
            if t_ms < end_ms:
                key = (pair, t_ms - t_ms % MINUTE_MS)
                bar = self.bars.get(key)
                if bar is None:
                    bar = self.bars[key] = Sums(price)
                bar.add(price, size)
            yield Event(pair, t_ms, data)

    def records(self, slicer: SlicerSettings, rate: int = 100_000, per_frame: int = 20) -> Iterator[RawRecord]:
        """What our producer makes of it when it comes at `rate` events a second in frames of `per_frame`."""
        return records_of(self._frames(rate, per_frame), slicer, ["XT", "XQ", "XA"], ["*"])

    def _frames(self, rate: int, per_frame: int) -> Iterator[Frame]:
        begin = (BEGIN_MS + self.minutes * MINUTE_MS + 2 * CLOSING_MS) * 1_000_000
        events = self.events()
        for number in itertools.count():
            frame = [event.data for event in itertools.islice(events, per_frame)]
            if not frame:
                return
            yield Frame(begin + number * per_frame * 1_000_000_000 // rate, b"[" + b",".join(frame) + b"]")


def by_crc32(pair: str) -> int:
    """The partition of librdkafka's default partitioner, which most clients have that are not Java's."""
    return zlib.crc32(pair.encode()) % PARTITIONS


def arrays(
    events: Iterable[Event], size: int, place: Callable[[str], int] = partition_of
) -> Iterator[tuple[int, Event, bytes]]:
    """(partition, last event, value): arrays of up to `size` events of one partition; of 1: the bare event."""
    waiting: dict[int, list[Event]] = {}
    for event in events:
        partition = place(event.pair)
        if size == 1:
            yield partition, event, event.data
            continue
        piece = waiting.setdefault(partition, [])
        piece.append(event)
        if len(piece) == size:
            yield partition, event, b"[" + b",".join(e.data for e in waiting.pop(partition)) + b"]"
    for partition, piece in waiting.items():
        yield partition, piece[-1], b"[" + b",".join(e.data for e in piece) + b"]"


def _quote(pair: str, price: int, spread: int, size: int, t_ms: int, rng: random.Random) -> bytes:
    return b'{"ev":"XQ","pair":"%s","bp":%s,"bs":%s,"ap":%s,"as":%s,"t":%d,"x":%d,"r":%d}' % (
        pair.encode(),
        _text(price - spread // 2, 6),
        _text(size, 8),
        _text(price + spread // 2, 6),
        _text(_size(rng), 8),
        t_ms,
        1 + (rng.random() < 0.5),
        t_ms + 20,
    )


def _size(rng: random.Random) -> int:
    size = int(rng.expovariate(5e-8)) + 100
    return _rounded(size, 2) if rng.random() < 0.65 else size


def _rounded(number: float, digits: int) -> int:
    """To so many significant digits."""
    step = 10 ** max(0, len(str(int(number))) - digits)
    return int(number) // step * step


def _text(units: int, digits: int) -> bytes:
    """A decimal as a JSON number without trailing zeros."""
    whole, part = divmod(units, 10**digits)
    return (f"{whole}.{part:0{digits}d}".rstrip("0").rstrip(".")).encode()
