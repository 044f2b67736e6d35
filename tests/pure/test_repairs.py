"""Repairs: groups of REST's results become trades and one bar of their minute, whatever comes in between."""

import json
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.pipeline import Output
from processors.repairs import Repairs
from schemas import topics
from schemas.events import MINUTE_NS, NS_PER_MS, decode_dead_letter
from schemas.raw import bytes_of
from schemas.rest import MAX_PART_BYTES, MAX_PART_RESULTS, Headers, RestRecord, records_of, repair_of

from .reference import decoded, twelve_digits

T0 = 1_732_200_000_000_000_000  # a whole minute
RECV = T0 + 100 * MINUTE_NS
Of = Literal["trades", "aggregates"]


def result(ns: int, price: str = "100", size: str = "1", **fields: Any) -> bytes:
    """A trade as REST has it, `ns` into the minute."""
    values = {"conditions": [2], "exchange": 1, "id": str(ns), "participant_timestamp": T0 + ns, **fields}
    return json.dumps(values)[:-1].encode() + f',"price":{price},"size":{size}}}'.encode()


def aggregate(minute: int = 0, **fields: Any) -> bytes:
    values = {"v": 2.5, "vw": 10.1, "o": 10, "h": 11.25, "l": 9, "c": 10.5, "t": T0 // NS_PER_MS + minute * 60_000}
    return json.dumps({**values, "n": 7, **fields}).encode()


def group(*results: bytes, number: int = 5, pair: str = "X:BTCUSD", of: Of = "trades") -> list[tuple[Headers, bytes]]:
    return records_of(number, pair, T0, of, results, RECV)


def through(*parts: tuple[Headers, bytes], stage: Repairs | None = None, at_s: float = 0) -> list[Output]:
    stage = stage or Repairs(1, "f0")
    timestamp_ms = round(T0 / NS_PER_MS + at_s * 1_000)
    return [out for headers, value in parts for out in stage.process(RestRecord(timestamp_ms, headers, value, 17))]


def values(outputs: Sequence[Output], topic: topics.Topic) -> list[dict[str, Any]]:
    return [decoded(output.value) for output in outputs if output.topic == topic.name]


def bar_of(*results: bytes, of: Of = "trades") -> dict[str, Any]:
    (bar,) = values(through(*group(*results, of=of)), topics.BARS_1M)
    return bar


def reasons(outputs: Sequence[Output]) -> list[str]:
    return [letter["reason"] for letter in values(outputs, topics.DEAD_LETTERS)]


def by_part(headers: Headers, **changes: Any) -> Headers:
    """The headers with another repair in them."""
    repair = {**json.loads(dict(headers)["repair"]), **changes}
    return [*((name, data) for name, data in headers if name != "repair"), ("repair", json.dumps(repair).encode())]


class TestTrades:
    def test_a_trade_has_the_vendors_time_and_is_known_by_repair_and_place(self) -> None:
        outputs = through(*group(result(1), result(1_999_999, "61837.630", "4.522e-05", id=77, exchange=23)))
        _, trade = values(outputs, topics.TRADES)
        assert trade == {
            "symbol": "BTC-USD",
            "ts_event": T0 + NS_PER_MS,
            "ts_recv": RECV,
            "ts_vendor": T0 + 1_999_999,
            "price": Fraction("61837.63"),
            "size": Fraction("0.00004522"),
            "side": "buy",
            "exchange": 23,
            "trade_id": "77",
            "conditions": [2],
            "flags": ["repaired"],
            "epoch": -5,
            "partition": 1,
            "n": 1,
        }
        assert all(b"E-" not in output.value for output in outputs)
        assert {output.key for output in outputs} == {b"BTC-USD"}

    def test_the_bar_is_made_of_all_of_them(self) -> None:
        bar = bar_of(
            result(10, "10", "0.1"),
            result(20, "12.5", "0.2", conditions=[1]),
            result(30, "9.5", "0.3", conditions=[]),
            result(40, "11", "0.4"),
        )
        notional = Fraction("10.75")
        assert bar == {
            "kind": "bar",
            "symbol": "BTC-USD",
            "interval": "1m",
            "start": T0,
            "end": T0 + MINUTE_NS,
            "open": 10,
            "high": Fraction("12.5"),
            "low": Fraction("9.5"),
            "close": 11,
            "volume": 1,
            "vwap": twelve_digits(notional),
            "notional": Fraction("10.75"),
            "trade_count": 4,
            "buy_volume": Fraction("0.5"),
            "sell_volume": Fraction("0.2"),
            "status": "final",
            "repair": 5,
            "revision": 0,
            "flags": ["repaired"],
            "missing_ns": 0,
            "quality": 1,
            "source": "trades",
            "fingerprint": "f0",
        }

    def test_open_and_close_go_by_the_vendors_nanoseconds_and_then_by_place(self) -> None:
        bar = bar_of(
            result(500, "5", id="a"), result(100, "1", id="b"), result(100, "2", id="c"), result(500, "8", id="d")
        )
        assert (bar["open"], bar["close"]) == (1, 8)

    def test_a_trade_that_stands_twice_in_the_group_counts_once(self) -> None:
        """Pages of REST overlap; the same id of another exchange is another trade."""
        outputs = through(*group(result(1, id="a"), result(1, "7", id="a"), result(2, id="a", exchange=2), result(3)))
        assert [trade["n"] for trade in values(outputs, topics.TRADES)] == [0, 2, 3]
        assert values(outputs, topics.BARS_1M)[0]["trade_count"] == 3

    @pytest.mark.parametrize("pair", ["X:BTCUSD", "BTC-USD", "X:BTC-USD", "BTCUSD"])
    def test_a_pair_is_known_by_any_of_its_spellings(self, pair: str) -> None:
        outputs = through(*group(result(1), pair=pair))
        assert [output.key for output in outputs] == [b"BTC-USD"] * 2

    def test_a_minute_without_trades_is_empty(self) -> None:
        (output,) = through(*group())
        assert (output.topic, output.key) == (topics.BARS_1M.name, b"BTC-USD")
        assert json.loads(output.value) == {
            "kind": "minute_empty",
            "symbol": "BTC-USD",
            "start": T0,
            "end": T0 + MINUTE_NS,
            "repair": 5,
            "fingerprint": "f0",
        }


class TestAggregates:
    def test_one_aggregate_is_a_bar_that_says_so(self) -> None:
        bar = bar_of(aggregate(), of="aggregates")
        ohlc = (bar["open"], bar["high"], bar["low"], bar["close"])
        assert ohlc == (10, Fraction("11.25"), 9, Fraction("10.5"))
        assert (bar["volume"], bar["vwap"], bar["notional"]) == (Fraction("2.5"), Fraction("10.1"), Fraction("25.25"))
        assert (bar["buy_volume"], bar["sell_volume"], bar["trade_count"]) == (0, 0, 7)
        assert (bar["source"], bar["repair"], bar["flags"], bar["quality"]) == ("aggregates", 5, ["repaired"], 1)

    def test_none_is_an_empty_minute(self) -> None:
        (output,) = through(*group(of="aggregates"))
        assert json.loads(output.value)["kind"] == "minute_empty"

    @pytest.mark.parametrize(
        "bad",
        [
            aggregate(minute=1),
            aggregate(t=T0),
            aggregate(v=0),
            aggregate(vw=0),
            aggregate(o=-1),
            aggregate(h=0),
            aggregate(n=0),
            aggregate(n=-1),
            b'{"v":1,"o":1,"h":1,"l":1,"c":1,"t":1,"n":1}',
            b"5",
        ],
    )
    def test_what_is_no_aggregate_of_the_minute_is_a_dead_letter(self, bad: bytes) -> None:
        (output,) = through(*group(bad, of="aggregates"))
        letter = decode_dead_letter(output.value)
        assert (letter.epoch, letter.n, bytes_of(letter.encoding, letter.payload)) == (-5, 0, bad)
        outputs = through(*group(bad, aggregate(), of="aggregates"))
        assert len(reasons(outputs)) == len(values(outputs, topics.BARS_1M)) == 1

    def test_a_second_one_is_a_dead_letter(self) -> None:
        outputs = through(*group(aggregate(), aggregate(v=3), of="aggregates"))
        assert reasons(outputs) == ["a second aggregate of one minute"]
        assert values(outputs, topics.BARS_1M)[0]["volume"] == Fraction("2.5")


class TestGroups:
    def test_nothing_comes_before_the_last_part(self) -> None:
        parts = group(*(result(n) for n in range(1_200)))
        assert len(parts) == 3
        stage = Repairs(1, "f0")
        for part in (parts[2], parts[0]):
            assert through(part, stage=stage) == []
        outputs = through(parts[1], stage=stage)
        assert outputs == through(*parts)
        assert [trade["n"] for trade in values(outputs, topics.TRADES)] == list(range(1_200))

    def test_parts_of_two_attempts_make_no_group(self) -> None:
        """They once made one «complete» group."""
        first, second = (
            [*group(*(result(n, price) for n in range(700)), number=number)] for number, price in ((5, "1"), (6, "2"))
        )
        stage = Repairs(1, "f0")
        assert through(first[0], second[1], stage=stage) == []
        bar = values(through(second[0], stage=stage), topics.BARS_1M)[0]
        assert (bar["repair"], bar["low"]) == (6, 2)

    def test_nor_do_parts_that_do_not_agree_on_how_many_there_are(self) -> None:
        parts = group(*(result(n) for n in range(700)))
        assert through((by_part(parts[0][0], parts=3), parts[0][1]), parts[1]) == []

    def test_a_group_that_is_not_complete_within_ten_minutes_is_dropped(self) -> None:
        parts = group(*(result(n) for n in range(700)))
        for waited_s, complete in ((600, True), (600.001, False)):
            stage = Repairs(1, "f0")
            through(parts[0], stage=stage)
            assert bool(through(parts[1], stage=stage, at_s=waited_s)) == complete
        assert stage.counts["incomplete"] == 1

    def test_a_record_whose_time_is_behind_waits_from_the_time_of_the_one_before_it(self) -> None:
        parts = group(*(result(n) for n in range(700)))
        stage = Repairs(1, "f0")
        through(*group(result(1), number=9), stage=stage, at_s=1_000)
        through(parts[0], stage=stage, at_s=500)
        assert through(parts[1], stage=stage, at_s=1_200) != []

    def test_a_part_that_comes_again_does_not_wait_for_longer(self) -> None:
        parts = group(*(result(n) for n in range(700)))
        stage = Repairs(1, "f0")
        through(parts[0], stage=stage)
        through(parts[0], stage=stage, at_s=300)
        assert through(parts[1], stage=stage, at_s=601) == []

    def test_a_part_that_comes_again_changes_nothing(self) -> None:
        parts = group(*(result(n) for n in range(700)))
        stage = Repairs(1, "f0")
        assert through(parts[0], parts[0], stage=stage) == []
        assert through(parts[1], stage=stage) != []
        before = stage.state()
        assert through(*parts, stage=stage, at_s=0) == []
        assert stage.state() == before

    def test_parts_keep_within_what_one_record_may_hold(self) -> None:
        many = records_of(5, "BTC-USD", T0, "trades", [result(n) for n in range(1_001)], RECV)
        assert [len(json.loads(value)) for _, value in many] == [MAX_PART_RESULTS, MAX_PART_RESULTS, 1]
        long = [result(n, id="x" * 100_000) for n in range(12)]
        parts = records_of(5, "BTC-USD", T0, "trades", long, RECV)
        assert [len(json.loads(value)) for _, value in parts] == [5, 5, 2]
        assert all(len(value) <= MAX_PART_BYTES for _, value in parts)
        assert [repair_of(headers)[0].part for headers, _ in parts] == [0, 1, 2]
        assert b"".join(value[1:-1] + b"," for _, value in parts) == b"".join(one + b"," for one in long)
        for spare, count in ((0, 1), (1, 2)):
            full = [b"1" * (MAX_PART_BYTES // 2), b"1" * (MAX_PART_BYTES // 2 - len(b"[,]") + spare)]
            assert len(records_of(5, "BTC-USD", T0, "trades", full, RECV)) == count
        (huge,) = records_of(5, "BTC-USD", T0, "trades", [b'"%s"' % (b"x" * MAX_PART_BYTES)], RECV)
        assert len(huge[1]) > MAX_PART_BYTES


GOOD = group(result(1))[0]


class TestPoison:
    @pytest.mark.parametrize(
        "bad",
        [
            result(-1),
            result(MINUTE_NS),
            result(1, "-1"),
            result(1, "0"),
            result(1, "1", "0"),
            result(1, '"NaN"'),
            result(1, "1e300"),
            result(1, "0." + "1" * 60),
            result(1, id=""),
            result(1, exchange=-1),
            result(1, exchange=2**40),
            result(1, conditions=[2**40]),
            result(1, participant_timestamp=T0 // NS_PER_MS),
            result(1, participant_timestamp=2**70),
            result(1, participant_timestamp=1.5),
            b"{}",
            b"null",
            b"[]",
            b'"\xff"',
        ],
    )
    def test_a_result_that_cannot_be_normalised_is_a_dead_letter_and_the_others_are_not(self, bad: bytes) -> None:
        outputs = through(*group(result(1), bad, result(2)))
        (letter,) = (decode_dead_letter(o.value) for o in outputs if o.topic == topics.DEAD_LETTERS.name)
        assert (letter.epoch, letter.partition, letter.n, letter.ts_recv) == (-5, 1, 1, RECV)
        assert bytes_of(letter.encoding, letter.payload) == bad
        assert letter.reason
        assert [trade["n"] for trade in values(outputs, topics.TRADES)] == [0, 2]
        assert values(outputs, topics.BARS_1M)[0]["trade_count"] == 2

    def test_a_minute_of_which_nothing_can_be_read_is_not_said_to_be_empty(self) -> None:
        assert values(through(*group(b"{}")), topics.BARS_1M) == []

    @pytest.mark.parametrize(
        ("headers", "value"),
        [
            ([], b"[]"),
            ([("kind", b"repair")], b"[]"),
            ([("kind", b"slice"), *GOOD[0][1:]], b"[]"),
            ([("kind", b"repair"), ("repair", b"\xff{"), ("recv", b"1")], b"[]"),
            ([*GOOD[0][:2], ("recv", b"now")], b"[]"),
            ([*GOOD[0][:2], ("recv", b"-1")], b"[]"),
            (by_part(GOOD[0], number=0), b"[]"),
            (by_part(GOOD[0], number=2**60), b"[]"),
            (by_part(GOOD[0], part=1), b"[]"),
            (by_part(GOOD[0], parts=10**9), b"[]"),
            (by_part(GOOD[0], minute=T0 + 1), b"[]"),
            (by_part(GOOD[0], minute=0), b"[]"),
            (by_part(GOOD[0], of="quotes"), b"[]"),
            (by_part(GOOD[0], pair="nonsense!"), b"[]"),
            (GOOD[0], b""),
            (GOOD[0], b"{}"),
            (GOOD[0], b"[1,"),
            (GOOD[0], b"\xff\xfe"),
            (GOOD[0], b"[" * 100_000),
        ],
    )
    def test_a_record_that_is_no_part_of_a_repair_is_a_dead_letter_and_touches_no_state(
        self, headers: Headers, value: bytes
    ) -> None:
        stage = Repairs(1, "f0")
        before = stage.state()
        (output,) = through((headers, value), stage=stage)
        letter = decode_dead_letter(output.value)
        assert bytes_of(letter.encoding, letter.payload) == value
        assert stage.state() == before
        assert through(GOOD, stage=stage) != []

    def test_dead_letters_are_told_apart(self) -> None:
        """A record by its offset, a part and a result by the repair."""
        known = [([], b"[]"), (GOOD[0], b"{}"), *group(b"{}")]
        letters = [decode_dead_letter(output.value) for output in through(*known)]
        assert [letter.n for letter in letters] == [17, -1, 0]
        assert letters[0].epoch not in {letters[1].epoch, letters[2].epoch}

    @given(st.lists(st.tuples(st.sampled_from(["kind", "repair", "recv"]), st.binary(max_size=20))), st.binary())
    def test_random_bytes_raise_nothing(self, headers: Headers, value: bytes) -> None:
        assert len(through((headers, value))) == 1


# -- every log ----------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A part of a group on its way: `late_s` after its group was begun, and once more `again_s` after that."""

    number: int
    minute: int
    late_s: int
    again_s: int | None


def log_of(script: Sequence[Sent]) -> list[RestRecord]:
    """Groups of three parts, each part by its own way; the record's time is never more than an hour behind."""
    moments: list[tuple[int, int, tuple[Headers, bytes]]] = []
    for place, sent in enumerate(script):
        begun_s = sent.number * 400
        results = [result(sent.minute * MINUTE_NS + n, str(sent.number)) for n in range(MAX_PART_RESULTS * 2 + 1)][
            ::250
        ]
        whole = records_of(sent.number, "BTC-USD", T0 + sent.minute * MINUTE_NS, "trades", results, RECV)
        parts = [
            (by_part(whole[0][0], part=n, parts=3), msgspec.json.encode([msgspec.Raw(one) for one in results[n::3]]))
            for n in range(3)
        ]
        part = parts[place % 3]
        moments.append((begun_s + sent.late_s, place, part))
        if sent.again_s is not None:
            moments.append((begun_s + sent.late_s + sent.again_s, place, part))
    return [
        RestRecord(T0 // NS_PER_MS + (at_s - place % 5 * 300) * 1_000, headers, value, 0)
        for at_s, place, (headers, value) in sorted(moments, key=lambda moment: moment[:2])
    ]


sendings = st.builds(
    Sent,
    st.integers(1, 12),
    st.integers(0, 1),
    st.sampled_from([0, 1, 60, 599, 600, 601, 900]),
    st.sampled_from([None, None, 0, 30, 590]),
)


class TestEveryLog:
    @given(st.lists(sendings, max_size=40))
    def test_a_rebuild_at_any_offset_has_the_whole_state_of_one_pass(self, script: list[Sent]) -> None:
        log = log_of(script)
        one_pass = Repairs(1, "f0")
        for offset, record in enumerate(log):
            since_ms = (log[offset - 1].timestamp_ms if offset else 0) - Repairs.memory_ns // NS_PER_MS
            first = next((at for at in range(offset) if log[at].timestamp_ms >= since_ms), offset)
            rebuilt = Repairs(1, "f0")
            for one in log[first:offset]:
                rebuilt.process(one)
            assert rebuilt.state() == one_pass.state(), offset
            one_pass.process(record)

    @given(st.lists(sendings, max_size=40))
    def test_each_group_is_there_once_and_whole(self, script: list[Sent]) -> None:
        stage = Repairs(1, "f0")
        bars = [b for record in log_of(script) for b in values(stage.process(record), topics.BARS_1M)]
        assert len({(bar["start"], bar["repair"]) for bar in bars}) == len(bars)
        assert all(bar["trade_count"] == 5 and bar["volume"] == 5 for bar in bars)

    @given(
        st.lists(st.tuples(st.integers(0, 59_999), st.decimals("0.0001", "99999", places=4)), min_size=1, max_size=30),
        st.lists(st.integers(0, 29), max_size=8),
        st.permutations(range(9)),
    )
    def test_any_cut_into_parts_in_any_order_gives_the_same(
        self, trades: list[tuple[int, Decimal]], cuts: list[int], order: list[int]
    ) -> None:
        results = [result(ms * NS_PER_MS, str(price), id=str(n)) for n, (ms, price) in enumerate(trades)]
        edges = [0, *sorted(min(cut, len(results)) for cut in cuts), len(results)]
        whole = group(*results)
        parts = [
            (by_part(whole[0][0], part=n, parts=len(edges) - 1), b"[" + b",".join(results[a:b]) + b"]")
            for n, (a, b) in enumerate(pairwise(edges))
        ]
        shuffled = [parts[n] for n in order if n < len(parts)]
        assert through(*shuffled) == through(*whole)
        (bar,) = values(through(*whole), topics.BARS_1M)
        assert bar["notional"] == sum(Fraction(price) for _, price in trades)
        assert bar["open"] == Fraction(min(enumerate(trades), key=lambda one: (one[1][0], one[0]))[1][1])
