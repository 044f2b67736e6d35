"""What a frame becomes in the log: bytes, numbers, partitions, slices, ticks and gaps (rules 3 and 4)."""

import json
from collections import defaultdict
from fractions import Fraction
from itertools import accumulate
from typing import Any

import msgspec
import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from producers.offline import records_of
from producers.slicer import Slicer, SlicerSettings
from producers.split import split_frame
from schemas.events import NS_PER_MS
from schemas.frames import Frame
from schemas.partition import partition_of
from schemas.raw import RawRecord, decode_gap_value
from schemas.topics import PARTITIONS

from .feed import LATENCY_MS, T0, Feed, through, xa, xq, xt

SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000


def started(settings: SlicerSettings | None = None) -> Feed:
    """Two exchanges have traded at T0: the start gap is written and the clock stands there."""
    feed = Feed(settings)
    feed.at(T0, xt(T0, i="first"), xt(T0, x=2, i="second"))
    feed.until(T0 + 200)
    return feed


def events_of(record: RawRecord) -> list[bytes]:
    return [bytes(part) for part in msgspec.json.decode(record.value, type=list[msgspec.Raw])]


def gaps_of(feed: Feed, partition: int = 0) -> list[tuple[int | None, int | None, str]]:
    """(from, to, reason) in ms after T0."""
    values = [decode_gap_value(record.value) for record in feed.of("gap", partition)]
    return [(_ms(gap.from_), _ms(gap.to), gap.reason) for gap in values]


def _ms(ns: int | None) -> int | None:
    return None if ns is None else ns // NS_PER_MS - T0


class TestBytes:
    def test_a_slice_is_an_array_of_the_very_bytes_that_were_sent(self) -> None:
        feed = started()
        events = [
            b'{ "ev" : "XT","pair":"BTC-USD", "p": 61000.10 ,"s":4.522E-05,"t":1732200000100,"i":1,"x":1,"z":[1.0,\t2]}',
            b'{"x":1,"ev":"XT","pair":"BTC-USD","p":1e3,"s":1.000,"t":1732200000100,"i":"\\u0041\xc3\xa9\\/","y":null}',
            b'{"ev":"XT","pair":"BTC-USD","p":1,"s":1,"t":1732200000100,"i":18446744073709551616,"x":1}',
        ]
        feed.raw(T0 + 300, b" [\n" + b" ,\r\n".join(events) + b"\t] ")
        feed.until(T0 + 400)
        assert events_of(feed.of("slice", 1)[-1]) == events
        assert feed.of("slice", 1)[-1].value == b"[" + b",".join(events) + b"]"

    def test_recv_is_one_run_for_each_frame(self) -> None:
        feed = started()
        feed.frame(T0 + 301, xt(T0 + 250), xt(T0 + 251))
        feed.frame(T0 + 302, xt(T0 + 252), xq(T0 + 252), xt(T0 + 253))
        feed.until(T0 + 400)
        runs = [((T0 + 301) * NS_PER_MS, 2), ((T0 + 302) * NS_PER_MS, 3)]
        assert feed.of("slice", 1)[-1].recv == runs

    def test_each_pair_goes_where_kafkas_default_partitioner_puts_it(self) -> None:
        partitioner = DefaultPartitioner()
        everywhere = list(range(PARTITIONS))
        for pair in ("BTC-USD", "ETH-USD", "SOL-USD", "MATIC-USD", "AVAX-USD", "DOGE-USD", "1INCH-USD"):
            assert partition_of(pair) == partitioner(pair.encode(), everywhere, everywhere)

    @pytest.mark.parametrize(
        ("pair", "partition"), [("BTC-USD", 1), ("ETH-USD", 0), ("DOGE-USD", 6), ("AVAX-USD", 3), ("DOT-USD", 4)]
    )
    def test_the_partition_of_a_pair_never_changes(self, pair: str, partition: int) -> None:
        """Values of aiokafka 0.14 and of Java's Utils.murmur2: with another one, identities would change."""
        assert partition_of(pair) == partition

    def test_trades_quotes_and_aggregates_of_a_pair_keep_their_common_order(self) -> None:
        feed = started()
        events = [xq(T0 + 250), xt(T0 + 250), xa(T0 - MINUTE), xq(T0 + 251), xt(T0 + 251, pair="SOL-USD")]
        feed.frame(T0 + 300, *events)
        feed.until(T0 + 400)
        assert events_of(feed.of("slice", 1)[-1]) == events

    @pytest.mark.parametrize(
        "odd",
        [
            b'"s":"0.5"',
            b'"s":1,"status":7',
            b'"s":1,"message":{"a":1}',
            b'"s":1e400',
            b'"s":1,"x":"Kraken"',
            b'"s":1,"t":"soon"',
        ],
    )
    def test_an_event_goes_to_its_pairs_partition_whatever_else_is_odd_in_it(self, odd: bytes) -> None:
        """A trade that the pipeline understands and the producer does not would make a bar elsewhere."""
        event = b'{"ev":"XT","pair":"BTC-USD","p":1,"t":1732200000250,"i":1,"x":1,' + odd + b"}"
        feed = started()
        feed.frame(T0 + 300, event)
        feed.until(T0 + 400)
        assert events_of(feed.of("slice", 1)[-1]) == [event]


