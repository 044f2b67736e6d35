"""The repair operator: what REST says of a pair's whole minute, from a partition of `raw.rest.v1`, becomes trades
and one bar of it. Pure, and without live state: the live pipeline never sees a repair.
"""

from collections import Counter
from decimal import Decimal
from typing import NamedTuple

from msgspec import Raw
from msgspec.structs import replace

from processors.operators import normalize
from processors.operators.normalize import CannotNormalize
from processors.pipeline import Output, dead_letter
from schemas import topics, wire
from schemas.events import MINUTE_NS, NS_PER_MS, Bar, MinuteEmpty, Trade, encode, encode_ready
from schemas.numbers import EXACT, VWAP, ZERO, canonical
from schemas.rest import RestRecord, decode_rest_aggregate, decode_rest_trade, repair_of

PATIENCE_NS = 10 * MINUTE_NS  # how long a part waits for the others of its group
MINUTE_MS = MINUTE_NS // NS_PER_MS
FOREIGN_EPOCH = -(2**62) - 1  # of dead letters that are no part of a repair; rollups have the one above
SKEW_NS = 60 * MINUTE_NS  # by which a record's time may be behind that of one before it


class _Group(NamedTuple):
    """Parts combine only if they agree on all of this."""

    number: int
    symbol: str
    minute: int
    parts: int
    of: str


class _Part(NamedTuple):
    seen: int
    recv: int
    results: list[Raw]


class _Priced(NamedTuple):
    """A trade, the vendor's time of it in ns, and its numbers, which stand in it as JSON."""

    trade: Trade
    ts: int
    price: Decimal
    size: Decimal


