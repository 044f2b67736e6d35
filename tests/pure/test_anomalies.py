"""Each detector finds its thing, not what merely looks like it, and depends on nothing older than it declares."""

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.detectors.base import Detector
from processors.detectors.price_spike import PriceSpike
from processors.detectors.registry import DETECTORS, WrongThreshold, thresholds
from processors.detectors.stale_pair import StalePair
from processors.detectors.volume_spike import VolumeSpike
from processors.operators.anomalies import Anomalies
from processors.settings import PipelineSettings
from schemas.events import MINUTE_NS, NS_PER_MS, NS_PER_S, Anomaly, Bar, Gap, VendorBar

BEGIN = 1_732_200_000 * NS_PER_S  # a whole minute, and ten
STREAMS = ["XT", "XQ", "XA"]
BTC = "BTC-USD"


class Op(msgspec.Struct):
    """A call of the operator at a time of the feed clock."""

    clock: int
    name: str
    arguments: tuple[Any, ...]


class Runner:
    """The operator as the pipeline runs it: the last tick before its first one is the first call's second."""

    def __init__(self, **chosen: dict[str, Any]) -> None:
        self.anomalies = Anomalies(3, thresholds(chosen), "f")
        self.last: int | None = None

    def run(self, op: Op) -> list[Anomaly]:
        if self.last is None:
            self.last = op.clock - op.clock % NS_PER_S
        if op.name == "tick":
            before, self.last = self.last, op.clock
            return self.anomalies.tick(before, op.clock, *op.arguments)
        if op.name == "gap":
            self.anomalies.gap(op.arguments[0], self.last)
        else:
            getattr(self.anomalies, op.name)(*op.arguments)
        return []

    def state(self) -> object:
        return self.anomalies.state(self.last or 0)


class Tape:
    """Writes down what happens, second by second."""

    def __init__(self, **chosen: dict[str, Any]) -> None:
        self.ops: list[Op] = []
        self.clock = BEGIN
        self.n = 0
        self.chosen = chosen

    def _op(self, name: str, *arguments: Any) -> None:
        self.ops.append(Op(self.clock, name, arguments))

    def trade(self, price: float, size: float = 1.0, symbol: str = BTC, back_ms: int = 0, exchange: int = 1) -> int:
        self.n += 1
        self._op("trade", symbol, self.clock - back_ms * NS_PER_MS, price, size, exchange, 1, self.n)
        return self.n

    def quote(self, bid: float, ask: float, symbol: str = BTC, back_ms: int = 0, exchange: int = 1) -> None:
        self.n += 1
        self._op("quote", symbol, self.clock - back_ms * NS_PER_MS, bid, ask, exchange, 1, self.n)

    def note(self, what: str, symbol: str | None = BTC) -> None:
        self.n += 1
        self._op("note", what, symbol, self.clock, "detail", 1, self.n)

    def tick(self, seconds: float = 1, fresh: Sequence[str] | None = STREAMS, bars: Sequence[Bar] = ()) -> None:
        self.clock += round(seconds * NS_PER_S)
        self._op("tick", fresh, bars)

    def gap(self, seconds: float, reason: str = "reconnect", streams: Sequence[str] = STREAMS, pair: str = "*") -> None:
        since = self.clock
        self.clock += round(seconds * NS_PER_S)
        self.n += 1
        self._op("gap", Gap(since, self.clock, list(streams), [pair], reason, 1, 3, self.n))
        self._op("tick", None, ())

    def vendor(self, bar: VendorBar) -> None:
        self._op("vendor_bar", bar)

    def market(
        self, seconds: int, seed: int = 1, scale: float = 60_000.0, symbol: str = BTC, times: float = 1.0
    ) -> None:
        """A calm random walk around `scale`: 1 bp per s, a spread of 2 bps, 3 trades and 3 quotes each second; of so
        many times the usual size."""
        rng = Random(seed)
        price = scale
        for _ in range(seconds):
            price *= 1 + rng.gauss(0, 1e-4)
            for _ in range(3):
                self.quote(price * 0.9999, price * 1.0001 * (1 + rng.uniform(0, 1e-6)), symbol)
                self.trade(price * rng.choice((0.9999, 1.0001)), times * rng.lognormvariate(0, 1), symbol)
            self.tick()

    def found(self, kind: str | None = None) -> list[Anomaly]:
        runner = Runner(**self.chosen)
        return [one for op in self.ops for one in runner.run(op) if kind in (None, one.kind)]