class TestFrames:
    @pytest.mark.parametrize(
        "data", [b"", b"{}", b"5", b"null", b"not json", b"[", b'[{"ev":"XT"}', b"\xff\xfe", b"[]]", b'[{"a":[]']
    )
    def test_a_frame_that_is_no_array_is_bad_whole(self, data: bytes) -> None:
        feed = started()
        feed.raw(T0 + 300, data)
        (bad,) = feed.of("bad")
        assert (bad.partition, bad.value, bad.recv) == (0, data, [((T0 + 300) * NS_PER_MS, 1)])

    @pytest.mark.parametrize(
        "element",
        [
            b'{"ev":"XT","pair":"BTC-USD","p":NaN}',
            b"Infinity",
            b'{"p":-Infinity}',
            b'"a\tb"',
            b'{"p":01}',
            b"{'a':1}",
            b'{"a":1 "b":2}',
            b"tru",
            b"",
            b'"\\x"',
            b'{"a":' * 500 + b"1" + b"}" * 500,
            b"[" * 100_000 + b"]" * 100_000,
        ],
    )
    def test_an_element_that_is_not_json_is_bad_alone(self, element: bytes) -> None:
        feed = started()
        one, two = xt(T0 + 250, i="one"), xt(T0 + 250, i="two, ]}[")
        feed.raw(T0 + 300, b"[" + one + b"," + element + b" ," + two + b"]")
        feed.until(T0 + 400)
        assert [bad.value for bad in feed.of("bad")] == [element]
        assert events_of(feed.of("slice", 1)[-1]) == [one, two]

    @pytest.mark.parametrize("element", [b'"caf\xe9"', b"5", b"null", b"[]", b'{"ev":5}', b'{"pair":["BTC-USD"]}'])
    def test_an_element_that_is_json_but_no_event_is_left_for_the_pipeline_to_judge(self, element: bytes) -> None:
        feed = started()
        feed.raw(T0 + 300, b"[" + element + b"]")
        feed.until(T0 + 400)
        assert events_of(feed.of("slice", 0)[-1]) == [element]

    def test_how_deep_an_event_may_nest_does_not_depend_on_who_calls(self) -> None:
        """The interpreter's limit counts the caller's frames too: live and replay would judge differently."""

        def deeper(calls: int, data: bytes) -> list[bool]:
            return deeper(calls - 1, data) if calls else [item.head is None for item in split_frame(data)]

        for depth in range(10, 1_000, 10):
            data = b'[{"ev":"XT","z":' + b"[" * depth + b"]" * depth + b"}]"
            assert deeper(0, data) == deeper(600, data), depth

    def test_the_vendors_status_messages_are_no_part_of_the_tape(self) -> None:
        feed = started()
        feed.frame(T0 + 300, b'{"ev":"status","status":"success","message":"subscribed"}', xt(T0 + 250))
        feed.until(T0 + 400)
        assert events_of(feed.of("slice", 1)[-1]) == [xt(T0 + 250)]