class Repairs:
    """The groups of one partition that are not complete, and those that lately were.

    A part is a repeat if it comes again within ten minutes, which is as long as a group may take: what the history
    service sends again after a longer time is a new attempt with a new number.
    """

    memory_ns = PATIENCE_NS + SKEW_NS

    def __init__(self, partition: int, fingerprint: str) -> None:
        """`fingerprint` is that of the pipeline's settings; bars carry it."""
        self.partition = partition
        self.counts: Counter[str] = Counter()
        self._fingerprint = fingerprint
        self._clock = 0
        self._parts: dict[tuple[_Group, int], _Part] = {}  # in the order in which they came, as are the complete
        self._complete: dict[_Group, int] = {}
        self._out: list[Output] = []
        self._at_ms = 0

    @property
    def tick(self) -> int | None:
        """How far it has come: the highest time of a record, ns."""
        return self._clock or None

    @property
    def taken_ms(self) -> int | None:
        """The highest timestamp of a record that was taken, ms."""
        return self._clock // NS_PER_MS or None

    def process(self, record: RestRecord) -> list[Output]:
        """The outputs of the next record of the log: all of a group with the part that completes it."""
        self._out, self._at_ms = [], record.timestamp_ms
        epoch, n, recv = FOREIGN_EPOCH, record.offset, 0
        try:
            repair, recv = repair_of(record.headers)
            epoch, n = -repair.number, -1 - repair.part
            group = _Group(repair.number, wire.symbol_of(repair.pair), repair.minute, repair.parts, repair.of)
            results = wire.split_array(record.value)
        except (*wire.DECODE_ERRORS, ValueError) as error:
            self._dead(record.value, str(error), recv, epoch, n)
            return self._out
        self._advance(max(self._clock, record.timestamp_ms * NS_PER_MS))
        if group in self._complete or (group, repair.part) in self._parts:
            self.counts["repeat"] += 1
            return []
        self._parts[group, repair.part] = _Part(self._clock, recv, results)
        places = [(group, part) for part in range(group.parts)]
        if all(place in self._parts for place in places):
            self._complete[group] = self._clock
            self._repair(group, [self._parts.pop(place) for place in places])
        return self._out

    def _advance(self, clock: int) -> None:
        """Forgets what has waited for too long."""
        self._clock = clock
        oldest = clock - PATIENCE_NS
        while self._parts and (first := next(iter(self._parts.items())))[1].seen < oldest:
            del self._parts[first[0]]
            self.counts["incomplete"] += 1
        while self._complete and (done := next(iter(self._complete.items())))[1] < oldest:
            del self._complete[done[0]]

    def _repair(self, group: _Group, parts: list[_Part]) -> None:
        results = [(bytes(data), part.recv) for part in parts for data in part.results]
        if not results:
            end = group.minute + MINUTE_NS
            empty = MinuteEmpty(group.symbol, group.minute, end, group.number, self._fingerprint)
            self._emit(topics.BARS_1M, group.symbol, encode(empty))
        elif group.of == "trades":
            self._trades(group, results)
        else:
            self._aggregate(group, results)

    def _trades(self, group: _Group, results: list[tuple[bytes, int]]) -> None:
        trades: dict[tuple[int, str], _Priced] = {}
        for n, (data, recv) in enumerate(results):
            try:
                priced = self._trade(group, data, recv, n)
            except (*wire.DECODE_ERRORS, CannotNormalize) as error:
                self._dead(data, str(error), recv, -group.number, n)
                continue
            trade = priced.trade
            if (trade.exchange, trade.trade_id) in trades:
                self.counts["duplicate"] += 1
                continue
            trades[trade.exchange, trade.trade_id] = priced
            self._emit(topics.TRADES, trade.symbol, encode_ready(trade))
        if trades:
            self._emit(topics.BARS_1M, group.symbol, encode(self._bar(group, list(trades.values()))))

    def _trade(self, group: _Group, data: bytes, recv: int, n: int) -> _Priced:
        """Raises CannotNormalize and what decoders raise."""
        result = decode_rest_trade(data)
        ts = result.participant_timestamp
        fields = (result.price, result.size, ts // NS_PER_MS, result.id, result.exchange, result.conditions)
        trade, price, size = normalize.trade(
            wire.XT(group.symbol, *fields), recv, ["repaired"], -group.number, self.partition, n
        )
        _check_minute(trade.ts_event, group)
        return _Priced(replace(trade, ts_vendor=ts), ts, price.exact, size.exact)

    def _bar(self, group: _Group, trades: list[_Priced]) -> Bar:
        """Open and close go by the vendor's ns, then by the place in the group."""
        trades.sort(key=lambda priced: (priced.ts, priced.trade.n))
        volume = notional = ZERO
        sides: dict[str, Decimal] = {"buy": ZERO, "sell": ZERO, "unknown": ZERO}
        for trade, _, price, size in trades:
            volume = EXACT.add(volume, size)
            notional = EXACT.fma(price, size, notional)
            sides[trade.side] = EXACT.add(sides[trade.side], size)
        prices = [priced.price for priced in trades]
        ohlc = (prices[0], max(prices), min(prices), prices[-1])
        return self._repaired(group, ohlc, volume, notional, len(trades), sides["buy"], sides["sell"])

    def _aggregate(self, group: _Group, results: list[tuple[bytes, int]]) -> None:
        bar: Bar | None = None
        for n, (data, recv) in enumerate(results):
            try:
                if bar is not None:
                    raise CannotNormalize("a second aggregate of one minute")
                bar = self._bar_of_aggregate(group, data, recv, n)
            except (*wire.DECODE_ERRORS, CannotNormalize) as error:
                self._dead(data, str(error), recv, -group.number, n)
        if bar is not None:
            self._emit(topics.BARS_1M, group.symbol, encode(bar))

    def _bar_of_aggregate(self, group: _Group, data: bytes, recv: int, n: int) -> Bar:
        """The notional is what vwap and volume make it, and nobody knows who bought. Raises CannotNormalize and what
        decoders raise."""
        result = decode_rest_aggregate(data)
        numbers = (result.o, result.h, result.l, result.c, result.v)
        message = wire.XA(group.symbol, *numbers, result.t, result.t + MINUTE_MS, result.vw)
        bar = normalize.vendor_bar(message, recv, -group.number, self.partition, n)
        _check_minute(bar.start, group)
        if not (bar.volume and bar.vwap and result.n):
            raise CannotNormalize("an aggregate without volume, vwap or trades")
        if not all(bar.low <= price <= bar.high for price in (bar.open, bar.close, bar.vwap)):
            raise CannotNormalize("open, close or vwap is outside low and high")
        ohlc = (bar.open, bar.high, bar.low, bar.close)
        return self._repaired(group, ohlc, bar.volume, EXACT.multiply(bar.volume, bar.vwap), result.n, ZERO, ZERO)

    def _repaired(
        self,
        group: _Group,
        ohlc: tuple[Decimal, Decimal, Decimal, Decimal],
        volume: Decimal,
        notional: Decimal,
        trade_count: int,
        buy: Decimal,
        sell: Decimal,
    ) -> Bar:
        """Nothing of the minute is missing, whoever summed it up: what an aggregate lacks is said by `source`, not by
        the quality."""
        return Bar(
            symbol=group.symbol,
            interval="1m",
            start=group.minute,
            end=group.minute + MINUTE_NS,
            open=ohlc[0],
            high=ohlc[1],
            low=ohlc[2],
            close=ohlc[3],
            volume=canonical(volume),
            vwap=canonical(VWAP.divide(notional, volume)),
            notional=canonical(notional),
            trade_count=trade_count,
            buy_volume=canonical(buy),
            sell_volume=canonical(sell),
            status="final",
            repair=group.number,
            revision=0,
            flags=["repaired"],
            missing_ns=0,
            quality=Decimal(1),
            source="trades" if group.of == "trades" else "aggregates",
            fingerprint=self._fingerprint,
        )

    def _emit(self, topic: topics.Topic, key: str | None, value: bytes) -> None:
        self._out.append(Output(topic.name, None if key is None else key.encode(), value, self._at_ms))

    def _dead(self, data: bytes, reason: str, recv: int, epoch: int, n: int) -> None:
        """A result is known by its place in the group, a part by -1 - its own, anything else by its offset."""
        self.counts["deadletter"] += 1
        letter = dead_letter(data, reason, recv, epoch, self.partition, n)
        self._emit(topics.DEAD_LETTERS, None, encode(letter))

    def state(self) -> object:
        """Everything that later outputs depend on, comparable."""
        return self._clock, self._parts, self._complete


def _check_minute(ts: int, group: _Group) -> None:
    """Raises CannotNormalize."""
    if not group.minute <= ts < group.minute + MINUTE_NS:
        raise CannotNormalize(f"{ts} is not in the minute from {group.minute}")
