"""Rollups: what is in them, when they come, and that neither repeats, cuts nor rebuilds change them."""

import json
import random
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from processors.pipeline import Output
from processors.recompute import Minutes
from processors.rollups import DAY_NS, HOUR_NS, BarRecord, Rollups
from schemas import topics
from schemas.events import (
    MINUTE_NS,
    NS_PER_MS,
    Bar,
    MinuteClosed,
    MinuteEmpty,
    Missed,
    decode_bar,
    decode_dead_letter,
    encode,
)
from schemas.raw import bytes_of

from .reference import decoded
from .rollup_reference import RollupReference

T0 = 1_732_147_200_000_000_000  # 2024-11-21, a whole day
MINUTE, HOUR, DAY = 1, 60, 1440  # minutes
GRACE_NS = 2_000_000_000
PAIRS = ("BTC-USD", "SOL-USD")


def bar(minute: int, price: str = "100", volume: str = "2", symbol: str = "BTC-USD", **fields: Any) -> Bar:
    """The bar of a minute after T0."""
    start = T0 + minute * MINUTE_NS
    one, size = Decimal(price), Decimal(volume)
    numbers: dict[str, Any] = dict.fromkeys(("open", "high", "low", "close", "vwap"), one)
    numbers |= {"volume": size, "notional": one * size, "buy_volume": size, "sell_volume": Decimal(0)}
    numbers |= {"trade_count": 1, "repair": 0, "revision": 0, "flags": [], "missing_ns": 0, "quality": Decimal(1)}
    named: dict[str, Any] = {"interval": "1m", "status": "final", "source": "trades", "fingerprint": "f0"}
    return Bar(symbol=symbol, start=start, end=start + MINUTE_NS, **(numbers | named | fields))


def empty(minute: int, repair: int, symbol: str = "BTC-USD") -> MinuteEmpty:
    start = T0 + minute * MINUTE_NS
    return MinuteEmpty(symbol, start, start + MINUTE_NS, repair, "f0")


def missed(since: float | None, to: float, pairs: Sequence[str] = ("*",), reason: str = "reconnect") -> Missed:
    """A gap between minutes after T0."""
    begin = None if since is None else T0 + round(since * MINUTE_NS)
    return Missed(begin, T0 + round(to * MINUTE_NS), list(pairs), reason)