class TestSlices:
    def test_events_linger_together_for_five_milliseconds(self) -> None:
        feed = started()
        feed.frame(T0 + 300, xt(T0 + 250))
        feed.frame(T0 + 304.9, xt(T0 + 251))
        feed.frame(T0 + 305, xt(T0 + 252))
        feed.until(T0 + 400)
        assert [record.events for record in feed.of("slice", 1)[-2:]] == [2, 1]

    def test_without_linger_each_frame_is_its_own_slice(self) -> None:
        feed = started(SlicerSettings(linger_ns=0))
        feed.frame(T0 + 300, xt(T0 + 250), xt(T0 + 251))
        feed.frame(T0 + 301, xt(T0 + 252))
        feed.until(T0 + 302)
        assert [record.events for record in feed.of("slice", 1)[-2:]] == [2, 1]

    def test_a_full_slice_goes_at_once(self) -> None:
        feed = started(SlicerSettings(max_events=3))
        feed.frame(T0 + 300, *(xt(T0 + 250 + i) for i in range(7)))
        assert [record.events for record in feed.of("slice", 1)[-2:]] == [3, 3]
        feed.until(T0 + 400)
        assert feed.of("slice", 1)[-1].events == 1

    def test_no_slice_is_larger_than_the_limit_but_one_of_a_single_event(self) -> None:
        event = xt(T0 + 250)
        limit = 2 * len(event) + 3  # "[", ",", "]"
        feed = started(SlicerSettings(max_bytes=limit))
        large = xt(T0 + 250, i="x" * limit)
        feed.frame(T0 + 300, event, event, event, large, event)
        feed.until(T0 + 400)
        assert [events_of(record) for record in feed.of("slice", 1)[-4:]] == [
            [event, event],
            [event],
            [large],
            [event],
        ]

    def test_bytes_that_are_not_json_keep_their_place_among_the_events_of_their_partition(self) -> None:
        feed = started()
        feed.frame(T0 + 300, xt(T0 + 250, pair="ETH-USD"))
        feed.raw(T0 + 301, b"?")
        feed.frame(T0 + 302, xt(T0 + 251, pair="ETH-USD"))
        feed.until(T0 + 400)
        assert [record.kind for record in feed.records if record.partition == 0][-3:] == ["slice", "bad", "slice"]


class TestTicks:
    def test_each_new_second_puts_a_tick_on_every_partition_before_the_event_that_moved_the_clock(self) -> None:
        feed = started()
        feed.at(T0 + 1_250, xt(T0 + 1_250))
        feed.flush(T0 + 1_300)
        ticks = feed.of("tick")
        assert [tick.partition for tick in ticks] == list(range(PARTITIONS))
        assert {tick.timestamp_ms for tick in ticks} == {T0 + 1_000}
        assert feed.records[-1].kind == "slice"
        assert feed.records[-1].timestamp_ms == T0 + 1_250

    def test_a_slice_never_lingers_past_a_tick(self) -> None:
        feed = started(SlicerSettings(linger_ns=900 * NS_PER_MS))
        feed.at(T0 + 900, xt(T0 + 900), xt(T0 + 900, pair="ETH-USD"))
        feed.at(T0 + 1_000, xt(T0 + 1_000))
        feed.flush(T0 + 1_100)
        for partition in (0, 1):
            kinds = [record.kind for record in feed.records if record.partition == partition]
            assert kinds[-2:] == (["slice", "tick"] if partition == 0 else ["tick", "slice"])
        assert all(b"1732200000900" not in r.value for r in feed.records if r.timestamp_ms >= T0 + 1_000)

    def test_after_a_silence_there_is_one_tick_not_thousands(self) -> None:
        feed = started()
        feed.at(T0 + 3 * HOUR + 10, xt(T0 + 3 * HOUR + 10))
        feed.flush(T0 + 3 * HOUR + 100)
        assert feed.times("tick")[-2:] == [9_000, 3 * HOUR]  # the last one while it was alive, then one

    def test_an_event_just_before_and_one_just_after_a_second_have_the_tick_between_them(self) -> None:
        feed = started()
        feed.at(T0 + 1_000, xt(T0 + 999), xt(T0 + 1_000))
        feed.flush(T0 + 1_100)
        kinds = [(r.kind, r.timestamp_ms - T0) for r in feed.records if r.partition == 1]
        assert kinds[-3:] == [("slice", 999), ("tick", 1_000), ("slice", 1_000)]


