"""The one pure pipeline that turns a partition of the raw log into every output.

Live running, recovery, replay, `tapedeck compute` and every test call `Pipeline.process`. It touches
nothing: records in, outputs out, and its whole state is a function of the records.
"""

from collections import Counter
from typing import ClassVar

import msgspec

from processors.operators import normalize
from processors.operators.anomalies import Anomalies, Silent
from processors.operators.bars import Bars
from processors.operators.repeats import Repeats
from processors.operators.resend import ResendFilter
from processors.settings import PipelineSettings
from schemas import topics, wire
from schemas.events import (
    MINUTE_NS,
    NOTHING_MISSED,
    NS_PER_MS,
    NS_PER_S,
    Bar,
    DeadLetter,
    Gap,
    MinuteClosed,
    Quarantined,
    encode,
    encode_ready,
)
from schemas.raw import REPLAY_BEGINS, Foreign, RawRecord, decode_gap_value, decode_tick_value, text_of

_TRADES, _QUOTES = topics.TRADES.name, topics.QUOTES.name
FOREIGN_EPOCH = -(2**62) - 2  # of dead letters that no producer of ours wrote; those of the other stages are above
LONGEST_REASON = 500
RUN_IN_RECORDS = 1_000  # more than a producer ever has in flight on a partition


class Output(msgspec.Struct, frozen=True, gc=False):
    """A record for an output topic; it goes to the partition number of the raw record, with its timestamp.
    `vouches`: it must not be sent before everything ahead of it was acknowledged."""

    topic: str
    key: bytes | None
    value: bytes
    timestamp_ms: int
    vouches: bool = False

    headers: ClassVar[list[tuple[str, bytes]]] = []  # an output is known by its value


def dead_letter(data: bytes, reason: str, recv: int, epoch: int, partition: int, n: int) -> DeadLetter:
    """One that its topic takes: a reason may quote what it refuses, and what nobody of ours wrote may be larger than
    any frame."""
    if len(data) > topics.MAX_FRAME_BYTES:
        reason = f"{len(data)} bytes, of which these are the first: {reason}"
    return DeadLetter(reason[:LONGEST_REASON], recv, *text_of(data[: topics.MAX_FRAME_BYTES]), epoch, partition, n)


class TooFarAhead(Exception):
    """The event is to be quarantined."""

    def __init__(self, symbol: str, ts: int) -> None:
        self.symbol, self.ts = symbol, ts


