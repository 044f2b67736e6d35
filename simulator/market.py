"""The synthetic market: its pairs' publications in order of time, batched into frames as the vendor does.

Lazy, endless and cheap. One `random.Random(seed)` draws every number, so the same seed, symbols and start
give the same bytes; trade ids derive from the start.
"""

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from random import Random

from simulator.frame import Event, Frame, join
from simulator.minute import Minute, Second, Windows
from simulator.pair import Activity, Fill, Pair, TradeIds

BATCH_NS = 10_000_000
"""A frame leaves this long after its first event, or when it is full."""

BATCH_EVENTS = 20
SECOND_DELAY_NS = 50_000_000

_BUSIEST_TRADES_PER_S = 11.0
_REGULAR_PAIRS = 10  # of a wide market


def market(
    seed: int, symbols: Sequence[str], start_ns: int, *, wide: bool = False, seconds: bool = False
) -> Iterator[Frame]:
    """The frames of an endless market that begins at `start_ns` (since the epoch); see the module.

    `wide` is for many pairs: from several trades a second down to hours without one. `seconds`: with frames of XAS
    between the others, which are the same without them.
    """
    activity = (wide_activities if wide else activities)(len(symbols))
    return batch(publish(seed, symbols, start_ns, activity, seconds), start_ns)


def batch(events: Iterable[tuple[int, Event]], start_ns: int) -> Iterator[Frame]:
    """Frames of events that are published within BATCH_NS of each other; times are ns of market time."""
    waiting: dict[bool, tuple[int, list[Event]]] = {}  # those of seconds, and the others: the older first
    for published_ns, event in events:
        while waiting and (due_ns := next(iter(waiting.values()))[0] + BATCH_NS) < published_ns:
            _, these = waiting.pop(next(iter(waiting)))
            yield Frame(due_ns - start_ns, due_ns, join(these), these)
        kind = event.topic is not None and event.topic[0] == Second.channel
        _, these = waiting.setdefault(kind, (published_ns, []))
        these.append(event)
        if len(these) == BATCH_EVENTS:
            del waiting[kind]
            yield Frame(published_ns - start_ns, published_ns, join(these), these)


def publish(
    seed: int, symbols: Sequence[str], start_ns: int, activity: Sequence[Activity], seconds: bool
) -> Iterator[tuple[int, Event]]:
    """Every event with the time (ns) at which the vendor publishes it, in the order of these times.

    A minute's XA follows 0.1 to 2 s after its end, or after a trade that changes it later, a second's XAS 50 ms.
    """
    rng = Random(seed)
    ids = TradeIds(start_ns)
    pairs = [Pair(symbol, own, start_ns, ids, rng) for symbol, own in zip(symbols, activity, strict=True)]
    windows = [[Windows(kind) for kind in ((Minute, Second) if seconds else (Minute,))] for _ in pairs]
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
                yield published_ns, Event((item.channel, pair.symbol), item.encode(pair.symbol, pair.digits))
                continue
            yield published_ns, item
            if fill is None:
                continue
            for kept in windows[source]:
                window = kept.add(fill.t_ms, fill.price, fill.size)
                if not window.scheduled:
                    window.scheduled = True
                    serial += 1
                    # The market must be the same with and without seconds: they draw no number.
                    delay_ns = SECOND_DELAY_NS if isinstance(window, Second) else int(rng.uniform(0.1, 2) * 1e9)
                    due_ns = max(window.end_ms * 1_000_000, published_ns) + delay_ns
                    heappush(pending, (due_ns, serial, source, window, None))
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