class TestGaps:
    def test_the_first_record_of_all_is_the_start_gap_on_every_partition(self) -> None:
        feed = started()
        assert [record.kind for record in feed.records[:PARTITIONS]] == ["gap"] * PARTITIONS
        assert gaps_of(feed) == [(None, 0, "start")]
        gap = json.loads(feed.records[0].value)
        assert (gap["streams"], gap["pairs"]) == (["XT", "XQ", "XA"], ["*"])

    def test_a_gap_is_a_tick_as_well_and_its_end_is_its_time(self) -> None:
        feed = started()
        feed.lost(T0 + 300)
        feed.connected()
        feed.at(T0 + 5_300, xt(T0 + 5_300))
        feed.until(T0 + 5_600)
        feed.at(T0 + 6_100, xt(T0 + 6_100))
        assert feed.times("gap") == [0, 5_300]
        assert feed.times("tick") == [6_000]

    def test_after_a_lost_connection_it_begins_at_the_last_frame(self) -> None:
        feed = started()
        feed.at(T0 + 700, xt(T0 + 700))
        feed.lost(T0 + 4_500)
        feed.connected()
        feed.at(T0 + 9_000, xt(T0 + 9_000))
        feed.until(T0 + 9_200)
        assert gaps_of(feed)[-1] == (700, 9_000, "reconnect")

    def test_after_a_lost_connection_it_begins_at_the_last_pong(self) -> None:
        feed = started()
        feed.at(T0 + 700, xt(T0 + 700))
        feed.pong(T0 + 700 + LATENCY_MS + 3_100)
        feed.lost(T0 + 4_500)
        feed.connected()
        feed.at(T0 + 9_000, xt(T0 + 9_000))
        feed.until(T0 + 9_200)
        assert gaps_of(feed)[-1] == (2_800, 9_000, "reconnect")

    def test_nor_does_it_begin_later_after_a_pong_that_took_long(self) -> None:
        """What the feed sent after it was asked may be behind the pong, and lost with the connection."""
        feed = started()
        feed.at(T0 + 700, xt(T0 + 700))
        feed.pong(T0 + 700 + LATENCY_MS + 6_100, asked_ms=T0 + 700 + LATENCY_MS + 3_100)
        feed.lost(T0 + 8_000)
        feed.connected()
        feed.at(T0 + 9_000, xt(T0 + 9_000))
        feed.until(T0 + 9_200)
        assert gaps_of(feed)[-1] == (2_800, 9_000, "reconnect")

    def test_it_ends_when_events_flow_and_not_when_the_connection_is_back(self) -> None:
        feed = started()
        feed.lost(T0 + 300)
        feed.connected()
        feed.pong(T0 + 5_000)
        feed.until(T0 + 20_000)
        assert len(gaps_of(feed)) == 1
        assert feed.times("tick") == []
        feed.at(T0 + 30_000, xt(T0 + 30_000))
        feed.until(T0 + 31_000)
        assert gaps_of(feed)[-1] == (0, 30_000, "reconnect")

    @pytest.mark.parametrize("subscribed", [True, False])
    def test_it_ends_when_all_is_subscribed_though_something_flows_before(self, subscribed: bool) -> None:
        """The vendor acknowledges one parameter after the other; what came of the first ended the gap of them all."""
        feed = started()
        feed.lost(T0 + 300)
        events = range(T0 + 5_000, T0 + 8_100, 100)
        for t in events:
            feed.at(t, xt(t))
        if subscribed:
            feed.connected()
            feed.at(T0 + 8_100, xt(T0 + 8_100), xq(T0 + 8_100))
            feed.until(T0 + 8_500)
            assert gaps_of(feed)[1:] == [(0, 8_100, "reconnect")]
        else:
            feed.lost(T0 + 8_100)
            feed.connected()
            feed.at(T0 + 9_000, xt(T0 + 9_000))
            feed.until(T0 + 9_500)
            assert gaps_of(feed)[1:] == [(0, 8_000, "reconnect"), (8_000, 9_000, "reconnect")]
        written = b"".join(record.value for record in feed.of("slice"))
        assert all(xt(t) in written for t in events)

    def test_lost_again_before_anything_came_it_is_one_gap(self) -> None:
        feed = started()
        for at in (300, 2_000, 7_000):
            feed.lost(T0 + at)
            feed.connected()
        feed.at(T0 + 9_000, xt(T0 + 9_000))
        feed.until(T0 + 9_200)
        assert gaps_of(feed)[1:] == [(0, 9_000, "reconnect")]

    def test_lost_right_after_the_start_it_begins_where_the_first_events_were(self) -> None:
        """The first events settle by themselves: no frame and no pong comes after they were taken."""
        feed = started()
        feed.lost(T0 + 300)
        feed.connected()
        feed.at(T0 + 9_000, xt(T0 + 9_000))
        feed.until(T0 + 9_200)
        assert gaps_of(feed) == [(None, 0, "start"), (0, 9_000, "reconnect")]

    def test_lost_while_the_first_events_are_still_held_both_gaps_are_marked(self) -> None:
        feed = Feed()
        feed.at(T0, xt(T0), xt(T0, x=2))
        feed.lost(T0 + 60)
        feed.connected()
        feed.at(T0 + 9_000, xt(T0 + 9_000))
        feed.until(T0 + 9_200)
        assert gaps_of(feed) == [(None, 0, "start"), (0, 9_000, "reconnect")]

    def test_the_producers_own_absence_begins_at_the_last_record_of_each_partition(self) -> None:
        before = started()
        before.at(T0 + 700, xt(T0 + 700))
        before.flush(T0 + 800)
        after = Feed(resume=before.resume())
        after.at(T0 + 9_000, xt(T0 + 9_000))
        after.until(T0 + 9_200)
        assert gaps_of(after, 1) == [(700, 9_000, "away")]
        assert gaps_of(after, 2) == [(0, 9_000, "away")]
        assert {(record.epoch, record.n) for record in after.of("gap")} == {(2, 0)}

    def test_killed_while_the_connection_was_dead_and_nobody_knew_the_absence_begins_when_it_died(self) -> None:
        """The half-open stretch is in no record: had ticks run through it, it would lie before the gap."""
        before = started()
        before.at(T0 + 700, xt(T0 + 700))
        before.until(T0 + 700 + LATENCY_MS + 9_000)
        after = Feed(resume=before.resume())
        after.at(T0 + 12_000, xt(T0 + 12_000))
        after.until(T0 + 12_200)
        for partition in range(PARTITIONS):
            (since, until, reason) = gaps_of(after, partition)[0]
            assert since is not None
            assert since <= 700
            assert (until, reason) == (12_000, "away")

    def test_a_partition_that_has_no_record_yet_starts(self) -> None:
        before = started()
        resume = before.resume()
        resume = msgspec.structs.replace(resume, last_ms=[*resume.last_ms[:7], None])
        after = Feed(resume=resume)
        after.at(T0 + 9_000, xt(T0 + 9_000))
        after.until(T0 + 9_200)
        assert gaps_of(after, 7) == [(None, 9_000, "start")]
        assert gaps_of(after, 6) == [(0, 9_000, "away")]

    def test_an_orderly_stop_opens_a_gap_that_the_next_start_closes(self) -> None:
        before = started()
        before.at(T0 + 700, xt(T0 + 700))
        before.stop(T0 + 2_000)
        assert gaps_of(before)[-1] == (700, None, "stop")
        assert [record.kind for record in before.records[-PARTITIONS:]] == ["gap"] * PARTITIONS
        assert any(b"1732200000700" in record.value for record in before.of("slice", 1))
        after = Feed(resume=before.resume())
        after.at(T0 + 9_000, xt(T0 + 9_000))
        after.until(T0 + 9_200)
        (since, until, reason) = gaps_of(after)[0]
        assert since is not None
        assert since <= before.records[-1].timestamp_ms - T0
        assert (until, reason) == (9_000, "away")

    def test_a_stop_lets_out_what_is_held(self) -> None:
        feed = started()
        feed.at(T0 + 200, xt(T0 + 30_000))
        feed.stop(T0 + 300)
        assert any(b"1732200030000" in record.value for record in feed.of("slice", 1))

    def test_stopped_before_any_event_nothing_is_written(self) -> None:
        feed = Feed()
        feed.stop(T0)
        assert feed.records == []

    def test_the_clock_never_goes_back_over_a_restart(self) -> None:
        before = started()
        after = Feed(resume=before.resume())
        after.at(T0 + 9_000, xt(T0 - 30_000), xt(T0 - 30_000, x=2))
        after.until(T0 + 12_000)
        assert min(record.timestamp_ms for record in after.records) >= before.records[-1].timestamp_ms