def rebuilt(ops: Sequence[Op], at: int, chosen: dict[str, Any], memory_ns: int | None = None) -> Runner:
    """As processors.rebuild: from the memory before the record before, and 11 s."""
    runner = Runner(**chosen)
    memory_ns = memory_ns or max(runner.anomalies.memory_ns, runner.anomalies.bars_memory_ns)
    since = ops[at - 1].clock - memory_ns - 11 * NS_PER_S
    for op in ops[:at]:
        if op.clock >= since:
            runner.run(op)
    return runner


def assert_rebuilds(tape: Tape, places: Iterable[int]) -> None:
    """At each place a rebuild has the whole state of one pass, and says the same from there on."""
    whole = Runner(**tape.chosen)
    wanted = set(places)
    others: list[Runner] = []
    for at, op in enumerate(tape.ops):
        if at in wanted and at:
            others.append(rebuilt(tape.ops, at, tape.chosen))
            assert others[-1].state() == whole.state(), f"rebuilt at {at}"
        said = whole.run(op)
        for other in others[-3:]:
            assert other.run(op) == said


def one(found: Sequence[Anomaly]) -> Anomaly:
    assert len(found) == 1, found
    return found[0]


def bar(start: int, close: str = "2", volume: str = "10", revision: int = 0, flags: Sequence[str] = ()) -> Bar:
    d = Decimal
    return Bar(
        BTC, "1m", start, start + MINUTE_NS, d(1), d(3), d(1), d(close), d(volume), d(2), d(20), 5, d(5), d(5),
        "final", 0, revision, list(flags), 0, d(1), "trades", "f",
    )  # fmt: skip


def theirs(start: int, close: str = "2", volume: str = "10", high: str = "3", low: str = "1") -> VendorBar:
    d = Decimal
    end = start + MINUTE_NS
    return VendorBar(BTC, "1m", start, end, 0, d(1), d(high), d(low), d(close), d(volume), d(2), 1, 3, 7)


