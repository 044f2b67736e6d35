"""Whether anything was missed while a stream was silent: REST is asked, and the raw log is the other witness.

REST alone proves nothing: it may be late, or empty by mistake. Nothing was missed when REST and the log tell the same
of the silence and of ten seconds before it, and both know something that came after it began.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from decimal import Decimal
from typing import NamedTuple, NoReturn

import structlog
from aiokafka.errors import KafkaError
from msgspec import Raw

from producers.rest import Rest, RestError
from producers.resume import records_since
from producers.slicer import Suspicion
from producers.split import split_frame
from schemas import wire
from schemas.events import MINUTE_NS, NS_PER_MS, NS_PER_S
from schemas.numbers import decimal_of
from schemas.partition import partition_of
from schemas.rest import decode_rest_aggregate, decode_rest_trade
from tapedeck import metrics
from tapedeck.settings import Settings

log = structlog.get_logger()

SETTLE_S = 5.0  # REST, and the log, have what came at a silence's end
MOST_SUSPICIONS = 100
BEFORE_NS = 10 * NS_PER_S  # events on their way when the silence began
AHEAD_NS = 10 * NS_PER_S  # the feed clock is at most so far past the events that it stamps
MINUTE_MS = MINUTE_NS // NS_PER_MS
AFTER_MS = MINUTE_MS  # what comes later than that of the silence is not waited for: then it stays a gap
MOST_PAGES = 4
MOST_EVENTS = 200_000  # in what REST tells of a silence: no silence has more, and memory is not for it


class Prover:
    """`close` is called with each gap that was proved empty until it returns True."""

    def __init__(self, settings: Settings, pairs: list[str], close: Callable[[Suspicion], bool]) -> None:
        self._settings, self._pairs, self._close = settings, pairs, close
        self._suspicions: asyncio.Queue[Suspicion] = asyncio.Queue(MOST_SUSPICIONS)

    def doubt(self, gap: Suspicion) -> None:
        """Asks about it when its turn comes. REST has no quotes as they came, and of `*` nobody can list the pairs."""
        if "*" in self._pairs or not set(gap.streams) <= {"XT", "XA"}:
            return
        try:
            self._suspicions.put_nowait(gap)
        except asyncio.QueueFull:
            log.warning("too many silences to ask REST about: this one stays a gap", streams=gap.streams)

    async def prove(self) -> NoReturn:
        """One suspected silence after the other."""
        async with Rest(self._settings) as rest:
            while True:
                gap = await self._suspicions.get()
                await asyncio.sleep(SETTLE_S)
                told = {"streams": gap.streams, "seconds": round((gap.to - gap.since) / NS_PER_S, 3)}
                try:
                    empty = await _nothing_missed(self._settings, rest, gap, self._pairs)
                except (RestError, KafkaError, OSError, ValueError, *wire.DECODE_ERRORS) as error:
                    log.warning("whether a silence was one cannot be told: it stays a gap", error=str(error), **told)
                    metrics.SILENCES.labels("unknown").inc()
                    continue
                metrics.SILENCES.labels("empty" if empty else "open").inc()
                if not empty:
                    log.info("REST does not show that a silence was one: it stays a gap", **told)
                    continue
                while not self._close(gap):
                    await asyncio.sleep(1)
                log.info("nothing was missed in a silence: its gap is closed", **told)


class Known(NamedTuple):
    """An event that both can tell of: a trade by its time, exchange and id, an aggregate by its end and volume."""

    ms: int
    pair: str
    mark: tuple[int, str] | Decimal | None


async def _nothing_missed(settings: Settings, rest: Rest, gap: Suspicion, pairs: list[str]) -> bool:
    """Whether it is proved, for all streams and pairs. Raises RestError, KafkaError, OSError, ValueError and what
    decoders raise."""
    first, last = (gap.since - BEFORE_NS) // NS_PER_MS, gap.to // NS_PER_MS
    for stream in gap.streams:
        told = set[Known]()
        for pair in pairs:
            told |= await (_trades if stream == "XT" else _aggregates)(rest, pair, first, last)
            if len(told) > MOST_EVENTS:
                return False
        if not any(known.ms * NS_PER_MS > gap.since for known in told):
            return False
        if told != await _logged(settings, stream, pairs, first, last):
            return False
    return True


async def _trades(rest: Rest, pair: str, first_ms: int, last_ms: int) -> set[Known]:
    stretch = {"timestamp.gte": first_ms * NS_PER_MS, "timestamp.lt": (last_ms + 1) * NS_PER_MS}
    results = await rest.results(f"/v3/trades/{_ticker(pair)}", MOST_PAGES, order="asc", limit=50_000, **stretch)
    trades = map(decode_rest_trade, results)
    return {Known(t.participant_timestamp // NS_PER_MS, pair, (t.exchange, str(t.id))) for t in trades}


async def _aggregates(rest: Rest, pair: str, first_ms: int, last_ms: int) -> set[Known]:
    """Of the minutes that end in the stretch: each is sent when it is over."""
    begin, end = first_ms - MINUTE_MS, last_ms - MINUTE_MS
    path = f"/v2/aggs/ticker/{_ticker(pair)}/range/1/minute/{begin}/{end}"
    results = await rest.results(path, MOST_PAGES, limit=50_000)
    known = (Known(a.t + MINUTE_MS, pair, _volume(a.v)) for a in map(decode_rest_aggregate, results))
    return {one for one in known if first_ms <= one.ms <= last_ms}


def _volume(json: Raw) -> Decimal | None:
    """Raises ValueError."""
    volume = decimal_of(bytes(json))
    if volume is not None and not volume.is_finite():
        raise ValueError(f"a volume is {volume}")
    return volume


def _ticker(pair: str) -> str:
    return f"X:{pair.replace('-', '')}"


async def _logged(settings: Settings, stream: str, pairs: list[str], first_ms: int, last_ms: int) -> set[Known]:
    """What the raw log has of the stretch; of an aggregate that was revised its last version."""
    found: dict[object, Known] = {}
    key: object
    partitions = {partition_of(pair) for pair in pairs}
    begin_ms = first_ms - AHEAD_NS // NS_PER_MS
    async with aclosing(records_since(settings, partitions, begin_ms, last_ms + AFTER_MS)) as records:
        async for record in records:
            await asyncio.sleep(0)  # the socket is read meanwhile
            if record.kind != "slice":
                continue
            for item in split_frame(record.value):
                if item.head is None or item.head.ev != stream or item.head.pair not in pairs:
                    continue
                try:
                    message = wire.decode_message(item.data)
                except wire.DECODE_ERRORS:
                    continue
                if isinstance(message, wire.XT):
                    key = one = Known(message.t, message.pair, (message.x, str(message.i)))
                elif isinstance(message, wire.XA):
                    one = Known(message.e, message.pair, _volume(message.v))
                    key = message.pair, message.s
                else:
                    continue
                if first_ms <= one.ms <= last_ms:
                    found[key] = one
    return set(found.values())