# -- every frame stream -----------------------------------------------------------------------------

pairs = st.sampled_from(["BTC-USD", "ETH-USD", "SOL-USD", "AVAX-USD", "DOT-USD", ""])
offsets = st.one_of(
    st.integers(-2_000, 100), st.integers(-20 * MINUTE, 20_000), st.sampled_from([HOUR, 75 * 365 * 24 * HOUR])
)
valid = st.builds(
    lambda offset, pair, x, make: (offset, pair, x, make),
    offsets,
    pairs,
    st.integers(1, 3),
    st.sampled_from([xt, xq]),
)
junk = st.one_of(
    st.sampled_from(
        [
            b"NaN",
            b'{"ev":"XT","pair":"BTC-USD","p":NaN}',
            b'"\xff"',
            b"5",
            b"[]",
            b"{}",
            b'{"ev":"XT","pair":5}',
            b"[" * 300 + b"]" * 300,
            b'{"a":"]"}',
            b'{"ev":"XA","pair":"SOL-USD","s":1.5}',
            b'{"a":}',
            b"",
        ]
    ),
    st.binary(max_size=8),
)
whole_frames = st.one_of(
    st.binary(max_size=12), st.sampled_from([b"[]", b"[" * 2_000, b'[{"ev":"XT"', "[“]".encode()[:3]])
)
contents = st.one_of(st.lists(st.one_of(valid, valid, valid, junk), max_size=6), whole_frames)
gaps_ms = st.sampled_from([0, 0.4, 1, 5, 40, 99, 100, 900, 1_000, 2_000, 2_500, 11_000, 61_000, HOUR])
actions = st.one_of(
    st.tuples(st.just("frame"), contents),
    st.tuples(st.just("frame"), contents),
    st.tuples(st.just("frame"), contents),
    st.tuples(st.sampled_from(["pong", "lost", "flush", "restart"]), st.none()),
)
Happening = tuple[float, tuple[str, Any]]
happenings: st.SearchStrategy[list[Happening]] = st.lists(st.tuples(gaps_ms, actions), max_size=40)
slicers = st.builds(
    SlicerSettings,
    linger_ns=st.sampled_from([0, 1, 5, 250, 1_000]).map(lambda ms: ms * NS_PER_MS),
    max_events=st.sampled_from([1, 2, 500]),
    max_bytes=st.sampled_from([1, 300, 65_536]),
)


