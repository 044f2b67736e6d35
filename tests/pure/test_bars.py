"""Exact one-minute bars: what is in them, when they come, and how they are revised."""

import json
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from processors.pipeline import Output, Pipeline
from processors.settings import PipelineSettings
from schemas import topics
from schemas.events import MINUTE_NS, NS_PER_MS, NS_PER_S
from schemas.raw import GapValue, RawRecord, TickValue

from . import logs
from .feed import T0, Feed, through, xq, xt
from .reference import Reference, decoded, highest, twelve_digits

SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000
SETTINGS = PipelineSettings()


class Tape:
    """A partition's log written by hand. Times are ms after T0, a whole minute; it begins a second before."""

    def __init__(self, settings: PipelineSettings = SETTINGS, start_ms: int = -SECOND) -> None:
        self.pipeline = Pipeline(1, settings)
        self.now = start_ms
        self.epoch, self.n = 1, 0
        self.outputs: list[Output] = []
        self.gap(start_ms, None, "start")

    def _put(self, kind: str, value: bytes) -> list[Output]:
        record = RawRecord(1, T0 + self.now, kind, self.epoch, self.n, [(T0 * NS_PER_MS, 1)], value)
        self.n += 1
        made = self.pipeline.process(record)
        self.outputs += made
        return made

    def trade(self, ms: int, price: str = "100", size: str = "1", **fields: Any) -> dict[str, Any]:
        """What became of a trade at `ms`; before it the tick that it brings."""
        if ms >= self.now + SECOND:
            self.tick(ms - ms % SECOND)
        return self.early(ms, price, size, **fields)

    def early(self, ms: int, price: str = "100", size: str = "1", **fields: Any) -> dict[str, Any]:
        """The same without a tick."""
        (output,) = self._put("slice", b"[" + xt(T0 + ms, p=price, s=size, i=fields.pop("i", self.n), **fields) + b"]")
        return {"topic": output.topic, **json.loads(output.value)}

    def event(self, data: bytes) -> list[Output]:
        return self._put("slice", b"[" + data + b"]")

    def tick(self, ms: int) -> list[dict[str, Any]]:
        """The bars that a tick brings."""
        self.now = ms
        return bars_of(self._put("tick", msgspec.json.encode(TickValue([]))))

    def gap(
        self, ms: int, since: int | None, reason: str = "reconnect", to: int | None = 0, **value: Any
    ) -> list[dict[str, Any]]:
        """The bars that a gap brings which ends at `ms`."""
        self.now = ms
        ns = None if since is None else (T0 + since) * NS_PER_MS
        end = None if to is None else (T0 + ms + to) * NS_PER_MS
        content = GapValue(ns, end, value.get("streams", ["XT", "XQ"]), value.get("pairs", ["*"]), reason)
        return bars_of(self._put("gap", msgspec.json.encode(content)))

    def close(self) -> list[dict[str, Any]]:
        return bars_of(self.pipeline.close())


def forming_of(outputs: list[Output]) -> list[dict[str, Any]]:
    return [decoded(output.value) for output in outputs if output.topic == topics.FORMING.name]


def bars_of(outputs: list[Output]) -> list[dict[str, Any]]:
    return [decoded(output.value) for output in outputs if output.topic == topics.BARS_1M.name and output.key]


def gaps_of(outputs: list[Output]) -> list[dict[str, Any]]:
    return [decoded(output.value) for output in outputs if output.topic == topics.GAPS.name]


def markers_of(outputs: list[Output]) -> list[int]:
    """Ends of closed minutes, ms after T0."""
    return [
        json.loads(output.value)["end"] // NS_PER_MS - T0
        for output in outputs
        if output.topic == topics.BARS_1M.name and output.key is None
    ]