def record(event: Bar | MinuteEmpty | MinuteClosed, at: float) -> BarRecord:
    """As it stands in the log `at` minutes after T0, and the grace."""
    return BarRecord((T0 + round(at * MINUTE_NS) + GRACE_NS) // NS_PER_MS, encode(event), 0)


class Tape:
    """A partition's log written by hand; times are minutes after T0."""

    def __init__(self, cut: bool = False) -> None:
        self.stage = Rollups(1, cut)
        self.at = 0.0
        self.outputs: list[Output] = []

    def put(self, *events: Bar | MinuteEmpty | MinuteClosed) -> list[dict[str, Any]]:
        self.at = max(self.at, *((event.end - T0) / MINUTE_NS for event in events))
        made = [output for event in events for output in self.stage.process(record(event, self.at))]
        assert all(output.topic != topics.DEAD_LETTERS.name for output in made)
        self.outputs += made
        return [decoded(output.value) for output in made]

    def close(self, minute: int, *gaps: Missed, fingerprint: str = "f0") -> list[dict[str, Any]]:
        """What the marker of a minute's end brings."""
        self.at = minute
        return self.put(MinuteClosed(1, T0 + minute * MINUTE_NS, list(gaps), fingerprint))


def names(bars: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(one["interval"], (one["start"] - T0) // MINUTE_NS) for one in bars]


class TestWhatIsInABar:
    def test_five_minutes_are_one_bar(self) -> None:
        tape = Tape()
        tape.put(
            bar(0, "10", "1", high=Decimal("12.5"), low=Decimal(9)),
            bar(1, "11", "0.1", trade_count=3),
            bar(4, "10.5", "0.2", low=Decimal("8.75"), buy_volume=Decimal("0.05"), sell_volume=Decimal("0.15")),
        )
        (made,) = tape.close(5)
        assert (made["open"], made["high"], made["low"], made["close"]) == (
            10,
            Fraction("12.5"),
            Fraction("8.75"),
            Fraction("10.5"),
        )
        assert (made["volume"], made["notional"], made["trade_count"]) == (Fraction("1.3"), Fraction("13.2"), 5)
        assert (made["buy_volume"], made["sell_volume"]) == (Fraction("1.15"), Fraction("0.15"))
        assert made["vwap"] == Fraction("10.1538461538")
        assert (made["start"], made["end"]) == (T0, T0 + 5 * MINUTE_NS)
        assert (made["repair"], made["revision"], made["flags"], made["quality"]) == (0, 3, [], 1)
        (output,) = tape.outputs
        assert (output.topic, output.key) == (topics.ROLLUPS["5m"].name, b"BTC-USD")
        assert output.timestamp_ms == (T0 + 5 * MINUTE_NS + GRACE_NS) // NS_PER_MS

    def test_sums_are_exact_and_written_without_trailing_zeros(self) -> None:
        tape = Tape()
        for minute in range(5):
            tape.put(bar(minute, "0.1", "0.1" if minute else "0.600000000000000000000000000001"))
        tape.close(5)
        assert b'"volume":1.000000000000000000000000000001,' in tape.outputs[0].value
        tape.put(bar(5, "100", "0.25"), bar(6, "100", "99.75"))
        tape.close(10)
        assert b'"volume":100,' in tape.outputs[1].value

    def test_all_intervals_close_at_midnight_and_each_is_made_of_all_its_minutes(self) -> None:
        tape = Tape()
        for minute in range(DAY):
            tape.put(bar(minute, str(1 + minute), "1"))
            made = tape.close(minute + 1)
        assert names(made) == [("5m", 1435), ("15m", 1425), ("30m", 1410), ("1h", 1380), ("4h", 1200), ("1d", 0)]
        day = made[-1]
        assert (day["open"], day["high"], day["close"], day["volume"]) == (1, 1440, 1440, 1440)
        assert (day["notional"], day["revision"], day["trade_count"]) == (1440 * 1441 // 2, 1440, 1440)

    def test_it_takes_over_the_flags_of_its_minutes_and_says_where_aggregates_stand_in(self) -> None:
        tape = Tape()
        tape.put(bar(0, flags=["late"], revision=2), bar(1, flags=["partial", "gap"], missing_ns=30 * 10**9))
        tape.put(bar(2, repair=7, flags=["repaired"], source="aggregates"))
        (made,) = tape.close(5)
        assert made["flags"] == ["partial", "gap", "late", "repaired"]
        assert (made["missing_ns"], made["quality"], made["source"]) == (30 * 10**9, Fraction("0.9"), "aggregates")
        assert (made["repair"], made["revision"]) == (7, 3 + 1 + 1)

    def test_the_fingerprint_is_the_markers(self) -> None:
        tape = Tape()
        tape.put(bar(0))
        assert tape.close(5, fingerprint="f1")[0]["fingerprint"] == "f1"

    def test_a_range_without_a_bar_has_none(self) -> None:
        tape = Tape()
        tape.put(empty(0, 3))
        assert tape.close(60) == []


class TestWhatWasMissed:
    def test_an_empty_minute_inside_a_gap_is_told_from_a_quiet_one(self) -> None:
        tape = Tape()
        tape.put(bar(0), bar(5))
        first, second = tape.close(5)[0], tape.close(10, missed(6.5, 8.25))[0]
        assert (first["flags"], first["missing_ns"], first["quality"]) == ([], 0, 1)
        assert second["flags"] == ["partial", "gap"]
        assert second["missing_ns"] == 1.75 * MINUTE_NS
        assert second["quality"] == Fraction("0.65")

    def test_a_minute_that_has_a_bar_knows_itself_what_it_missed(self) -> None:
        tape = Tape()
        tape.put(bar(0, flags=["partial", "gap"], missing_ns=1))
        assert tape.close(5, missed(0, 1.5))[0]["missing_ns"] == 1 + MINUTE_NS // 2

    def test_gaps_that_overlap_count_once_and_only_for_their_pairs(self) -> None:
        tape = Tape()
        tape.put(bar(0), bar(0, symbol="SOL-USD"))
        gaps = missed(1, 3), missed(2, 4, ["BTC-USD"]), missed(2.5, 2.75)
        btc, sol = tape.close(5, *gaps)
        assert (btc["missing_ns"], sol["missing_ns"]) == (3 * MINUTE_NS, 2 * MINUTE_NS)
        assert (btc["revision"], sol["revision"]) == (1 + 3, 1 + 2)

    def test_a_minute_that_rest_says_was_empty_was_not_missed(self) -> None:
        tape = Tape()
        tape.put(bar(0))
        before = tape.close(5, missed(1, 3))[0]
        tape.put(empty(1, 4))
        after = tape.close(6)[0]
        assert (before["missing_ns"], after["missing_ns"]) == (2 * MINUTE_NS, MINUTE_NS)
        assert after["flags"] == ["partial", "gap", "repaired"]
        assert ((before["repair"], before["revision"]), (after["repair"], after["revision"])) == ((0, 2), (4, 3))

    def test_a_gap_that_was_empty_is_taken_back_and_raises_the_order(self) -> None:
        tape = Tape()
        tape.put(bar(0))
        before = tape.close(5, missed(1, 3), missed(2, 4))[0]
        after = tape.close(6, missed(1, 3, reason="empty"))[0]
        assert (before["missing_ns"], after["missing_ns"]) == (3 * MINUTE_NS, 2 * MINUTE_NS)
        last = tape.close(7, missed(2, 4, reason="empty"))[0]
        assert (last["missing_ns"], last["flags"], last["quality"]) == (0, [], 1)
        assert (before["revision"], after["revision"], last["revision"]) == (3, 4, 5)

    def test_a_gap_that_comes_afterwards_raises_the_order_also_where_it_touches_only_empty_minutes(self) -> None:
        tape = Tape()
        tape.put(bar(0))
        before = tape.close(5)[0]
        after = tape.close(6, missed(3, 4.5))[0]
        assert before["quality"] > after["quality"]
        assert before["revision"] < after["revision"]

    def test_a_late_first_trade_of_a_minute_in_many_gaps_raises_the_order(self) -> None:
        """Its revision knows only the gaps that were noted after it closed."""
        tape = Tape()
        tape.put(bar(0))
        before = tape.close(5, missed(1, 2), missed(1, 1.5), missed(1.2, 1.6))[0]
        tape.put(bar(1, revision=1, flags=["partial", "gap", "late"], missing_ns=MINUTE_NS))
        assert tape.close(6)[0]["revision"] > before["revision"]

    def test_a_bar_that_the_recording_began_in_is_partial_and_has_no_gap(self) -> None:
        tape = Tape()
        tape.put(bar(32))
        made = tape.close(60, missed(None, 32, reason="start"))
        assert names(made) == [("5m", 30), ("15m", 30), ("30m", 30), ("1h", 0)]
        assert all(one["flags"] == ["partial"] for one in made)
        assert [one["missing_ns"] // MINUTE_NS for one in made] == [2, 2, 2, 32]


class TestWhenItComes:
    def test_at_the_first_marker_at_or_past_its_end(self) -> None:
        tape = Tape()
        tape.put(bar(0))
        assert [names(tape.close(minute)) for minute in (4, 5, 6)] == [[], [("5m", 0)], []]

    def test_at_no_marker_that_is_not_higher_than_any_before(self) -> None:
        tape = Tape()
        tape.put(bar(0))
        tape.close(5)
        tape.put(bar(1))
        assert tape.close(5) == []
        assert tape.close(4) == []
        assert names(tape.close(6)) == [("5m", 0)]

    def test_again_when_a_closed_minute_has_a_newer_bar(self) -> None:
        tape = Tape()
        tape.put(bar(0), bar(7))
        tape.close(15)
        tape.put(bar(0, "5", revision=1, flags=["late"]))
        made = tape.close(16)
        assert names(made) == [("5m", 0), ("15m", 0)]
        assert [one["open"] for one in made] == [5, 5]
        assert [one["revision"] for one in made] == [2, 3]

    def test_not_again_for_a_bar_that_came_before_or_is_of_a_lower_order(self) -> None:
        tape = Tape()
        tape.put(bar(0, "5", repair=2), bar(1))
        tape.close(5)
        tape.put(bar(0, "5", repair=2), bar(0, "6", revision=9), bar(0, "7", repair=1, revision=3), empty(0, 1))
        assert tape.close(6) == []

    def test_after_a_silence_every_range_at_once(self) -> None:
        tape = Tape()
        tape.put(bar(0), bar(63))
        made = tape.close(300, missed(65, 300))
        assert names(made) == [
            *[("5m", 0), ("5m", 60)],
            *[("15m", 0), ("15m", 60)],
            *[("30m", 0), ("30m", 60)],
            *[("1h", 0), ("1h", 60)],
            ("4h", 0),
        ]

    def test_a_range_that_began_more_than_three_days_before_the_marker_is_left_to_another_tool(self) -> None:
        """A repair 1.5 days old once replaced a true 1d bar by one of a single minute: what is not known whole is
        not emitted."""
        tape = Tape()
        for day in range(4):
            tape.put(bar(day * DAY + 100), bar(day * DAY + 200))
            tape.close((day + 1) * DAY)
        tape.put(bar(200, "7", repair=1), bar(DAY + 200, "7", repair=1))
        made = tape.close(4 * DAY + 1)
        assert {start for _, start in names(made)} == {DAY + 200, DAY + 195, DAY + 180}
        made = tape.close(4 * DAY + 2)
        assert made == []

    def test_a_log_cut_off_by_retention_gives_no_range_that_began_before_it(self) -> None:
        tape = Tape(cut=True)
        tape.at = 100
        tape.put(bar(99))
        tape.close(100)
        tape.put(bar(170))
        made = tape.close(DAY)
        assert names(made) == [("5m", 170), ("15m", 165)]
        tape.put(bar(DAY))
        assert ("1d", DAY) in names(tape.close(2 * DAY))

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"\xff",
            b"[]",
            b'{"kind":"bar"}',
            b'{"kind":"minute_closed","partition":1,"end":1e99,"missed":[],"fingerprint":""}',
            encode(bar(0, volume="0")),
            encode(msgspec.structs.replace(bar(0), interval="5m")),
            encode(msgspec.structs.replace(bar(0), status="forming")),
            encode(msgspec.structs.replace(bar(0), start=T0 + 1)),
            encode(msgspec.structs.replace(bar(0), revision=2**62)),
            encode(msgspec.structs.replace(bar(0), missing_ns=-1)),
            encode(bar(0)).replace(b'"high":100', b'"high":"NaN"'),
            encode(bar(0)).replace(b'"high":100', b'"high":"Infinity"'),
            encode(bar(0)).replace(b'"high":100', b'"high":1e-900'),
            encode(bar(0)).replace(b'"high":100', b'"high":1e900'),
            encode(bar(61)),
            encode(empty(0, 0)),
            encode(MinuteClosed(1, T0 + 2 * DAY_NS, [], "")),
            encode(MinuteClosed(1, T0, [missed(0, DAY)], "")),
            encode(MinuteClosed(1, -1, [], "")),
        ],
    )
    def test_what_is_no_record_of_ours_is_a_dead_letter_and_changes_nothing(self, value: bytes) -> None:
        stage = Rollups(1)
        before = stage.state()
        (output,) = stage.process(BarRecord(T0 // NS_PER_MS, value, 17))
        assert output.topic == topics.DEAD_LETTERS.name
        letter = decode_dead_letter(output.value)
        assert (bytes_of(letter.encoding, letter.payload), letter.partition, letter.n) == (value, 1, 17)
        assert stage.state() == before


# -- every log ----------------------------------------------------------------------------------------


class Wait(NamedTuple):
    """Minutes go by and a marker comes, with what was missed; or not yet, for bars come before it."""

    minutes: int
    marker: bool = True


class Minute(NamedTuple):
    """A bar, or its emptiness, of the minute that ended `back` minutes ago; a repair may come with a time that
    is `ahead` minutes past the live records'."""

    back: int
    symbol: str
    repair: int
    revision: int
    ahead: int = 0


class Gap(NamedTuple):
    """From so many minutes ago for so many minutes; None: from before the recording began."""

    back: float | None
    minutes: float
    pairs: tuple[str, ...] = ("*",)
    reason: str = "reconnect"


class NothingMissed(NamedTuple):
    """The word that the gap `back` before the last one was empty."""

    back: int


class Again(NamedTuple):
    """A stretch of the log once more: `count` records, `back` records ago."""

    back: int
    count: int


class Junk(NamedTuple):
    data: bytes


Step = Wait | Minute | Gap | NothingMissed | Again | Junk

waits = st.builds(
    Wait,
    st.sampled_from([0, 1, 1, 1, 2, 5, 13, 60, 5 * HOUR, 26 * HOUR, 5 * DAY]),
    st.sampled_from([True, True, False]),
)
BACK = (0, 0, 0, 0, 1, 2, 4, 6, 14, 59, 61, 4 * HOUR, DAY, 2 * DAY, 3 * DAY, 3 * DAY + 61, 4 * DAY, 6 * DAY)
live = st.builds(Minute, st.sampled_from(BACK), st.sampled_from(PAIRS), st.just(0), st.integers(0, 3), st.just(0))
repairs = st.builds(
    Minute,
    st.sampled_from(BACK),
    st.sampled_from(PAIRS),
    st.integers(1, 4),
    st.just(0),
    st.sampled_from([0, 0, -59, 30, HOUR]),
)
gaps = st.builds(
    Gap,
    st.sampled_from([None, 0, 0.5, 3, 3.25, HOUR, DAY, 6 * DAY]),
    st.sampled_from([0, 0.25, 1, 2.5, HOUR, DAY]),
    st.sampled_from([("*",), PAIRS[:1], ("ETH-USD",)]),
    st.sampled_from(["reconnect", "start", "away"]),
)
words = st.builds(NothingMissed, st.sampled_from([0, 0, 1, 2]))
again = st.builds(Again, st.integers(1, 12), st.integers(1, 6))
junk = st.builds(Junk, st.sampled_from([b"", b"{}", encode(bar(99 * DAY))]))
steps = st.one_of(waits, waits, waits, live, live, live, live, repairs, gaps, words, again, junk)
scripts = st.one_of(st.lists(steps, max_size=12), st.lists(steps, min_size=25, max_size=50))


def minute_of(step: Minute, minute: int) -> Bar | MinuteEmpty:
    """Records of one order are identical, whatever else there is."""
    dice = random.Random(f"{step.symbol} {minute} {step.repair} {step.revision}")
    if step.repair and dice.random() < 0.3:
        return empty(minute, step.repair, step.symbol)
    prices = sorted(Decimal(dice.choice(["100", "61837.63", "0.000000012", "7.50"])) for _ in range(4))
    volume = Decimal(dice.choice(["1", "0.1", "0.2", "1e-18", "123456.789"]))
    flags = dice.choice([[], [], ["partial"], ["partial", "gap"], ["late"]])
    return bar(
        minute,
        str(prices[1]),
        str(volume),
        step.symbol,
        high=prices[3],
        low=prices[0],
        close=prices[2],
        trade_count=dice.randint(1, 9),
        sell_volume=Decimal(dice.choice(["0", "0.5"])),
        repair=step.repair,
        revision=step.revision,
        flags=["repaired"] if step.repair else flags,
        missing_ns=0 if step.repair or "partial" not in flags else dice.randint(1, MINUTE_NS),
        source=dice.choice(["trades", "aggregates"]) if step.repair else "trades",
    )


def log_of(script: Iterable[Step]) -> list[BarRecord]:
    """The log; it begins at a quarter past six. Nothing comes again after more than an hour."""
    now, gaps, log = 6 * HOUR + 15, [missed(None, 6 * HOUR + 15, reason="start")], []
    noted = [*gaps]
    for step in script:
        match step:
            case Wait(minutes, marker):
                now += minutes
                if not marker:
                    continue
                log.append(record(MinuteClosed(1, T0 + now * MINUTE_NS, gaps, "f0"), now))
                gaps = []
            case Minute(back, _, _, _, ahead):
                log.append(record(minute_of(step, now - 1 - back), now + ahead))
            case Gap(back, minutes, pairs, reason):
                since = None if back is None else now - back
                gaps.append(missed(since, now if since is None else min(now, since + minutes), pairs, reason))
                noted.append(gaps[-1])
            case NothingMissed(back):
                gaps.append(msgspec.structs.replace(noted[max(-len(noted), -1 - back)], reason="empty"))
            case Again(back, count):
                oldest = (T0 + (now - HOUR) * MINUTE_NS) // NS_PER_MS
                stretch = log[-back:][:count]
                log += [one for one in stretch if one.timestamp_ms >= oldest]
            case Junk(data):
                log.append(BarRecord((T0 + now * MINUTE_NS) // NS_PER_MS, data, 0))
    return log


def rebuilt(log: Sequence[BarRecord], offset: int, begin: int = 0) -> Rollups:
    """The stage as a rebuild before `offset` has it, where retention has deleted what stood before `begin`."""
    newest_ms = log[offset - 1].timestamp_ms if offset > begin else 0
    while True:
        since_ms = newest_ms - Rollups.memory_ns // NS_PER_MS
        first = next((at for at in range(begin, offset) if log[at].timestamp_ms >= since_ms), offset)
        stage = Rollups(1, cut=0 < begin == first)
        for one in log[first:offset]:
            stage.process(one)
        taken_ms = stage.taken_ms or 0
        if first == begin or taken_ms >= newest_ms:
            return stage
        newest_ms = taken_ms


def assert_rebuilds(log: Sequence[BarRecord], begin: int = 0) -> None:
    """A rebuild at every offset has the whole state of one pass."""
    one_pass = Rollups(1, cut=begin > 0)
    for offset in range(begin, len(log)):
        assert rebuilt(log, offset, begin).state() == one_pass.state(), f"rebuilt at offset {offset}"
        one_pass.process(log[offset])


class TestEveryLog:
    @given(scripts, st.booleans())
    @example([Wait(0), Minute(0, "BTC-USD", 0, 0), Wait(5), Gap(3, 1), Wait(1)], False)
    def test_it_agrees_with_the_reference(self, script: list[Step], cut: bool) -> None:
        stage, reference = Rollups(1, cut), RollupReference(cut)
        for one in log_of(script):
            outputs = stage.process(one)
            reference.seen(one.timestamp_ms)
            if [output.topic for output in outputs] != [topics.DEAD_LETTERS.name]:
                assert [decoded(output.value) for output in outputs] == reference.take(one.timestamp_ms, one.value)
                assert all(output.timestamp_ms == one.timestamp_ms for output in outputs)

    @given(scripts)
    @example([Minute(0, "BTC-USD", 0, 0), Wait(26 * HOUR), Minute(DAY + 30, "BTC-USD", 1, 0), Wait(5 * DAY), Wait(1)])
    @example([Minute(0, "BTC-USD", 0, 0), Wait(1), Wait(5 * DAY, False), Minute(5 * DAY, "BTC-USD", 0, 0), Wait(0)])
    def test_a_rebuild_at_any_offset_has_the_whole_state_of_one_pass(self, script: list[Step]) -> None:
        assert_rebuilds(log_of(script))

    @given(scripts, st.integers(1, 60))
    def test_also_where_retention_has_cut_off_the_beginning(self, script: list[Step], begin: int) -> None:
        log = log_of(script)
        assert_rebuilds(log, min(begin, len(log)))

    @given(scripts)
    def test_of_two_bars_of_a_range_the_one_of_the_higher_order_came_later(self, script: list[Step]) -> None:
        stage = Rollups(1)
        orders: dict[tuple[str, int, str], tuple[int, int]] = {}
        for one in log_of(script):
            for output in stage.process(one):
                if output.topic == topics.DEAD_LETTERS.name:
                    continue
                made = json.loads(output.value)
                key, order = (made["interval"], made["start"], made["symbol"]), (made["repair"], made["revision"])
                assert order > orders.get(key, (-1, 0))
                orders[key] = order

    @given(scripts, st.integers(1, 12), st.integers(0, 80))
    def test_a_stretch_that_comes_again_changes_nothing(self, script: list[Step], length: int, at: int) -> None:
        log = log_of(script)
        stretch = log[at : at + length]
        if not stretch or stretch[-1].timestamp_ms - stretch[0].timestamp_ms > HOUR_NS // NS_PER_MS:
            return

        def made(records: list[BarRecord]) -> list[Output]:
            stage = Rollups(1)
            return [o for one in records for o in stage.process(one) if o.topic != topics.DEAD_LETTERS.name]

        assert made(log) == made(log[: at + length] + stretch + log[at + length :])


class TestRebuiltHistory:
    """A repair stands in its own minute's place, however late it came."""

    def test_a_repair_too_old_for_the_stream_is_in_the_rebuilt_bars_of_its_day(self) -> None:
        late = bar(5, price="200", repair=7, flags=["repaired"])
        days = [bar(day * DAY + 5) for day in range(6)]
        markers = [MinuteClosed(0, T0 + day * DAY_NS, [], "f0") for day in range(1, 7)]
        log = [
            record(event, day * DAY) for day, pair in enumerate(zip(days, markers, strict=True), 1) for event in pair
        ]
        live = Rollups(0)
        streamed = [output for entry in [*log, record(late, 6 * DAY)] for output in live.process(entry)]
        repaired = [_output(late, 6 * DAY)]
        rebuilt = Minutes(0, repaired).rolled_up(
            [_output(decode_bar(entry.value), day // 2 * DAY) for day, entry in enumerate(log, 2)]
        )

        def first_day(outputs: list[Output]) -> list[tuple[int, Decimal]]:
            bars = [decode_bar(output.value) for output in outputs if output.topic == "bars.1d.v1"]
            return [(bar.repair, bar.close) for bar in bars if isinstance(bar, Bar) and bar.start == T0]

        assert first_day(streamed) == [(0, Decimal(100))]
        assert first_day(rebuilt) == [(7, Decimal(200))]

    def test_days_of_repairs_are_rolled_up_though_the_next_marker_is_weeks_later(self) -> None:
        repaired = [bar(day * DAY + minute, repair=1, flags=["repaired"]) for day in (0, 1, 3) for minute in (5, 700)]
        after = [bar(3), MinuteClosed(0, T0 + 20 * DAY_NS, [], "f0")]  # what was open, and the marker that closes it
        minutes = Minutes(0, [_output(event, 20 * DAY) for event in repaired])
        made = minutes.rolled_up([_output(event, 20 * DAY) for event in after])
        days = [decode_bar(output.value) for output in made if output.topic == "bars.1d.v1"]
        assert [(day.start, day.trade_count, day.repair) for day in days if isinstance(day, Bar)] == [
            (T0 + day * DAY_NS, 2, 2) for day in (0, 1, 3)
        ]


def _output(event: Bar | MinuteEmpty | MinuteClosed, at: float) -> Output:
    made = record(event, at)
    return Output(topics.BARS_1M.name, None, made.value, made.timestamp_ms, isinstance(event, MinuteClosed))