class TestPriceSpike:
    @pytest.mark.parametrize("scale", [1e-7, 0.42, 61_000.0, 1e6])
    @pytest.mark.parametrize("move", [1.0016, 0.9984])
    def test_one_print_far_off_is_found_at_the_next_tick_at_any_scale(self, scale: float, move: float) -> None:
        tape = Tape()
        tape.market(200, scale=scale)
        level = tape.ops[-2].arguments[2]
        n = tape.trade(level * move)
        tape.trade(level)
        tape.tick()
        assert one(tape.found("price_spike")).n == n

    def test_a_fat_finger_says_what_it_was_and_only_once(self) -> None:
        tape = Tape()
        tape.market(200)
        n = tape.trade(6_000.0)
        tape.tick()
        tape.market(60, 2)
        spike = one(tape.found("price_spike"))
        assert (spike.n, spike.epoch, spike.symbol, spike.severity) == (n, 1, BTC, "warning")
        assert spike.value == 6_000.0
        assert spike.expected == pytest.approx(60_000, rel=0.02)
        assert spike.detected - spike.ts_event == NS_PER_S
        assert spike.score is not None
        assert spike.threshold == 7.0 < spike.score

    def test_a_calm_market_has_none(self) -> None:
        tape = Tape()
        for seed in range(4):
            tape.market(600, seed)
            tape.gap(1)
        assert tape.found("price_spike") == []

    def test_a_market_that_runs_trade_by_trade_is_none(self) -> None:
        tape = Tape()
        tape.market(200)
        price = tape.ops[-2].arguments[2]
        for _ in range(100):
            price *= 1.0001
            tape.trade(price)
        tape.tick()
        assert tape.found("price_spike") == []

    def test_the_way_back_from_a_swept_book_is_none(self) -> None:
        tape = Tape()
        tape.market(200)
        price = tape.ops[-2].arguments[2]
        for step in range(50):
            tape.trade(price * (1 + step * 0.5e-4))
        tape.trade(price)
        tape.tick()
        assert tape.found("price_spike") == []

    def test_one_tick_is_none_where_the_price_hardly_ever_moves(self) -> None:
        tape = Tape()
        for second in range(600):
            tape.trade(1.01 if second % 50 == 49 else 1.0)
            tape.tick()
        assert tape.found("price_spike") == []

    def test_what_a_slow_pair_moves_by_from_trade_to_trade_is_none_within_a_second(self) -> None:
        tape = Tape()
        for number in range(60):
            tape.trade(60_000.0 + 60 * (number % 2))
            tape.tick(25 if number % 10 else 100)
        for price in (60_000.0, 60_060.0):
            for _ in range(3):
                tape.trade(price)
            tape.tick()
        assert tape.found("price_spike") == []

    def test_a_price_from_before_that_comes_late_is_none(self) -> None:
        tape = Tape()
        tape.market(200)
        tape.trade(50_000.0, back_ms=20_000)
        tape.tick()
        assert tape.found("price_spike") == []

    def test_after_a_gap_another_level_is_none(self) -> None:
        tape = Tape()
        tape.market(200)
        tape.gap(20)
        tape.market(60, 3, 70_000.0)
        assert tape.found("price_spike") == []

    def test_a_hole_in_the_middle_of_a_second_parts_it(self) -> None:
        """It is noted without a tick of its own."""
        tape = Tape()
        tape.market(200)
        for _ in range(5):
            tape.trade(60_000.0)
        tape.ops.append(Op(tape.clock, "gap", (Gap(tape.clock, tape.clock, STREAMS, ["*"], "hole", 2, 3, 0),)))
        for _ in range(5):
            tape.trade(70_000.0)
        tape.tick()
        assert tape.found("price_spike") == []

    def test_a_gap_of_another_pair_or_stream_changes_nothing(self) -> None:
        for gap in ({"pair": "ETH-USD"}, {"streams": ["XQ"]}):
            tape = Tape()
            tape.market(200)
            tape.gap(0.5, **gap)  # type: ignore[arg-type]
            tape.trade(70_000.0)
            tape.tick()
            one(tape.found("price_spike"))


class TestVolumeSpike:
    def test_a_burst_is_found_in_the_second_it_reaches_the_threshold(self) -> None:
        tape = Tape()
        tape.market(600)
        tape.trade(60_000.0, 1_000.0)
        n = tape.trade(60_000.0, 1_001.0)
        tape.tick()
        tape.market(60, 2)
        spike = one(tape.found("volume_spike"))
        assert (spike.n, spike.severity) == (n, "info")
        assert spike.detected - spike.ts_event == NS_PER_S

    @pytest.mark.parametrize(("times", "count"), [(2, 0), (5, 1)])
    def test_a_minute_of_five_times_the_usual_volume_is_one(self, times: float, count: int) -> None:
        for late in range(0, 10, 3):
            tape = Tape()
            tape.market(600 + late)
            tape.market(60, 2, times=times)
            tape.market(120, 3)
            assert len(tape.found("volume_spike")) == count

    def test_bursts_do_not_hide_each_other(self) -> None:
        tape = Tape()
        tape.market(600)
        for seed in range(6):
            tape.market(60, seed, times=5)
            tape.market(600, seed)
        assert len(tape.found("volume_spike")) == 6

    def test_a_single_large_trade_is_none(self) -> None:
        tape = Tape()
        tape.market(600)
        tape.trade(60_000.0, 100_000.0)
        tape.tick()
        tape.market(120, 2)
        assert tape.found("volume_spike") == []

    def test_a_pair_that_seldom_trades_has_none(self) -> None:
        tape = Tape()
        for _ in range(100):
            tape.trade(60_000.0)
            tape.tick(35)
        for _ in range(10):
            tape.trade(60_000.0, 100_000.0)
        tape.tick()
        assert tape.found("volume_spike") == []