def played(happened: list[Happening], settings: SlicerSettings, lag_ms: int = 0) -> tuple[list[RawRecord], list[bytes]]:
    """The log, over restarts, and the bytes of every event sent, in order. Timers fire `lag_ms` late."""
    feed = Feed(settings)
    records: list[RawRecord] = []
    sent: list[bytes] = []
    now = float(T0)
    for elapsed, (kind, content) in happened:
        now += elapsed
        match kind:
            case "frame":
                data = content if isinstance(content, bytes) else _frame(now, content)
                sent += [item.data for item in split_frame(data)]
                feed.raw(now, data)
            case "pong":
                feed.pong(now)
            case "lost":
                feed.lost(now)
                feed.connected()
            case "flush":
                feed.flush(now)
            case "restart":
                feed.flush(now)
                if feed.records:
                    resume = feed.resume()
                    records += feed.records
                    feed = Feed(settings, resume)
    feed.flush(now)
    return records + feed.records, sent


def _frame(now: float, content: list[Any]) -> bytes:
    parts = []
    for part in content:
        if isinstance(part, tuple):
            offset, pair, x, make = part
            part = make(int(now) + offset, pair=pair, x=x)
        parts.append(part)
    return b"[" + b",".join(parts) + b"]"


def by_partition(records: list[RawRecord]) -> dict[int, list[RawRecord]]:
    found = defaultdict(list)
    for record in records:
        found[record.partition].append(record)
    return found