class Pipeline:
    """The state of one partition. `run_in` takes up a log in its middle (see ResendFilter). `lost`: what came before
    its first record was deleted, which makes a gap; `lost_since` says from when on, in ms, where it is known. A replay
    that began in the middle of the log says so in its first record, and is both."""

    def __init__(
        self,
        partition: int,
        settings: PipelineSettings,
        run_in: int = 0,
        lost: bool = False,
        lost_since: int | None = None,
    ) -> None:
        self.partition = partition
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._fingerprint = settings.fingerprint()
        self._filter = ResendFilter(run_in)
        self._repeats = Repeats(settings.lateness_ns)
        forming = settings.fills(topics.FORMING)
        self._bars = Bars(settings.lateness_ns, settings.grace_ns, self._fingerprint, forming)
        judging = Anomalies if settings.fills(topics.ANOMALIES) else Silent
        self._anomalies = judging(partition, settings.detectors, self._fingerprint)
        self._fills_trades = settings.fills(topics.TRADES)
        self._fills_quotes = settings.fills(topics.QUOTES)
        self._lost, self._lost_since = lost, lost_since
        self._untouched = not (run_in or lost)
        self._tick: int | None = None
        # What is later is too far ahead, what is older perhaps late; they follow from the tick.
        self._latest = self._in_time = 0
        self._out: list[Output] = []
        self._at_ms = 0

    @property
    def memory_ns(self) -> int:
        """How far before a record a rebuild must start: the largest sum of the operators' memories along any path,
        10 s allowed ahead and 1 s between ticks."""
        last = max(self._bars.memory_ns + self._anomalies.bars_memory_ns, self._anomalies.memory_ns)
        memories = self._filter.memory_ns + self._repeats.memory_ns + last
        return memories + self._settings.ahead_ns + NS_PER_S

    @property
    def tick(self) -> int | None:
        """The last tick, ns: the partition's watermark."""
        return self._tick

    @property
    def taken_ms(self) -> int | None:
        """The timestamp of the last record that was taken, ms: nothing in the state is newer."""
        return self._filter.last_ms

    @property
    def taken(self) -> tuple[int, int]:
        """Epoch and number of the first event that was not taken."""
        return self._filter.epoch, self._filter.next

    def process(self, record: RawRecord | Foreign) -> list[Output]:
        """The outputs of the next record of the log. A foreign one goes to the dead letters and touches no state."""
        if isinstance(record, Foreign):
            self._out, self._at_ms = [], record.timestamp_ms
            self._dead(record.value, record.reason, 0, FOREIGN_EPOCH, record.offset)
            return self._out
        if self._untouched:
            self._untouched = False
            if record.src == REPLAY_BEGINS:
                self._filter, self._lost = ResendFilter(RUN_IN_RECORDS), True
        verdict, hole = self._filter.judge(record)
        self.counts[verdict] += 1
        if verdict != "take":
            return []
        self._out = []
        self._at_ms = record.timestamp_ms
        at = record.timestamp_ms * NS_PER_MS
        if self._tick is None:
            self._ticked(at - at % NS_PER_S)
        if self._lost:
            self._lost = False
            self._bars.nothing_before(self._tick or 0)
            self._missed("log", self._lost_since, at, record)
        elif hole is not None:
            self._missed("hole", hole.since_ms, at, record)
        match record.kind:
            case "slice":
                self._slice(record)
            case "tick":
                self._advance(at, _fresh(record.value))
            case "gap":
                self._gap(record, at)
            case "bad":
                self._dead(record.value, "not JSON", record.recv[0][0], record.epoch, record.n)
            case _:
                self._dead(record.value, f"record of unknown kind {record.kind!r}", 0, record.epoch, record.n)
        return self._out

    # -- events ------------------------------------------------------------------------------------

    def _slice(self, record: RawRecord) -> None:
        recvs = [recv for recv, count in record.recv for _ in range(count)]
        messages: list[wire.Message | str]
        parts: list[msgspec.Raw] | None = None
        try:
            messages = list(wire.decode_slice(record.value))
        except wire.DECODE_ERRORS:
            try:
                parts = wire.split_array(record.value)
            except wire.DECODE_ERRORS as error:
                self._dead(record.value, f"slice is no JSON array: {error}", recvs[0], record.epoch, record.n)
                return
            messages = [_message(part) for part in parts]
        if len(messages) != len(recvs):
            reason = f"slice holds {len(messages)} events, its header counts {len(recvs)}"
            self._dead(record.value, reason, recvs[0], record.epoch, record.n)
            return
        n = record.n
        for message, recv in zip(messages, recvs, strict=True):
            try:
                if isinstance(message, wire.XQ):
                    self._quote(message, record.epoch, recv, n)
                elif isinstance(message, wire.XT):
                    self._trade(message, record.epoch, recv, n)
                elif isinstance(message, str):
                    raise normalize.CannotNormalize(message)
                elif isinstance(message, wire.LeftOut):
                    self.counts["left_out"] += 1
                else:
                    self._vendor_bar(message, record.epoch, recv, n)
            except (normalize.CannotNormalize, TooFarAhead) as error:
                parts = parts or wire.split_array(record.value)
                data = bytes(parts[n - record.n])
                if isinstance(error, TooFarAhead):
                    self._quarantine(error, data, recv, record.epoch, n)
                else:
                    if not isinstance(message, str):
                        self._anomalies.note("impossible", None, self._tick or 0, str(error), record.epoch, n)
                    self._dead(data, str(error), recv, record.epoch, n)
            n += 1

    def _trade(self, message: wire.XT, epoch: int, recv: int, n: int) -> None:
        trade, price, size = normalize.trade(message, recv, normalize.NO_FLAGS, epoch, self.partition, n)
        symbol, ts, exchange = trade.symbol, trade.ts_event, trade.exchange
        if ts > self._latest:
            raise TooFarAhead(symbol, ts)
        flag = "" if ts >= self._in_time else self._late(ts)
        if flag != "too_late":
            start = ts - ts % MINUTE_NS
            if self._repeats.seen(start, symbol, exchange, trade.trade_id):
                self.counts["duplicate"] += 1
                self._anomalies.note("duplicate", symbol, ts, f"{trade.trade_id} of exchange {exchange}", epoch, n)
                return
            self._bars.add(start, trade, price.exact, size.exact, flag == "late")
        if flag:
            trade = msgspec.structs.replace(trade, flags=[flag])
            self._anomalies.note("late", symbol, ts, f"{flag}, {((self._tick or 0) - ts) / NS_PER_S:.3f} s", epoch, n)
        self._anomalies.trade(symbol, ts, price.approx, size.approx, exchange, epoch, n)
        if self._fills_trades:
            self._out.append(Output(_TRADES, symbol.encode(), encode_ready(trade), self._at_ms))

    def _late(self, ts: int) -> str:
        """The flag of a trade that is not in time; none where its minute is open after all."""
        tick = self._tick or 0
        if ts < max(tick - self._settings.lateness_ns, self._bars.known_from):
            return "too_late"
        return "late" if self._bars.closed(ts - ts % MINUTE_NS, tick) else ""

    def _quote(self, message: wire.XQ, epoch: int, recv: int, n: int) -> None:
        quote, bid, ask = normalize.quote(message, recv, epoch, self.partition, n)
        symbol, ts = quote.symbol, quote.ts_event
        if ts > self._latest:
            raise TooFarAhead(symbol, ts)
        self._anomalies.quote(symbol, ts, bid.approx, ask.approx, quote.exchange, epoch, n)
        if self._fills_quotes:
            self._out.append(Output(_QUOTES, symbol.encode(), encode_ready(quote), self._at_ms))

    def _vendor_bar(self, message: wire.XA | wire.XAS, epoch: int, recv: int, n: int) -> None:
        bar = normalize.vendor_bar(message, recv, epoch, self.partition, n)
        if bar.start > self._latest:
            raise TooFarAhead(bar.symbol, bar.start)
        self._anomalies.vendor_bar(bar)
        self._emit(topics.VENDOR_BARS, bar.symbol, encode(bar))

    # -- time --------------------------------------------------------------------------------------

    def _gap(self, record: RawRecord, at: int) -> None:
        """A gap is noted first, then it ticks. Its end is never past its own time, null is its own time, and its
        beginning never past its end: it may be finer than the milliseconds of a record's time."""
        try:
            gap = decode_gap_value(record.value)
        except wire.DECODE_ERRORS as error:
            self._dead(record.value, f"not a gap: {error}", record.recv[0][0], record.epoch, record.n)
            return
        to = at if gap.to is None else min(gap.to, at)
        since = None if gap.from_ is None else min(gap.from_, to)
        self._note(Gap(since, to, gap.streams, gap.pairs, gap.reason, record.epoch, self.partition, record.n))
        self._advance(at, None)

    def _missed(self, reason: str, since_ms: int | None, at: int, record: RawRecord) -> None:
        """All streams, up to a record that stands in the log."""
        since = None if since_ms is None else min(since_ms * NS_PER_MS, at)
        self._note(Gap(since, at, list(wire.STREAMS), ["*"], reason, record.epoch, self.partition, record.n))

    def _note(self, gap: Gap) -> None:
        self._bars.gap(gap, self._tick or 0)
        if gap.reason != NOTHING_MISSED:  # it parts nothing
            self._anomalies.gap(gap, self._tick or 0)
        self._emit(topics.GAPS, None, encode(gap))

    def _advance(self, tick: int, fresh: list[str] | None) -> None:
        before = self._tick or 0
        if tick < before:
            return
        final, forming = self._bars.tick(before, tick)
        for bar in final:
            self._emit(topics.BARS_1M, bar.symbol, encode(bar))
        for bar in forming:
            self._emit(topics.FORMING, bar.symbol, encode(bar))
        for anomaly in self._anomalies.tick(before, tick, fresh, final):
            self._emit(topics.ANOMALIES, anomaly.symbol, encode(anomaly))
        closed = tick - self._settings.grace_ns
        end = closed - closed % MINUTE_NS
        if end > before - self._settings.grace_ns:
            value = encode(MinuteClosed(self.partition, end, self._bars.missed(), self._fingerprint))
            self._out.append(Output(topics.BARS_1M.name, None, value, self._at_ms, vouches=True))
        self._repeats.tick(tick)
        self._ticked(tick)

    def _ticked(self, tick: int) -> None:
        self._tick = tick
        self._latest = tick + self._settings.ahead_ns
        open_since = tick - self._settings.grace_ns
        self._in_time = max(open_since - open_since % MINUTE_NS, tick - self._settings.lateness_ns)

    def close(self) -> list[Output]:
        """Finalises what is still open, as if the recording ended at the last tick."""
        self._out = []
        bars: list[Bar] = self._bars.close(self._tick or 0)
        for bar in bars:
            self._emit(topics.BARS_1M, bar.symbol, encode(bar))
        return self._out

    # -- outputs -----------------------------------------------------------------------------------

    def _emit(self, topic: topics.Topic, key: str | None, value: bytes) -> None:
        self._out.append(Output(topic.name, None if key is None else key.encode(), value, self._at_ms))

    def _dead(self, data: bytes, reason: str, recv: int, epoch: int, n: int) -> None:
        self.counts["deadletter"] += 1
        letter = dead_letter(data, reason, recv, epoch, self.partition, n)
        self._emit(topics.DEAD_LETTERS, None, encode(letter))

    def _quarantine(self, ahead: TooFarAhead, data: bytes, recv: int, epoch: int, n: int) -> None:
        self.counts["quarantined"] += 1
        ahead_ns = ahead.ts - (self._tick or 0)
        detail = f"{ahead_ns / NS_PER_S:.3f} s ahead"
        self._anomalies.note("quarantined", ahead.symbol, ahead.ts, detail, epoch, n)
        event = Quarantined(ahead.symbol, ahead.ts, recv, ahead_ns, *text_of(data), epoch, self.partition, n)
        self._emit(topics.QUARANTINE, ahead.symbol, encode(event))

    def state(self) -> object:
        """Everything that later outputs depend on, comparable."""
        return (
            self._filter.state(),
            self._lost,
            self._tick,
            self._repeats.state(),
            self._bars.state(),
            self._anomalies.state(self._tick or 0),
        )


def _fresh(value: bytes) -> list[str] | None:
    """The streams that a tick calls fresh; None where it is no tick of ours."""
    try:
        return decode_tick_value(value).fresh
    except wire.DECODE_ERRORS:
        return None


def _message(part: msgspec.Raw) -> wire.Message | str:
    """The message, or the reason why it is none."""
    try:
        message: wire.Message = wire.decode_message(part)
        return message
    except wire.DECODE_ERRORS as error:
        return str(error)