class TestQuotes:
    def test_a_trade_outside_the_quote_of_its_exchange(self) -> None:
        tape = Tape()
        tape.quote(99.9, 100.1)
        tape.quote(90.0, 91.0, exchange=2)
        tape.trade(100.0)
        tape.trade(90.5, exchange=2)
        n = tape.trade(102.0)
        tape.trade(100.0)
        tape.tick()
        through = one(tape.found("trade_through"))
        assert (through.n, through.value, through.expected) == (n, 102.0, 100.1)
        assert through.score == pytest.approx(9.5)

    @pytest.mark.parametrize("price", [100.0, 100.1, 99.9, 100.3, 99.5])
    def test_inside_or_just_outside_is_none(self, price: float) -> None:
        tape = Tape()
        tape.quote(99.9, 100.1)
        tape.trade(price)
        tape.tick()
        assert tape.found("trade_through") == []

    def test_a_quote_expires_and_a_gap_ends_it(self) -> None:
        for end in (lambda tape: [tape.tick() for _ in range(6)], lambda tape: tape.gap(1)):
            tape = Tape()
            tape.quote(99.9, 100.1)
            tape.tick()
            end(tape)
            tape.trade(150.0)
            tape.tick()
            assert tape.found("trade_through") == []

    def test_a_late_trade_is_not_judged_by_a_newer_quote(self) -> None:
        tape = Tape()
        tape.quote(99.9, 100.1)
        tape.trade(150.0, back_ms=2_000)
        tape.tick()
        assert tape.found("trade_through") == []

    @pytest.mark.parametrize(("bid", "ask", "kinds"), [
        (100.1, 100.0, ["crossed_quote"]), (100.0, 100.0, ["locked_quote"]), (100.0, 100.01, []), (100.0, 0.0, []), (0.0, 100.0, []),
    ])  # fmt: skip
    def test_crossed_and_locked(self, bid: float, ask: float, kinds: list[str]) -> None:
        tape = Tape()
        tape.quote(99.0, 101.0)
        tape.quote(bid, ask)
        tape.tick()
        assert [a.kind for a in tape.found()] == kinds

    def test_a_quote_crossed_for_an_hour_is_said_once_and_again_after_it_was_well(self) -> None:
        tape = Tape()
        for second in range(4_000):
            tape.quote(100.1 if second < 3_600 or second > 3_900 else 99.9, 100.0)
            tape.tick()
        assert [(a.detected - BEGIN) // NS_PER_S for a in tape.found("crossed_quote")] == [1, 3_902]

    def test_a_spread_far_wider_than_usual(self) -> None:
        tape = Tape()
        tape.market(200)
        for _ in range(5):
            tape.quote(59_000.0, 61_000.0)
            tape.tick()
        wide = one(tape.found("wide_spread"))
        assert wide.value == pytest.approx(333.3, rel=1e-3)
        assert wide.expected == pytest.approx(2.0, rel=1e-2)

    def test_one_wide_quote_among_others_is_none(self) -> None:
        tape = Tape()
        tape.market(200)
        tape.quote(59_000.0, 61_000.0)
        tape.quote(59_994.0, 60_006.0)
        tape.tick()
        assert tape.found("wide_spread") == []


class TestStale:
    def test_a_pair_that_stops_is_said_once(self) -> None:
        tape = Tape()
        tape.market(200)
        for _ in range(900):
            tape.tick()
        found = tape.found("stale_pair")
        assert [(a.symbol, a.value, a.expected) for a in found] == [(BTC, 30.0, 1.0)] * 2
        assert [a.id.split(":")[3] for a in found] == ["XQ", "XT"]

    def test_a_quote_that_is_sent_again_and_again_is_frozen(self) -> None:
        tape = Tape()
        tape.market(200)
        for _ in range(60):
            tape.trade(60_000.0)
            tape.quote(59_990.0, 60_010.0)
            tape.tick()
        stale = one(tape.found("stale_pair"))
        assert "no other quote" in stale.detail

    def test_one_freeze_does_not_hide_the_next(self) -> None:
        tape = Tape()
        tape.market(200)
        for seed in range(2):
            for _ in range(120):
                tape.quote(59_990.0, 60_010.0)
                tape.tick()
            tape.market(200, seed)
        assert ["no other quote" in a.detail for a in tape.found("stale_pair") if ":XQ:" in a.id] == [True] * 2

    def test_a_pair_that_is_quiet_by_habit_is_not(self) -> None:
        tape = Tape()
        for second in range(3_000):
            if second % 20 == 0 or 1_000 <= second < 1_010:
                tape.trade(60_000.0)
            tape.tick()
            if second % 600 == 599:
                for _ in range(50):
                    tape.tick()
        assert tape.found("stale_pair") == []

    def test_not_while_the_stream_itself_is_stale_and_not_after_a_gap(self) -> None:
        for gap, fresh in ((False, []), (True, STREAMS)):
            tape = Tape()
            tape.market(200)
            if gap:
                tape.gap(1)
            for _ in range(100):
                tape.tick(fresh=fresh)
            assert tape.found("stale_pair") == []

    def test_a_stream_that_is_no_longer_fresh(self) -> None:
        tape = Tape()
        for _ in range(300):
            tape.tick()
        for _ in range(600):
            tape.tick(fresh=["XT", "XA"])
        stale = one(tape.found("stale_feed"))
        assert (stale.severity, stale.symbol, stale.detail) == ("critical", None, "XQ is not fresh any more")
        assert stale.detected == BEGIN + 301 * NS_PER_S

    def test_a_stream_that_comes_and_goes_while_it_is_learned_is_not(self) -> None:
        tape = Tape()
        for second in range(600):
            tape.tick(fresh=["XT", "XQ"] if second % 60 > 12 else STREAMS)
        assert tape.found("stale_feed") == []


class TestNumbers:
    @pytest.mark.parametrize(("what", "kind", "severity"), [
        ("duplicate", "duplicate", "info"), ("quarantined", "timestamp_out_of_bounds", "warning"), ("impossible", "impossible_value", "critical"),
    ])  # fmt: skip
    def test_once_a_minute_and_pair(self, what: str, kind: str, severity: str) -> None:
        tape = Tape()
        for _ in range(150):
            tape.note(what)
            tape.note(what, "ETH-USD")
            tape.tick()
        found = tape.found(kind)
        assert [(a.symbol, (a.detected - BEGIN) // NS_PER_S) for a in found] == [
            (symbol, second) for second in (1, 61, 121) for symbol in (BTC, "ETH-USD")
        ]
        assert {a.severity for a in found} == {severity}
        assert tape.found() == found

    def test_late_data_only_where_it_is_many(self) -> None:
        tape = Tape()
        for number in range(19):
            tape.note("late")
            tape.tick(1 if number % 2 else 0.5)
        assert tape.found() == []
        tape.note("late")
        tape.tick()
        assert one(tape.found()).value == 20

    def test_out_of_order_by_more_than_a_second(self) -> None:
        for back_ms, count in ((1_000, 0), (1_001, 1)):
            tape = Tape()
            for _ in range(20):
                tape.trade(1.0)
                tape.trade(1.0, back_ms=back_ms)
            tape.tick()
            assert [a.kind for a in tape.found()] == ["out_of_order"] * count

    def test_an_exchange_of_slow_quotes_does_not_disorder_trades(self) -> None:
        tape = Tape()
        for _ in range(40):
            tape.trade(1.0)
            tape.quote(1.0, 1.1, back_ms=1_500)
        tape.tick()
        assert tape.found() == []

    def test_a_gap_is_said_with_its_reason_and_a_harmless_one_mildly(self) -> None:
        tape = Tape()
        tape.gap(5, "start")
        tape.gap(20, "away")
        tape.gap(3, "silence")
        assert [(a.value, a.severity) for a in tape.found()] == [(20.0, "warning"), (3.0, "info")]

    def test_an_aggregate_that_contradicts_itself(self) -> None:
        tape = Tape()
        tape.vendor(theirs(BEGIN, close="4"))
        tape.tick()
        assert one(tape.found()).kind == "impossible_value"


class TestVendorMismatch:
    def run(
        self, ours: Sequence[Bar], vendor: Sequence[VendorBar], before: Callable[[Tape], None] | None = None
    ) -> list[Anomaly]:
        tape = Tape()
        tape.tick(60)
        if before:
            before(tape)
        tape.tick(2, bars=ours[:1])
        for one_bar in vendor:
            tape.vendor(one_bar)
        for _ in range(40):
            tape.tick()
        tape.tick(bars=ours[1:])
        for _ in range(700):
            tape.tick()
        return tape.found("vendor_mismatch")

    def test_both_values_of_what_differs_are_in_it(self) -> None:
        found = one(self.run([bar(BEGIN)], [theirs(BEGIN, "2.5", "12")]))
        assert found.detail == "close 2, the vendor's 2.5; volume 10, the vendor's 12"
        assert (found.value, found.expected) == (2.0, 2.5)
        assert (found.interval, found.start, found.repair, found.revision) == ("1m", BEGIN, 0, 0)

    def test_the_last_message_and_the_highest_revision_count_after_they_settled(self) -> None:
        assert self.run([bar(BEGIN, volume="9"), bar(BEGIN, revision=1)], [theirs(BEGIN, "2.5"), theirs(BEGIN)]) == []
        late = one(self.run([bar(BEGIN), bar(BEGIN, volume="9", revision=1)], [theirs(BEGIN)]))
        assert late.revision == 1
        assert late.detected >= BEGIN + 163 * NS_PER_S

    def test_within_the_tolerance_is_none(self) -> None:
        assert self.run([bar(BEGIN)], [theirs(BEGIN, "2.00015", "10.009")]) == []

    def test_where_our_bar_is_partial_or_a_gap_lies_nothing_is_said(self) -> None:
        assert self.run([bar(BEGIN, flags=["partial"])], [theirs(BEGIN, "2.5")]) == []
        missed: list[Bar] = [bar(BEGIN + MINUTE_NS)]
        one(self.run(missed, [theirs(BEGIN)]))
        assert self.run(missed, [theirs(BEGIN)], lambda tape: tape.gap(0.5, pair="ETH-USD")) != []
        assert self.run([bar(BEGIN)], [theirs(BEGIN + MINUTE_NS)], lambda tape: tape.gap(0.5)) == []

    def test_a_minute_that_we_do_not_have_at_all(self) -> None:
        found = one(self.run([bar(BEGIN - MINUTE_NS)], [theirs(BEGIN)]))
        assert (found.value, found.expected, found.start) == (0.0, 10.0, None)
        assert self.run([], [theirs(BEGIN)]) == []


class TestMemory:
    """Rule 8: a rebuild in the middle of a condition that lasts longer than the memory."""

    def test_no_detector_remembers_more_than_half_an_hour(self) -> None:
        assert all(0 < detector.memory_ns <= 30 * MINUTE_NS for detector in DETECTORS)

    @pytest.mark.parametrize("condition", ["crossed", "wide", "frozen", "silent", "stale", "late", "spikes", "volume"])
    def test_a_condition_that_lasts_longer_than_the_memory(self, condition: str) -> None:
        tape = Tape()
        tape.market(300)
        rng = Random(5)
        for second in range(2_400):
            price = 60_000 * (1 + rng.gauss(0, 1e-4))
            fresh = STREAMS
            bid, ask = price * 0.9999, price * 1.0001
            match condition:
                case "crossed":
                    bid, ask = ask, bid
                case "wide":
                    bid *= 0.9
                case "frozen":
                    bid, ask = 59_990.0, 60_010.0
                case "stale":
                    fresh = ["XT"]
                case "late":
                    for _ in range(3):
                        tape.note("late")
                    tape.trade(price, back_ms=5_000)
                case "spikes":
                    tape.trade(price * rng.choice((0.5, 1, 2)))
            if condition != "silent" or second % 900 == 0:
                tape.quote(bid, ask)
                tape.trade(price, 1e6 if condition == "volume" and second % 10 else 1.0)
            tape.tick(fresh=fresh)
        at = [index for index, op in enumerate(tape.ops) if op.clock > BEGIN + 1_700 * NS_PER_S]
        assert_rebuilds(tape, at[:: len(at) // 4])

    @pytest.mark.parametrize("detector", [PriceSpike, VolumeSpike, StalePair])
    def test_the_memory_of_each_that_learns_is_enough_for_it_alone(
        self, detector: type[Detector], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("processors.operators.anomalies.DETECTORS", (detector,))
        tape = Tape()
        tape.market(900)
        for _ in range(100):
            tape.trade(60_000.0)
            tape.quote(59_990.0, 60_010.0)
            tape.tick(17)
        at = len(tape.ops)
        tape.market(1_200, 2)
        whole = Runner()
        for op in tape.ops[:at]:
            whole.run(op)
        for place in range(at, len(tape.ops), 2_000):
            assert rebuilt(tape.ops, place, {}, detector.memory_ns).state() == whole.state()
            for op in tape.ops[place : place + 2_000]:
                whole.run(op)

    phases = st.lists(
        st.tuples(
            st.sampled_from(
                ["market", "market", "slow", "quiet", "gap", "crossed", "spiky", "notes", "bars", "stale", "hush"]
            ),
            st.sampled_from([1, 7, 61, 400]),
        ),
        min_size=3,
        max_size=10,
    )

    @settings(max_examples=25)
    @given(phases, st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=3, max_size=3))
    def test_a_rebuild_anywhere_in_any_market(
        self, phases: list[tuple[str, int]], seed: int, places: list[float]
    ) -> None:
        tape = written(phases, seed)
        assert_rebuilds(tape, [round(place * (len(tape.ops) - 1)) for place in places])


def written(phases: Sequence[tuple[str, int]], seed: int) -> Tape:
    """A market of two pairs that goes through phases of so many seconds."""
    rng = Random(seed)
    tape = Tape(late_data={"least": 2}, out_of_order={"least": 2})
    for phase, seconds in phases:
        if phase == "gap":
            tape.gap(rng.choice((0.3, 20, 3_000)), streams=rng.choice((STREAMS, ["XT"])), pair=rng.choice(("*", BTC)))
            continue
        if phase == "hush":
            tape.tick(seconds * rng.choice((1, 20)))
            continue
        for second in range(seconds):
            for symbol in (BTC, "ETH-USD") if rng.random() < 0.5 else ("ETH-USD",):
                if (phase == "slow" and second % 20) or phase == "quiet":
                    continue
                price = 60_000 * (1 + rng.gauss(0, 2e-4))
                if phase == "spiky" and rng.random() < 0.1:
                    price *= rng.choice((0.9, 1.002, 1.1))
                tape.quote(
                    price * 0.9999, price * (0.9998 if phase == "crossed" else 1.0001), symbol, rng.choice((0, 900))
                )
                tape.trade(
                    price, rng.lognormvariate(0, 2), symbol, rng.choice((0, 0, 0, 0, 3_000, 70_000)), rng.choice((1, 2))
                )
            if phase == "notes":
                tape.note(rng.choice(("duplicate", "late", "quarantined", "impossible")), rng.choice((BTC, None)))
            bars = []
            if phase == "bars" and rng.random() < 0.2:
                start = tape.clock - tape.clock % MINUTE_NS - rng.choice((1, 2, 9, 12)) * MINUTE_NS
                bars = [bar(start, volume=rng.choice(("9", "10")))]
                tape.vendor(theirs(start + rng.choice((0, 0, MINUTE_NS)), high=rng.choice(("3", "1"))))
            tape.tick(fresh=["XT"] if phase == "stale" else STREAMS, bars=bars)
    tape.tick()
    return tape


class TestThresholds:
    def test_they_are_settings_and_part_of_the_fingerprint(self) -> None:
        chosen = PipelineSettings(detectors=thresholds({"price_spike": {"deviations": 8}}))
        assert chosen.fingerprint() != PipelineSettings().fingerprint()
        assert dict(chosen.detectors)["price_spike"].deviations == 8  # type: ignore[attr-defined]

    @pytest.mark.parametrize(("chosen", "said"), [
        ({"price_spke": {}}, "there is no detector 'price_spke'; there are price_spike,"),
        ({"price_spike": {"sigma": 3}}, "price_spike: Object contains unknown field `sigma` (its thresholds: deviations)"),
        ({"price_spike": {"deviations": -1}}, "price_spike: Expected `float` > 0.0"),
        ({"price_spike": {"deviations": "many"}}, "price_spike: Expected `float`, got `str`"),
    ])  # fmt: skip
    def test_wrong_ones_are_refused_by_name(self, chosen: dict[str, Any], said: str) -> None:
        with pytest.raises(WrongThreshold) as error:
            thresholds(chosen)
        assert said in str(error.value)

    def test_every_kind_is_in_the_documentation(self) -> None:
        page = (Path(__file__).parents[2] / "docs" / "anomalies.md").read_text()
        assert [d.kind for d in DETECTORS if f"`{d.kind}`" not in page] == []