class TestEveryFrameStream:
    @given(happenings, slicers)
    def test_every_byte_that_was_sent_stands_in_the_log_once(
        self, happened: list[Happening], settings: SlicerSettings
    ) -> None:
        told = (100.0, ("frame", [(0, "BTC-USD", 1, xt)]))  # a log begins with the first event that tells the time
        records, sent = played([*happened, told], settings)
        logged = [
            data
            for record in records
            if record.kind in ("slice", "bad")
            for data in (events_of(record) if record.kind == "slice" else [record.value])
        ]
        assert sorted(logged) == sorted(sent)

    @given(happenings, slicers)
    def test_numbers_have_no_holes_and_count_what_is_inside(
        self, happened: list[Happening], settings: SlicerSettings
    ) -> None:
        records, _ = played(happened, settings)
        for of_partition in by_partition(records).values():
            for epoch in {record.epoch for record in of_partition}:
                ours = [record for record in of_partition if record.epoch == epoch]
                assert [r.n for r in ours] == [0, *accumulate(r.events for r in ours)][:-1]
                for record in ours:
                    inside = len(events_of(record)) if record.kind == "slice" else 1
                    assert record.events == inside

    @given(happenings, slicers)
    def test_time_never_goes_back_and_never_runs_a_second_past_the_last_tick(
        self,
        happened: list[Happening],
        settings: SlicerSettings,
    ) -> None:
        records, _ = played(happened, settings)
        for of_partition in by_partition(records).values():
            assert of_partition[0].kind == "gap"
            before = tick = of_partition[0].timestamp_ms
            for record in of_partition:
                assert record.timestamp_ms >= before
                before = record.timestamp_ms
                if record.kind in ("tick", "gap"):
                    tick = before
                assert before < tick + SECOND
        ticks = [(r.partition, r.timestamp_ms) for r in records if r.kind == "tick"]
        for at in range(0, len(ticks), PARTITIONS):
            assert ticks[at : at + PARTITIONS] == [(p, ticks[at][1]) for p in range(PARTITIONS)]
            assert ticks[at][1] % SECOND == 0

    @given(happenings, slicers, slicers)
    def test_how_events_are_cut_into_slices_changes_no_output(
        self,
        happened: list[Happening],
        one: SlicerSettings,
        other: SlicerSettings,
    ) -> None:
        """As a set: partitions are independent, and so is the order in which their slices close."""
        first, second = (
            sorted((o.topic, o.value) for o in through(played(happened, settings)[0], close=True))
            for settings in (one, other)
        )
        assert first == second

    @given(happenings, slicers, st.sampled_from([0, 1, 30, 20_000]))
    def test_whatever_is_due_is_done_when_it_is_due(
        self,
        happened: list[Happening],
        settings: SlicerSettings,
        lag_ms: int,
    ) -> None:
        """A deadline that stays in the past would make a busy loop of the producer's timer."""
        slicer = Slicer(settings, ["XT", "XQ", "XA"], ["*"])
        now = T0 * NS_PER_MS
        slicer.connected(now)
        for elapsed, (kind, content) in happened:
            end = now + round(elapsed * NS_PER_MS)
            while (due := slicer.deadline()) is not None and due + lag_ms * NS_PER_MS < end:
                now = max(now, due + lag_ms * NS_PER_MS)
                slicer.advance(now)
                again = slicer.deadline()
                assert again is None or again > now
            now = max(now, end)
            if kind == "frame":
                data = content if isinstance(content, bytes) else _frame(now / NS_PER_MS, content)
                slicer.frame(split_frame(data), now)
            elif kind == "pong":
                slicer.pong(now, now)
            elif kind == "lost":
                slicer.lost("reconnect", now)
                slicer.connected(now)

    @given(happenings, slicers)
    def test_a_recording_gives_the_log_that_the_live_producer_wrote(
        self,
        happened: list[Happening],
        settings: SlicerSettings,
    ) -> None:
        frames = []
        now = T0 * NS_PER_MS
        for elapsed, (kind, content) in happened:
            now += round(elapsed * NS_PER_MS)
            if kind == "frame":
                data = content if isinstance(content, bytes) else _frame(now / NS_PER_MS, content)
                frames.append(Frame(now, data))
        feed = Feed(settings)
        for frame in frames:
            feed.raw(Fraction(frame.recv_ns, NS_PER_MS), frame.data)
        feed.slicer.flush(now)
        feed.take()
        assert list(records_of(frames, settings, ["XT", "XQ", "XA"], ["*"])) == feed.records