class TestWhatIsInABar:
    def test_prices_volumes_and_counts(self) -> None:
        tape = Tape()
        for ms, price, size in [
            (100, "10", "1"),
            (200, "12.5", "0.5"),
            (300, "9.75", "2"),
            (59_999, "11", "0.25"),
        ]:
            tape.trade(ms, price, size)
        tape.trade(60_000, "99", "9")
        (bar,) = tape.tick(62_000)
        assert (bar["open"], bar["high"], bar["low"], bar["close"]) == (10, Fraction("12.5"), Fraction("9.75"), 11)
        assert (bar["volume"], bar["trade_count"]) == (Fraction("3.75"), 4)
        assert (bar["start"], bar["end"]) == (T0 * NS_PER_MS, (T0 + MINUTE) * NS_PER_MS)
        assert (bar["symbol"], bar["interval"], bar["status"], bar["source"]) == (
            "BTC-USD",
            "1m",
            "final",
            "trades",
        )
        assert (bar["repair"], bar["revision"], bar["flags"], bar["missing_ns"], bar["quality"]) == (
            0,
            0,
            [],
            0,
            1,
        )

    def test_sums_are_exact_where_floats_are_not(self) -> None:
        tape = Tape()
        for _ in range(10):
            tape.trade(100, "0.1", "0.1")
        tape.trade(100, "1", "0.000000000000000001")
        (bar,) = tape.tick(62_000)
        assert bar["volume"] == Fraction("1.000000000000000001")

    def test_a_sum_that_comes_out_whole_has_no_trailing_zeros(self) -> None:
        tape = Tape()
        tape.trade(100, "100.50", "0.25")
        tape.trade(100, "100.50", "99.75")
        tape.tick(62_000)
        assert any(b'"volume":100,' in output.value for output in tape.outputs)
        assert any(b'"open":100.5,' in output.value for output in tape.outputs)

    @pytest.mark.parametrize(
        ("price", "vwap"),
        [
            ("1.23456789012", "1.23456789012"),
            ("1.234567890125", "1.23456789012"),
            ("1.234567890135", "1.23456789014"),
            ("1.2345678901250001", "1.23456789013"),
            ("99999999999.95", "100000000000"),
            ("0.000000012345678901250", "0.0000000123456789012"),
        ],
    )
    def test_vwap_has_twelve_digits_rounded_half_even(self, price: str, vwap: str) -> None:
        tape = Tape()
        tape.trade(100, price, "3")
        tape.tick(62_000)
        assert any(f'"vwap":{vwap},'.encode() in output.value for output in tape.outputs)
        assert twelve_digits(Fraction(price)) == Fraction(vwap)

    def test_vwap_is_rounded_once_from_exact_sums(self) -> None:
        tape = Tape()
        tape.trade(100, "1", "1")
        tape.trade(100, "2", "2")
        (bar,) = tape.tick(62_000)
        assert bar["vwap"] == Fraction("1.66666666667")

    def test_open_and_close_go_by_event_time_and_then_by_place_in_the_log(self) -> None:
        tape = Tape()
        for ms, price in [(500, "5"), (100, "1"), (100, "2"), (900, "8"), (900, "9"), (300, "3")]:
            tape.trade(ms, price)
        (bar,) = tape.tick(62_000)
        assert (bar["open"], bar["close"]) == (1, 9)

    def test_a_later_epoch_comes_after_an_earlier_one_whatever_its_numbers(self) -> None:
        tape = Tape()
        tape.trade(100, "1")
        tape.trade(100, "2")
        tape.epoch, tape.n = 2, 0
        tape.gap(500, 400, "away")
        tape.trade(100, "3", i="z")
        (bar,) = tape.tick(62_000)
        assert (bar["open"], bar["close"]) == (1, 3)

    def test_volume_is_split_by_the_aggressors_side(self) -> None:
        tape = Tape()
        for conditions, size in [("[2]", "1"), ("[1]", "10"), ("[0]", "100"), ("[2]", "0.5")]:
            event = xt(T0 + 100, s=size, i=size).replace(b'"c":[1]', f'"c":{conditions}'.encode())
            tape.event(event)
        (bar,) = tape.tick(62_000)
        assert (bar["volume"], bar["buy_volume"], bar["sell_volume"]) == (Fraction("111.5"), Fraction("1.5"), 10)

    def test_pairs_have_their_own_bars_in_the_order_of_their_names(self) -> None:
        tape = Tape()
        tape.trade(100, "1", pair="XRP-USD")
        tape.trade(60_100, "2")
        tape.trade(200, "3")
        bars = tape.tick(130_000)
        assert [(bar["symbol"], bar["open"]) for bar in bars] == [("BTC-USD", 3), ("XRP-USD", 1), ("BTC-USD", 2)]

    def test_quotes_make_no_bar(self) -> None:
        tape = Tape()
        tape.event(xq(T0 + 100))
        assert tape.tick(62_000) == []


