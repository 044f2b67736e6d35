"""The synthetic market: its pairs' publications in order of time, batched into frames as the vendor does.

Lazy, endless and cheap. One `random.Random(seed)` draws every number, so the same seed, symbols and start
give the same bytes; trade ids derive from the start.
"""

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from random import Random

from simulator.frame import Event, Frame, join
from simulator.minute import Minute, Minutes
from simulator.pair import Activity, Fill, Pair, TradeIds

BATCH_NS = 10_000_000
"""A frame leaves this long after its first event, or when it is full."""

BATCH_EVENTS = 20

_BUSIEST_TRADES_PER_S = 11.0
_REGULAR_PAIRS = 10  # of a wide market


def market(seed: int, symbols: Sequence[str], start_ns: int, *, wide: bool = False) -> Iterator[Frame]:
    """The frames of an endless market that begins at `start_ns` (since the epoch); see the module.

    `wide` is for many pairs: from several trades a second down to hours without one.
    """
    return batch(publish(seed, symbols, start_ns, (wide_activities if wide else activities)(len(symbols))), start_ns)


def batch(events: Iterable[tuple[int, Event]], start_ns: int) -> Iterator[Frame]:
    """Frames of events that are published within BATCH_NS of each other; times are ns of market time."""
    waiting: list[Event] = []
    first_ns = 0
    for published_ns, event in events:
        if waiting and published_ns > first_ns + BATCH_NS:
            sent_ns = first_ns + BATCH_NS
            yield Frame(sent_ns - start_ns, sent_ns, join(waiting), waiting)
            waiting = []
        if not waiting:
            first_ns = published_ns
        waiting.append(event)
        if len(waiting) == BATCH_EVENTS:
            yield Frame(published_ns - start_ns, published_ns, join(waiting), waiting)
            waiting = []


def publish(
    seed: int, symbols: Sequence[str], start_ns: int, activity: Sequence[Activity]
) -> Iterator[tuple[int, Event]]:
    """Every event with the time (ns) at which the vendor publishes it, in the order of these times.

    A minute's XA follows 0.1 to 2 s after its end, or after a trade that changes it later.
    """
    rng = Random(seed)
    ids = TradeIds(start_ns)
    pairs = [Pair(symbol, own, start_ns, ids, rng) for symbol, own in zip(symbols, activity, strict=True)]
    minutes = [Minutes() for _ in pairs]
    arrivals = [(start_ns + pair.next_gap_ns(), number) for number, pair in enumerate(pairs)]
    heapify(arrivals)
    # (time, serial number, pair, what is published then, its fill if it is a trade)
    pending: list[tuple[int, int, int, Event | Minute, Fill | None]] = []
    serial = 0
    while True:
        t_ns, number = arrivals[0]
        while pending and pending[0][0] <= t_ns:
            published_ns, _, source, item, fill = heappop(pending)
            if isinstance(item, Minute):
                item.scheduled = False
                pair = pairs[source]
                yield published_ns, Event(("XA", pair.symbol), item.encode(pair.symbol, pair.digits))
                continue
            yield published_ns, item
            if fill is not None:
                minute = minutes[source].add(fill.t_ms, fill.price, fill.size)
                if not minute.scheduled:
                    minute.scheduled = True
                    serial += 1
                    due_ns = max(minute.end_ms * 1_000_000, published_ns) + int(rng.uniform(0.1, 2) * 1e9)
                    heappush(pending, (due_ns, serial, source, minute, None))
        for published_ns, event, fill in pairs[number].arrive(t_ns):
            serial += 1
            heappush(pending, (published_ns, serial, number, event, fill))
        heapreplace(arrivals, (t_ns + pairs[number].next_gap_ns(), number))


def activities(pairs: int) -> list[Activity]:
    """Of each pair, busiest first; quiet are the last two of four or more, else the last.

    An only pair is not quiet.
    """
    quiet = 2 if pairs >= 4 else 1 if pairs >= 2 else 0
    return [Activity(_BUSIEST_TRADES_PER_S / (rank + 1)) for rank in range(pairs - quiet)] + [Activity(0)] * quiet


def wide_activities(pairs: int) -> list[Activity]:
    """Of each pair, busiest first: the hundredth trades once in a minute and a half, and only by chance."""
    return [Activity(_BUSIEST_TRADES_PER_S / (rank + 1) ** 1.5, rank < _REGULAR_PAIRS) for rank in range(pairs)]