class TestWhenItComes:
    def test_at_the_first_tick_at_or_past_its_end_and_the_grace(self) -> None:
        tape = Tape()
        tape.trade(100)
        assert tape.tick(61_999) == []
        assert len(tape.tick(62_000)) == 1
        assert tape.tick(63_000) == []

    def test_without_grace_at_its_end(self) -> None:
        tape = Tape(PipelineSettings(grace_ns=0))
        tape.trade(100)
        assert len(tape.tick(60_000)) == 1

    def test_a_trade_in_the_grace_is_in_time(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(61_000)
        assert tape.trade(59_999)["flags"] == []
        (bar,) = tape.tick(62_000)
        assert (bar["trade_count"], bar["revision"], bar["flags"]) == (2, 0, [])

    def test_never_between_ticks(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(60_000)
        tape.early(65_000)
        assert bars_of(tape.outputs) == []

    def test_a_gap_is_a_tick(self) -> None:
        tape = Tape()
        tape.trade(100)
        (bar,) = tape.gap(62_000, 59_000)
        assert bar["flags"] == ["partial", "gap"]

    def test_a_marker_says_which_minutes_are_closed_also_where_nothing_traded(self) -> None:
        tape = Tape()
        for ms in (1_000, 2_000, 61_000, 62_000, 63_000, 400_000):
            tape.tick(ms)
        assert markers_of(tape.outputs) == [0, 60_000, 360_000]

    def test_it_comes_after_the_bars_it_vouches_for(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        bar, marker = tape.outputs[-2:]
        assert bar.key == b"BTC-USD"
        assert (marker.key, marker.vouches, bar.vouches) == (None, True, False)
        assert json.loads(marker.value) == {
            "kind": "minute_closed",
            "partition": 1,
            "end": (T0 + MINUTE) * NS_PER_MS,
            "missed": [{"from": None, "to": (T0 - SECOND) * NS_PER_MS, "pairs": ["*"], "reason": "start"}],
            "fingerprint": SETTINGS.fingerprint(),
        }

    def test_settings_change_the_fingerprint(self) -> None:
        others = {
            SETTINGS,
            PipelineSettings(lateness_ns=1),
            PipelineSettings(grace_ns=1),
            PipelineSettings(ahead_ns=1),
        }
        assert len({settings.fingerprint() for settings in others}) == 4
        assert PipelineSettings().fingerprint() == SETTINGS.fingerprint()


class TestLateTrades:
    def test_a_late_trade_is_folded_in_and_the_bar_comes_again_at_the_next_tick(self) -> None:
        tape = Tape()
        tape.trade(100, "10")
        tape.tick(62_000)
        assert tape.trade(50, "7")["flags"] == ["late"]
        (bar,) = tape.tick(63_000)
        assert (bar["open"], bar["close"], bar["low"], bar["revision"], bar["flags"]) == (7, 10, 7, 1, ["late"])
        assert tape.tick(64_000) == []

    def test_several_between_two_ticks_are_one_version_that_counts_them_all(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        for _ in range(3):
            tape.trade(200)
        (bar,) = tape.tick(63_000)
        assert (bar["trade_count"], bar["revision"]) == (4, 3)

    def test_the_first_trade_of_a_minute_that_closed_empty_gives_revision_one(self) -> None:
        tape = Tape()
        tape.tick(62_000)
        tape.trade(100)
        (bar,) = tape.tick(63_000)
        assert (bar["revision"], bar["flags"]) == (1, ["late"])

    def test_a_gap_after_the_empty_closing_counts_as_well(self) -> None:
        tape = Tape()
        tape.tick(62_000)
        assert tape.gap(70_000, 30_000) == []
        tape.trade(100)
        (bar,) = tape.tick(71_000)
        assert (bar["revision"], bar["flags"]) == (2, ["partial", "gap", "late"])

    def test_a_gap_before_the_empty_closing_does_not(self) -> None:
        tape = Tape()
        tape.gap(50_000, 30_000)
        tape.tick(62_000)
        tape.trade(100)
        (bar,) = tape.tick(63_000)
        assert bar["revision"] == 1

    def test_up_to_the_horizon_it_is_late_and_past_it_too_late(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        tape.tick(901_000)
        assert tape.trade(1_000)["flags"] == ["late"]
        too_late = tape.trade(999)
        assert (too_late["topic"], too_late["flags"]) == (topics.TRADES.name, ["too_late"])
        (bar,) = tape.tick(902_000)
        assert bar["trade_count"] == 2

    def test_a_trade_too_late_changes_no_bar_and_is_always_published(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        tape.tick(2 * HOUR)
        assert tape.trade(100, i="again")["flags"] == ["too_late"]
        assert tape.trade(100, i="again")["flags"] == ["too_late"]
        assert tape.tick(2 * HOUR + 1_000) == []

    def test_the_last_revision_comes_even_where_the_next_tick_is_hours_later(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        tape.trade(100)
        (bar,) = tape.tick(5 * HOUR)
        assert bar["revision"] == 1

    def test_a_repeated_trade_is_dropped_in_its_own_minute_only(self) -> None:
        tape = Tape()
        tape.trade(100, i="a")
        assert tape.event(xt(T0 + 200, i="a", p="7")) == []
        tape.trade(60_100, i="a")
        tape.trade(300, i="a", x=2)
        tape.trade(400, i="a", pair="SOL-USD")
        (btc, sol) = tape.tick(62_000)
        assert (btc["trade_count"], sol["trade_count"]) == (2, 1)
        assert tape.pipeline.counts["duplicate"] == 1

    def test_an_event_ten_seconds_ahead_of_the_last_tick_is_believed_and_not_a_millisecond_more(self) -> None:
        tape = Tape()
        tape.tick(20_000)
        assert tape.early(30_000)["topic"] == topics.TRADES.name
        ahead = tape.early(30_001)
        assert (ahead["topic"], ahead["ahead_ns"]) == (topics.QUARANTINE.name, 10_001 * NS_PER_MS)
        (bar,) = tape.tick(62_000)
        assert bar["trade_count"] == 1


class TestGaps:
    def test_the_minute_in_which_the_recording_began_is_partial_but_has_no_gap(self) -> None:
        tape = Tape(start_ms=15_000)
        tape.trade(16_000)
        (bar,) = tape.tick(62_000)
        assert (bar["flags"], bar["missing_ns"], bar["quality"]) == (
            ["partial"],
            15_000 * NS_PER_MS,
            Fraction("0.75"),
        )

    def test_quality_is_what_marked_gaps_leave(self) -> None:
        tape = Tape()
        tape.gap(10_000, 4_000)
        tape.gap(12_000, 8_000)
        tape.gap(30_001, 30_000)
        tape.trade(31_000)
        (bar,) = tape.tick(62_000)
        assert bar["missing_ns"] == (8_000 + 1) * NS_PER_MS
        assert bar["quality"] == round(1 - Fraction(8_001, 60_000), 4)

    def test_a_gap_that_touches_closed_minutes_revises_each_of_them(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.trade(60_100)
        tape.trade(120_100)
        tape.tick(122_000)
        bars = tape.gap(130_000, 59_999)
        assert [(bar["start"] // NS_PER_MS - T0, bar["revision"], bar["flags"]) for bar in bars] == [
            (0, 1, ["partial", "gap"]),
            (60_000, 1, ["partial", "gap"]),
        ]
        (third,) = tape.tick(182_000)
        assert (third["revision"], third["missing_ns"]) == (0, 10_000 * NS_PER_MS)

    @pytest.mark.parametrize(
        ("since", "to", "touched"),
        [(60_000, 0, False), (59_999, 0, True), (-5_000, -70_000, True), (-5_000, -70_001, False)],
    )
    def test_both_ends_of_a_gap_belong_to_it(self, since: int, to: int, touched: bool) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        assert bool(tape.gap(70_000, since, to=to)) == touched

    @pytest.mark.parametrize("value", [{"streams": ["XQ"]}, {"streams": []}, {"pairs": ["SOL-USD"]}, {"pairs": []}])
    def test_a_gap_without_the_bars_trades_does_not_touch_it(self, value: dict[str, Any]) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        assert tape.gap(63_000, 1_000, **value) == []
        (*_, last) = [json.loads(output.value) for output in tape.outputs if output.topic == topics.GAPS.name]
        assert last["reason"] == "reconnect"

    def test_a_gap_of_the_bars_own_pair_does(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        assert len(tape.gap(63_000, 1_000, pairs=["SOL-USD", "BTC-USD"])) == 1

    def test_a_gap_without_an_end_ends_at_its_own_time(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.gap(30_000, 20_000, "stop", to=None)
        (bar,) = tape.tick(62_000)
        assert bar["missing_ns"] == 10_000 * NS_PER_MS

    def test_a_gap_never_ends_after_its_own_time(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.gap(30_000, 20_000, to=HOUR)
        (bar,) = tape.tick(62_000)
        assert bar["missing_ns"] == 10_000 * NS_PER_MS

    def test_a_gap_never_begins_after_its_end(self) -> None:
        """An orderly stop's begins at the clock, in ns, and ends at its record's time, in ms."""
        feed = Feed()
        feed.at(T0, xt(T0), xt(T0, x=2))
        feed.pong(T0 + 3_500.75)
        feed.stop(T0 + 3_500.75)
        outputs = through(feed.records, close=True)
        assert [bar["missing_ns"] for bar in bars_of(outputs)] == [MINUTE_NS - (feed.times("gap")[-1]) * NS_PER_MS]
        gaps = [json.loads(output.value) for output in outputs if output.topic == topics.GAPS.name]
        assert all(gap["from"] is None or gap["from"] <= gap["to"] for gap in gaps)

    def test_bars_open_when_a_silence_began_are_flagged_and_closed_by_the_gap_that_ends_it(self) -> None:
        """Rule 4: as two records, either the flag or the bar was lost in a rebuild."""
        tape = Tape()
        tape.trade(100)
        (bar,) = tape.gap(3 * HOUR, 30_000)
        assert (bar["revision"], bar["flags"], bar["missing_ns"]) == (0, ["partial", "gap"], 30_000 * NS_PER_MS)

    def test_a_gap_in_which_nothing_was_missed_is_taken_back(self) -> None:
        tape = Tape()
        tape.trade(1_000)
        tape.gap(40_000, 30_000, "silence", streams=["XT"])
        (before,) = tape.tick(62_000)
        assert (before["flags"], before["missing_ns"], before["revision"]) == (["partial", "gap"], 10 * NS_PER_S, 0)
        other = tape.gap(63_000, 20_000, "empty", to=-23_000, streams=["XT"])
        assert [bar["missing_ns"] for bar in other] == [10 * NS_PER_S]  # another stretch is no word about this one
        (after,) = tape.gap(64_000, 30_000, "empty", to=-24_000, streams=["XT"])
        assert (after["flags"], after["missing_ns"], after["quality"], after["revision"]) == ([], 0, 1, 2)
        assert [gap["reason"] for gap in gaps_of(tape.outputs)] == ["start", "silence", "empty", "empty"]
        assert [
            output for output in tape.outputs if output.topic == topics.ANOMALIES.name and b"empty" in output.value
        ] == []

    def test_another_gap_that_touches_the_same_bar_stays(self) -> None:
        tape = Tape()
        tape.trade(1_000)
        tape.gap(20_000, 10_000)
        tape.gap(40_000, 30_000, "silence", streams=["XT"])
        tape.gap(50_000, 30_000, "empty", to=-10_000, streams=["XT"])
        (bar,) = tape.tick(62_000)
        assert (bar["flags"], bar["missing_ns"], bar["revision"]) == (["partial", "gap"], 10 * NS_PER_S, 0)

    def test_a_first_late_trade_counts_the_gap_and_its_closing(self) -> None:
        tape = Tape()
        tape.tick(62_000)
        tape.gap(63_000, 30_000, "silence", to=-20_000, streams=["XT"])
        tape.gap(64_000, 30_000, "empty", to=-21_000, streams=["XT"])
        tape.early(45_000)
        (bar,) = tape.tick(65_000)
        assert (bar["flags"], bar["missing_ns"], bar["revision"]) == (["late"], 0, 3)

    def test_a_gap_is_published_with_the_identity_of_its_record(self) -> None:
        tape = Tape()
        tape.gap(63_000, 1_000)
        (gap,) = [json.loads(o.value) for o in tape.outputs[-3:] if o.topic == topics.GAPS.name]
        assert gap == {
            "from": (T0 + 1_000) * NS_PER_MS,
            "to": (T0 + 63_000) * NS_PER_MS,
            "streams": ["XT", "XQ"],
            "pairs": ["*"],
            "reason": "reconnect",
            "epoch": 1,
            "partition": 1,
            "n": 1,
        }


class TestClose:
    def test_open_minutes_come_out_partial_as_if_the_recording_ended_at_the_last_tick(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(45_000)
        tape.now = 45_900
        tape.trade(45_900)
        (bar,) = tape.close()
        assert (bar["trade_count"], bar["flags"], bar["missing_ns"]) == (2, ["partial"], 15_000 * NS_PER_MS)

    def test_changed_minutes_come_out_as_at_a_tick(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        tape.trade(100)
        (bar,) = tape.close()
        assert (bar["revision"], bar["flags"]) == (1, ["late"])

    def test_nothing_comes_twice(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(62_000)
        assert tape.close() == []

    def test_a_minute_in_its_grace_misses_nothing(self) -> None:
        tape = Tape()
        tape.trade(100)
        tape.tick(61_000)
        (bar,) = tape.close()
        assert (bar["flags"], bar["missing_ns"]) == (["partial"], 0)


# Forty digits, from 1e-20 to 1e20: all that is accepted.
widest = st.builds(
    lambda digits, exponent: Decimal(digits).scaleb(exponent - len(str(digits)), Context(prec=60)),
    st.integers(1, 10**40 - 1),
    st.integers(-18, 20),
)
steps = st.one_of(logs.trades, logs.trades, logs.trades, logs.waits, logs.waits, logs.quotes, logs.hushes, logs.words)


class TestForming:
    def test_a_symbol_that_traded_is_told_of_at_the_tick_and_again_only_when_it_changed(self) -> None:
        tape = Tape()
        tape.trade(100, price="5")
        assert forming_of(tape.outputs) == []
        tape.tick(1_000)
        tape.tick(2_000)
        tape.trade(2_500, price="7")
        tape.tick(3_000)
        bars = forming_of(tape.outputs)
        assert [(bar["close"], bar["trade_count"], bar["status"]) for bar in bars] == [
            (5, 1, "forming"),
            (7, 2, "forming"),
        ]

    def test_the_minute_that_closes_is_final_and_not_forming(self) -> None:
        tape = Tape()
        tape.trade(59_900)
        tape.tick(62_000)
        assert forming_of(tape.outputs) == []
        assert len(bars_of(tape.outputs)) == 1


class TestAgainstTheSlowWay:
    @given(
        logs.scripts(st.one_of(*[steps] * 8, logs.crashes), 150),
        logs.lengths,
        st.sampled_from(logs.SETTINGS),
        st.booleans(),
    )
    def test_every_version_of_every_bar_is_the_same(
        self, script: list[logs.Step], lengths: list[int], settings: PipelineSettings, close: bool
    ) -> None:
        records = [record for epoch in logs.cut(logs.epochs_of(script), lengths) for record in epoch]
        pipeline = Pipeline(logs.PARTITION, settings)
        outputs = [output for record in records for output in pipeline.process(record)]
        reference = Reference(settings).take(records)
        if close:
            outputs += pipeline.close()
            reference.close()
        made = bars_of(outputs)
        assert highest(made) == highest(reference.bars)
        assert made == reference.bars
        assert [decoded(o.value) for o in outputs if o.topic == topics.FORMING.name] == reference.forming

    @given(st.lists(st.tuples(widest, widest), min_size=1, max_size=20))
    @example([(Decimal("1.234567890123456789012345678901234567891e-20"),) * 2, (Decimal("9" * 40 + "e-20"),) * 2])
    def test_sums_of_the_widest_numbers_are_exact(self, trades: list[tuple[Decimal, Decimal]]) -> None:
        tape = Tape()
        for price, size in trades:
            outputs = tape.event(xt(T0, i=tape.n, p=str(price), s=str(size)))
            assert outputs[0].topic == topics.TRADES.name
        (bar,) = tape.tick(62_000)
        volume = sum((Fraction(size) for _, size in trades), Fraction(0))
        assert bar["volume"] == volume
        assert bar["vwap"] == twelve_digits(sum((Fraction(p) * Fraction(s) for p, s in trades), Fraction(0)) / volume)


def test_memory_covers_the_horizon_the_minute_the_grace_and_the_detectors() -> None:
    settings = PipelineSettings(lateness_ns=2 * MINUTE_NS, grace_ns=NS_PER_S)
    pipeline = Pipeline(0, settings)
    filter_, repeats, bars = 5 * MINUTE_NS, 3 * MINUTE_NS, 3 * MINUTE_NS + NS_PER_S
    of_bars, of_events = 12 * MINUTE_NS, 28 * MINUTE_NS
    assert pipeline.memory_ns == filter_ + repeats + max(bars + of_bars, of_events) + 11 * NS_PER_S
