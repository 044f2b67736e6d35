"""Rules 1 and 2 of the fine print: what time it is on the exchanges, as far as the feed proves it."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.clock import AHEAD_NS, HOLD_NS, MARGIN_NS, WALL_AHEAD_NS, Claim, FeedClock
from schemas import topics
from schemas.events import NS_PER_MS, NS_PER_S
from schemas.raw import decode_gap_value

from .feed import LATENCY_MS, T0, Feed, through, xa, xq, xt

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
IN_2099 = 4_070_908_800_000


def started(latency_ms: int = LATENCY_MS) -> Feed:
    """Two exchanges have traded for two seconds: the clock stands at T0 + 2 s."""
    feed = Feed(latency_ms=latency_ms)
    for t in range(T0, T0 + 2_001, 250):
        feed.at(t, xt(t), xt(t, x=2, pair="ETH-USD"))
    return feed


def quarantined(feed: Feed) -> list[int]:
    """Times (ms after T0) of the events that the pipeline did not believe."""
    return [
        json.loads(output.value)["ts_event"] // NS_PER_MS - T0
        for output in through(feed.records)
        if output.topic == topics.QUARANTINE.name
    ]


def ticked(feed: Feed) -> list[int]:
    return feed.times("tick")


class TestBelief:
    def test_an_event_at_most_ten_seconds_ahead_is_believed_at_once(self) -> None:
        feed = started()
        feed.at(T0 + 2_010, xt(T0 + 12_010))
        assert feed.slicer.clock.now == (T0 + 12_010) * NS_PER_MS

    def test_one_further_ahead_is_held_back_with_all_that_follow(self) -> None:
        feed = started()
        before = len(feed.records)
        feed.at(T0 + 2_010, xt(T0 + 12_500, i="early"))
        feed.at(T0 + 2_020, xt(T0 + 2_020))
        feed.until(T0 + 2_020 + LATENCY_MS + 1_900)
        assert all(b"early" not in record.value for record in feed.records[before:])
        assert ticked(feed)[-1] == 2 * SECOND

    def test_it_is_believed_when_another_exchange_agrees(self) -> None:
        feed = started()
        feed.at(T0 + 2_010, xt(T0 + 30_000))
        feed.at(T0 + 2_020, xt(T0 + 30_010, x=2))
        assert feed.slicer.clock.now == (T0 + 30_010) * NS_PER_MS
        assert quarantined(feed) == []

    def test_the_same_exchange_on_another_pair_does_not_confirm_it(self) -> None:
        """One bad exchange with two pairs must not confirm itself."""
        feed = started()
        feed.at(T0 + 2_010, xt(T0 + 40_000))
        feed.at(T0 + 2_020, xt(T0 + 40_000, pair="SOL-USD"))
        for t in range(T0 + 2_100, T0 + 6_000, 100):
            feed.at(t, xt(t, x=2, pair="ETH-USD"))
        feed.flush(T0 + 6_000)
        assert quarantined(feed) == [40_000, 40_000]
        assert ticked(feed)[-1] == 5 * SECOND

    def test_where_the_feed_has_one_exchange_another_pair_confirms_it(self) -> None:
        feed = Feed()
        for t in range(T0, T0 + 3_000, 250):
            feed.at(t, xt(t), xt(t, pair="ETH-USD"))
        feed.at(T0 + 3_010, xt(T0 + 30_000))
        feed.at(T0 + 3_020, xt(T0 + 30_010, pair="ETH-USD"))
        assert feed.slicer.clock.now == (T0 + 30_010) * NS_PER_MS

    def test_it_is_believed_when_nothing_contradicts_it_in_two_seconds(self) -> None:
        feed = started()
        feed.at(T0 + 2_010, xt(T0 + 40_000))
        feed.until(T0 + 2_010 + LATENCY_MS + 2_000)
        assert feed.slicer.clock.now == (T0 + 40_000) * NS_PER_MS
        assert quarantined(feed) == []

    def test_contradicted_it_is_released_as_it_came_and_quarantined_downstream(self) -> None:
        feed = started()
        feed.at(T0 + 2_010, xt(T0 + 40_000))
        for t in range(T0 + 2_100, T0 + 5_000, 100):
            feed.at(t, xt(t))
        feed.flush(T0 + 5_000)
        assert quarantined(feed) == [40_000]
        assert len(feed.of("slice", 1)) > 1
        assert ticked(feed)[-1] == 4 * SECOND

    def test_a_thousand_events_are_enough_to_wait_for(self) -> None:
        feed = started()
        feed.at(T0 + 2_010, xt(T0 + 40_000), *(xt(T0 + 2_010, i=i) for i in range(998)))
        assert feed.slicer.clock.now == (T0 + 2_000) * NS_PER_MS
        feed.at(T0 + 2_011, xt(T0 + 2_011))
        assert feed.slicer.clock.now == (T0 + 2_011) * NS_PER_MS

    def test_a_good_trade_after_a_real_silence_is_not_quarantined(self) -> None:
        """The feed said nothing for an hour; the clock could not move, and the trade is an hour ahead."""
        feed = started()
        feed.at(T0 + HOUR, xt(T0 + HOUR))
        feed.at(T0 + HOUR + 500, xt(T0 + HOUR + 500))
        feed.flush(T0 + HOUR + 1_000)
        assert quarantined(feed) == []
        assert ticked(feed)[-1] == HOUR

    def test_a_good_trade_after_a_silence_of_a_fast_replay_is_not_quarantined(self) -> None:
        """At ten times the speed, an hour of silence lasts six minutes."""
        feed = started(DAY)
        silence_ms = HOUR // 10
        feed.frame(T0 + DAY + silence_ms, xt(T0 + HOUR))
        feed.until(T0 + DAY + silence_ms + 2_000)
        assert quarantined(feed) == []
        assert ticked(feed)[-1] >= HOUR

    def test_nothing_is_believed_beyond_the_wall_clock_and_a_minute(self) -> None:
        feed = started()
        feed.frame(T0 + 2_100, xt(T0 + 2_100 + 60_001), xt(T0 + 2_100 + 60_001, x=2))
        feed.flush(T0 + 2_200)
        assert ticked(feed)[-1] == 2 * SECOND
        assert quarantined(feed) == [62_101, 62_101]

    def test_belief_goes_on_across_a_reconnect(self) -> None:
        feed = started()
        feed.lost(T0 + 3_000)
        feed.connected()
        feed.frame(T0 + MINUTE, xt(T0 + MINUTE + 30_000, x=3), xt(T0 + MINUTE))
        feed.frame(T0 + MINUTE + 200, xt(T0 + MINUTE + 100))
        feed.until(T0 + MINUTE + 2_100)
        assert quarantined(feed) == [MINUTE + 30_000]
        assert feed.times("gap")[-1] == MINUTE

    def test_belief_goes_on_across_a_restart(self) -> None:
        before = started()
        feed = Feed(resume=before.resume())
        feed.frame(T0 + MINUTE, xt(T0 + MINUTE + 30_000, x=3), xt(T0 + MINUTE))
        feed.frame(T0 + MINUTE + 200, xt(T0 + MINUTE + 100))
        feed.until(T0 + MINUTE + 2_100)
        assert quarantined(feed) == [MINUTE + 30_000]
        assert feed.times("gap") == [MINUTE]

    def test_what_is_held_is_not_compared_all_over_again_with_each_event_that_comes(self) -> None:
        """One in a hundred from an exchange half a minute fast took all the time there was."""
        feed = started()
        verdict, asked = feed.slicer.clock.verdict, 0

        def counting(claim: Claim, later: Sequence[Claim], now: int) -> bool | None:
            nonlocal asked
            asked += len(later)
            return verdict(claim, later, now)

        feed.slicer.clock.verdict = counting  # type: ignore[method-assign]
        feed.at(T0 + 2_010, xt(T0 + 32_010, x=3))
        for t in range(T0 + 2_011, T0 + 2_911):
            feed.at(t, xt(t, x=1 + t % 2))
        feed.flush(T0 + 2_911)
        assert quarantined(feed) == [32_010]
        assert asked < 3 * 900


class TestTheFirstEvent:
    def test_from_2099_it_does_not_stick_in_the_log(self) -> None:
        feed = Feed()
        feed.at(T0, xt(IN_2099, x=3), xt(T0), xt(T0, x=2))
        for t in range(T0 + 250, T0 + 5_000, 250):
            feed.at(t, xt(t), xt(t, x=2))
        feed.flush(T0 + 5_000)
        assert feed.times("gap") == [0]
        assert quarantined(feed) == [IN_2099 - T0]
        assert max(record.timestamp_ms for record in feed.records) < T0 + 5_000

    def test_from_2099_and_alone_it_does_not_stick_either(self) -> None:
        feed = Feed()
        feed.at(T0, xt(IN_2099, x=3))
        feed.until(T0 + MINUTE)
        feed.at(T0 + MINUTE, xt(T0 + MINUTE))
        feed.until(T0 + 2 * MINUTE)
        assert quarantined(feed) == [IN_2099 - T0]
        assert max(record.timestamp_ms for record in feed.records) < T0 + 2 * MINUTE

    def test_from_half_a_minute_ahead_it_is_outvoted_by_another_exchange(self) -> None:
        feed = Feed()
        feed.at(T0, xt(T0 + 30_000, x=3), xt(T0 + 30_000, x=3, pair="ETH-USD"), xt(T0), xt(T0, x=2))
        feed.until(T0 + 2_100)
        assert feed.times("gap") == [0]
        assert quarantined(feed) == [30_000, 30_000]

    def test_a_late_first_event_does_not_set_the_clock_where_newer_ones_follow_at_once(self) -> None:
        feed = Feed()
        feed.at(T0, xt(T0 - 5_000), xt(T0 - 4_000, x=2))
        feed.at(T0 + 50, xt(T0 + 50))
        feed.until(T0 + 1_000)
        assert feed.times("gap") == [50]

    def test_alone_it_is_believed_after_two_seconds(self) -> None:
        feed = Feed()
        feed.at(T0, xt(T0))
        feed.until(T0 + 2_040)
        assert feed.records == []
        feed.until(T0 + 2_050)
        assert feed.times("gap") == [0]

    def test_without_a_time_it_waits_for_one_that_has_one(self) -> None:
        feed = Feed()
        feed.at(T0, b'{"ev":"XT"}', b"5")
        feed.until(T0 + MINUTE)
        assert feed.records == []
        feed.at(T0 + MINUTE, xt(T0 + 50_000))
        feed.until(T0 + MINUTE + 3_000)
        assert feed.times("gap") == [50_000]

    def test_where_nothing_ever_tells_the_time_no_wall_clock_gets_into_the_log(self) -> None:
        for end in (Feed.flush, Feed.lost, Feed.stop):
            feed = Feed()
            feed.raw(T0, b"not json")
            feed.frame(T0 + 100, b'{"ev":"XT"}', xt(IN_2099))
            end(feed, T0 + MINUTE)
            assert feed.records == []

    def test_without_a_time_it_is_recorded_when_a_later_session_tells_it(self) -> None:
        feed = Feed()
        feed.raw(T0, b"not json")
        feed.lost(T0 + 5_000)
        feed.connected()
        feed.at(T0 + MINUTE, xt(T0 + 50_000))
        feed.until(T0 + MINUTE + 3_000)
        assert feed.times("gap") == [50_000]
        assert [record.value for record in feed.of("bad")] == [b"not json"]

    def test_garbage_before_it_takes_nothing_from_the_time_to_judge_it(self) -> None:
        feed = Feed()
        feed.raw(T0 - MINUTE, b"not json")
        feed.at(T0, xt(T0 + 30_000, x=3), xt(T0 + 30_000, x=3, pair="ETH-USD"))
        feed.at(T0 + 10, xt(T0), xt(T0, x=2))
        feed.until(T0 + 2_100)
        assert feed.times("gap") == [0]
        assert quarantined(feed) == [30_000, 30_000]

    def test_of_more_than_a_thousand_without_a_time_the_last_are_kept(self) -> None:
        """Memory has its limits, and before the log's first event there is the gap `start`."""
        feed = Feed()
        feed.at(T0, *[b'{"ev":"XT"}'] * 2_500)
        feed.at(T0 + 100, xt(T0))
        feed.until(T0 + 3_000)
        assert feed.times("gap") == [0]
        assert sum(record.events for record in feed.of("slice")) == 501

    def test_of_a_delayed_feed_it_sets_the_clock_a_quarter_of_an_hour_behind(self) -> None:
        feed = Feed()
        feed.frame(T0 + 15 * MINUTE, xt(T0), xt(T0 + 10, x=2))
        feed.until(T0 + 15 * MINUTE + 1_000)
        assert feed.times("gap") == [10]


class TestIdle:
    def test_an_idle_living_feed_moves_the_clock_a_margin_behind_elapsed_time(self) -> None:
        feed = started()
        feed.idle(T0 + 2_000 + LATENCY_MS, T0 + 2_000 + LATENCY_MS + 5_000)
        assert ticked(feed) == [1_000, 2_000, 3_000, 4_000, 5_000, 6_000]

    def test_an_idle_minute_closes_within_two_seconds(self) -> None:
        """The margin of one, and one until the next pong."""
        feed = Feed()
        for t in range(T0, T0 + MINUTE - 2_000, 250):
            feed.at(t, xt(t), xt(t, x=2))
        feed.idle(T0 + MINUTE - 2_250 + LATENCY_MS, T0 + MINUTE + 2_000)
        assert ticked(feed)[-1] >= MINUTE

    def test_a_pong_proves_what_was_sent_before_it_was_asked_for(self) -> None:
        feed = started()
        recv = T0 + 2_000 + LATENCY_MS
        feed.pong(recv + 8_000, asked_ms=recv + 3_000)
        assert ticked(feed)[-1] == 4_000

    def test_nothing_moves_the_clock_before_a_frame_or_a_pong_proves_it(self) -> None:
        """The connection may be dead, and nobody knows yet."""
        feed = started()
        feed.until(T0 + 2_000 + LATENCY_MS + 9_000)
        assert ticked(feed)[-1] == 2_000

    def test_the_next_frame_proves_the_silence_before_it(self) -> None:
        """And so it does in a recording, which has no pongs."""
        feed = started()
        feed.at(T0 + 7_000, xt(T0 + 3_500, x=2))
        assert ticked(feed)[-1] == 6_000

    def test_pongs_do_not_keep_a_silent_feed_alive(self) -> None:
        feed = started()
        feed.idle(T0 + 3_000, T0 + MINUTE)
        assert ticked(feed)[-1] == 2_000 + 10_000 - 1_000

    def test_a_disconnected_feed_is_not_alive(self) -> None:
        feed = started()
        feed.lost(T0 + 2_100)
        feed.until(T0 + MINUTE)
        assert ticked(feed)[-1] == 2_000

    def test_only_subscribed_streams_say_that_the_feed_is_alive(self) -> None:
        feed = started()
        for t in range(T0 + 3_000, T0 + MINUTE, 1_000):
            feed.at(t, b'{"ev":"news"}')
        assert ticked(feed)[-1] == 2_000 + 10_000 - 1_000
        assert feed.of("tick", 0)[-1].value == b'{"fresh":["XT"]}'

    def test_a_tick_says_which_streams_are_fresh(self) -> None:
        feed = started()
        feed.at(T0 + 3_000, xq(T0 + 3_000))
        for t in range(T0 + 4_000, T0 + 15_000, 1_000):
            feed.at(t, xq(t), xa(T0 - 60_000))
        assert feed.of("tick", 0)[2].value == b'{"fresh":["XQ","XT"]}'
        assert feed.of("tick", 0)[-1].value == b'{"fresh":["XA","XQ"]}'

    def test_the_vendors_clock_steps_an_hour_past_the_wall_clock_and_back(self) -> None:
        """What cannot be is quarantined, and the clock goes on by elapsed time."""
        feed = started()
        for t in range(T0 + 3_000, T0 + MINUTE, 500):
            feed.at(t, xt(t + HOUR), xt(t + HOUR, x=2))
        assert ticked(feed)[-1] == 58_000
        for t in range(T0 + MINUTE, T0 + 2 * MINUTE, 500):
            feed.at(t, xt(t), xt(t, x=2))
        feed.flush(T0 + 2 * MINUTE)
        assert ticked(feed)[-1] == 119_000
        assert len(quarantined(feed)) == 2 * 114

    def test_the_vendors_clock_steps_an_hour_forward_and_back(self) -> None:
        """The clock follows forward, for all say so; it stands still until the feed has caught up."""
        feed = started(DAY)
        for t in range(T0 + 3_000, T0 + 2 * MINUTE, 500):
            feed.at(t, xt(t + HOUR), xt(t + HOUR, x=2))
        stood = ticked(feed)[-1]
        assert stood >= HOUR + 2 * MINUTE - 1_000
        for t in range(T0 + 2 * MINUTE, T0 + HOUR + MINUTE, 15_000):
            feed.at(t, xt(t), xt(t + 10, x=2))
        assert ticked(feed)[-1] == stood
        for t in range(T0 + HOUR + MINUTE, T0 + HOUR + 3 * MINUTE, 500):
            feed.at(t, xt(t), xt(t, x=2))
        feed.flush(T0 + DAY + HOUR + 3 * MINUTE)
        assert ticked(feed)[-1] == HOUR + 3 * MINUTE - 1_000
        assert quarantined(feed) == []

    def test_long_after_such_a_step_back_an_event_half_an_hour_ahead_is_not_believed(self) -> None:
        """What was believed once must not be extrapolated for ever."""
        feed = started(DAY)
        for t in range(T0 + 3_000, T0 + MINUTE, 500):
            feed.at(t, xt(t + HOUR), xt(t + HOUR, x=2))
        now = T0 + HOUR + 5 * MINUTE
        for t in range(T0 + MINUTE, now, 5_000):
            feed.at(t, xt(t), xt(t, x=2))
        feed.at(now, xt(now + HOUR // 2, x=3))
        for t in range(now + 100, now + 4_000, 100):
            feed.at(t, xt(t), xt(t, x=2))
        feed.flush(now + DAY + 4_000)
        assert quarantined(feed) == [now - T0 + HOUR // 2]
        assert ticked(feed)[-1] == now - T0 + 3_000

    def test_a_switch_to_a_delayed_cluster_lets_the_clock_stand_until_it_has_caught_up(self) -> None:
        feed = started()
        feed.lost(T0 + 2_100)
        feed.connected()
        delay = 15 * MINUTE
        for t in range(T0 + 3_000, T0 + 3_000 + delay, 5_000):
            feed.frame(t, xt(t - delay), xt(t - delay, x=2))
        assert ticked(feed)[-1] == 2_000
        end = T0 + 5_000 + delay
        for t in range(end, end + 5_000, 500):
            feed.frame(t, xt(t - delay), xt(t - delay, x=2))
        assert ticked(feed)[-1] == 9_000
        assert quarantined(feed) == []

    def test_an_exchange_that_is_three_seconds_fast_does_not_move_the_clock(self) -> None:
        feed = started()
        for t in range(T0 + 2_250, T0 + 5 * MINUTE, 250):
            feed.at(t, xt(t + 3_000, x=3), xt(t), xt(t, x=2))
        assert ticked(feed)[-1] < 5 * MINUTE + 1_000
        assert quarantined(feed) == []

    def test_nor_does_it_while_the_others_are_quiet_or_when_it_ends_a_gap(self) -> None:
        feed = started()
        for t in range(T0 + 2_250, T0 + MINUTE, 250):
            feed.at(t, xt(t + 3_000, x=3), xt(t), xt(t, x=2))
        for t in range(T0 + MINUTE, T0 + 2 * MINUTE, 250):
            feed.at(t, xt(t + 3_000, x=3))
        assert ticked(feed)[-1] < 2 * MINUTE
        feed.lost(T0 + 2 * MINUTE)
        feed.connected()
        for t in range(T0 + 2 * MINUTE, T0 + 3 * MINUTE, 250):
            feed.at(t, xt(t + 3_000, x=3), xt(t), xt(t, x=2))
        assert ticked(feed)[-1] < 3 * MINUTE + 1_000
        assert quarantined(feed) == []

    def test_two_fast_exchanges_vouch_for_each_other(self) -> None:
        feed = started()
        for t in range(T0 + 2_250, T0 + 5 * MINUTE, 250):
            feed.at(t, xt(t + 3_000, x=3), xt(t + 3_000, x=4), xt(t), xt(t, x=2))
        assert ticked(feed)[-1] > 5 * MINUTE + 1_000

    def test_a_step_of_the_vendors_clock_that_one_exchange_shows_first_is_no_lead(self) -> None:
        feed = started(DAY)
        for t in range(T0 + 2_250, T0 + MINUTE, 250):
            feed.at(t, xt(t), xt(t, x=2))
        for t in range(T0 + MINUTE, T0 + 2 * MINUTE, 250):
            feed.at(t, *[xt(t + HOUR, i=f"{t}-{n}") for n in range(4)], xt(t + HOUR, x=2))
        feed.flush(T0 + DAY + 2 * MINUTE + 4_000)
        assert quarantined(feed) == []
        assert ticked(feed)[-1] >= HOUR + 2 * MINUTE - 1_000


times = st.integers(-20 * MINUTE, 2 * MINUTE)


class TestTheClockItself:
    @given(
        st.lists(
            st.tuples(st.integers(0, 5_000), st.none() | times, st.sampled_from([None, 1, 2]), st.integers(0, 2)),
            max_size=40,
        )
    )
    def test_it_never_goes_back_and_never_runs_past_what_could_be_true(
        self, events: list[tuple[int, int | None, int | None, int]]
    ) -> None:
        clock = FeedClock()
        recv, highest = T0 * NS_PER_MS, 0
        for elapsed, offset, exchange, pair in events:
            recv += elapsed * NS_PER_MS
            ts = None if offset is None else recv + offset * NS_PER_MS
            claim = Claim(ts, exchange, f"P{pair}-USD", recv)
            clock.heard(claim)
            before = clock.now
            if ts is not None and (clock.in_bounds(claim) or clock.verdict(claim, [], recv + HOLD_NS)):
                clock.now = clock.believe(claim)
                highest = max(highest, ts)
            elif (idle := clock.idle(recv)) is not None:
                clock.now = idle
            assert before is None or (clock.now is not None and clock.now >= before)
            assert clock.now is None or clock.now <= recv + WALL_AHEAD_NS + 40 * 5 * NS_PER_S

    def test_the_bound_is_ten_seconds_past_the_last_belief_and_the_time_since(self) -> None:
        clock = FeedClock((1_000 * NS_PER_S, 1_000 * NS_PER_S))
        later = 1_007 * NS_PER_S
        edge = later + AHEAD_NS
        assert clock.in_bounds(Claim(edge, 1, "A", later))
        assert not clock.in_bounds(Claim(edge + 1, 1, "A", later))

    def test_a_receive_clock_that_steps_back_takes_nothing_from_the_bound(self) -> None:
        clock = FeedClock((1_000 * NS_PER_S, 1_000 * NS_PER_S))
        assert clock.in_bounds(Claim(1_010 * NS_PER_S, 1, "A", 990 * NS_PER_S))

    def test_idle_it_goes_by_the_time_since_the_last_belief_less_a_margin(self) -> None:
        clock = FeedClock((1_000 * NS_PER_S, 5_000 * NS_PER_S))
        assert clock.idle(5_004 * NS_PER_S + MARGIN_NS) == 1_004 * NS_PER_S


def without_trades() -> Feed:
    """Trades and quotes, and from 99 to 107 s quotes alone."""
    feed = Feed(streams=("XT", "XQ"))
    for t in range(T0, T0 + 99_000, 250):
        feed.at(t, xt(t), xq(t, x=2))
    for t in range(T0 + 99_000, T0 + 107_000, 250):
        feed.at(t, xq(t, x=2))
    return feed


def busy(pongs: bool = False) -> Feed:
    """Trades and quotes four times a second for 70 s, as long as it takes to know them well, and watched meanwhile."""
    feed = Feed(streams=("XT", "XQ"))
    for t in range(T0, T0 + 70_000, 250):
        feed.at(t, xt(t), xq(t, x=2))
        assert not feed.slicer.stalled((t + LATENCY_MS) * NS_PER_MS)
        if pongs:
            feed.pong(t + LATENCY_MS)
    return feed


def marked(feed: Feed, partition: int = 0) -> list[tuple[int, int, list[str], str]]:
    """(from, to, streams, reason) of the gaps but for that before the log, in ms after T0."""
    gaps = [(decode_gap_value(record.value), record.timestamp_ms * NS_PER_MS) for record in feed.of("gap", partition)]
    return [
        (gap.from_ // NS_PER_MS - T0, (gap.to or at) // NS_PER_MS - T0, gap.streams, gap.reason)
        for gap, at in gaps
        if gap.from_ is not None
    ]


class TestWhatAGapKnows:
    def test_a_stop_during_a_stall_marks_the_stall_too(self) -> None:
        """XT has been silent from 99 s on, XQ flows, pongs come, and the stop comes before the watchdog."""
        feed = without_trades()
        feed.stop(T0 + 107_000)
        gaps = [json.loads(r.value) for r in feed.of("gap", 0)][1:]
        since = {stream: gap["from"] // NS_PER_MS - T0 for gap in gaps for stream in gap["streams"]}
        assert 98_000 < since["XT"] < 99_000
        assert since["XQ"] > 106_000

    def test_a_silence_that_ends_while_a_rogue_is_held_is_marked(self) -> None:
        feed = without_trades()
        feed.at(T0 + 107_000, xq(T0 + 10 * MINUTE, x=3))
        for t in range(T0 + 107_250, T0 + 112_000, 250):
            feed.at(t, xt(t), xq(t, x=2))
        feed.flush(T0 + 113_000)
        marked = [json.loads(r.value) for r in feed.of("gap", 0)][1:]
        assert [(gap["reason"], gap["streams"]) for gap in marked] == [("silence", ["XT"])]
        assert marked[0]["from"] // NS_PER_MS - T0 < 99_000

    def test_killed_during_a_stall_the_absence_of_the_silent_stream_begins_at_its_own_last_event(self) -> None:
        for ending in ([], [xt(T0 + 106_900)]):  # none: it was silent to the end
            feed = without_trades()
            if ending:
                feed.at(T0 + 106_950, *ending)
            after = Feed(resume=feed.resume())
            after.at(T0 + 109_000, xt(T0 + 109_000), xq(T0 + 109_000, x=2))
            after.flush(T0 + 112_000)
            for partition in range(8):
                gaps = [json.loads(r.value) for r in after.of("gap", partition)]
                reasons = {stream: gap["reason"] for gap in gaps for stream in gap["streams"]}
                assert (reasons["XQ"], reasons["XT"]) == ("away", "away" if ending else "stall")
                since = {stream: gap["from"] // NS_PER_MS - T0 for gap in gaps for stream in gap["streams"]}
                assert since["XQ"] >= 106_000
                assert (98_000 < since["XT"] < 99_000) == (not ending)

    @pytest.mark.parametrize("after", ["reconnect", "restart"])
    def test_a_stream_that_is_silent_from_a_new_beginning_on_is_marked_when_it_comes(self, after: str) -> None:
        feed = busy()
        if after == "reconnect":
            feed.lost(T0 + 70_000)
            feed.connected()
        else:
            feed.flush(T0 + 70_000)
            feed = Feed(resume=feed.resume(), streams=("XT", "XQ"))
        for t in range(T0 + 72_000, T0 + 76_000, 250):
            feed.at(t, xq(t, x=2))
        for t in range(T0 + 76_000, T0 + 80_000, 250):
            feed.at(t, xt(t), xq(t, x=2))
        for partition in range(8):
            first, second = marked(feed, partition)[-2:]
            assert first[1:] == (72_000, ["XT", "XQ"], "reconnect" if after == "reconnect" else "away")
            assert second == (72_000, 76_000, ["XT"], "silence")

    def test_a_lost_connection_is_no_habit_of_a_stream_that_flows_again_before_all_is_subscribed(self) -> None:
        """Behind 0.8 s taken for its habit a stall of up to 3.4 s could hide."""
        feed = busy()
        feed.lost(T0 + 70_000)
        feed.at(T0 + 70_600, xt(T0 + 70_600), xq(T0 + 70_600, x=2))
        feed.connected()
        for t in range(T0 + 70_850, T0 + 80_000, 250):
            feed.at(t, *([] if T0 + 75_000 <= t < T0 + 78_000 else [xt(t)]), xq(t, x=2))
        assert [gap[2:] for gap in marked(feed)] == [(["XT", "XQ"], "reconnect"), (["XT"], "silence")]

    def test_what_waited_for_a_stopped_process_does_not_prove_that_nothing_more_was_sent(self) -> None:
        """Cut off as a slow consumer, half a minute's frames behind the one that it then reads first."""
        feed = busy(pongs=True)
        for t in range(T0 + 70_000, T0 + 72_000, 250):
            feed.frame(T0 + 79_000, xt(t), xq(t, x=2))
        feed.lost(T0 + 79_001)
        feed.connected()
        feed.at(T0 + 80_000, xt(T0 + 80_000), xq(T0 + 80_000, x=2))
        feed.until(T0 + 81_000)
        assert [gap[:2] for gap in marked(feed)] == [(71_750, 80_000)]

    @pytest.mark.parametrize("end", ["killed", "stopped", "lost"])
    def test_a_stall_too_young_to_be_told_from_chance_is_marked_where_something_else_ends_the_session(
        self, end: str
    ) -> None:
        feed = before = busy()
        for t in range(T0 + 70_000, T0 + 70_550, 50):
            feed.at(t, xq(t, x=2))
        if end == "lost":
            feed.lost(T0 + 70_600)
            feed.connected()
        else:
            (feed.flush if end == "killed" else feed.stop)(T0 + 70_600)
            feed = Feed(resume=feed.resume(), streams=("XT", "XQ"))
        feed.at(T0 + 73_000, xt(T0 + 73_000), xq(T0 + 73_000, x=2))
        feed.until(T0 + 74_000)
        for partition in range(8):
            spans = [gap for one in {before, feed} for gap in marked(one, partition) if "XT" in gap[2]]
            assert min(spans)[0] in range(69_000, 69_751), "it was last heard at 69.75 s"
            assert max(until for _, until, *_ in spans) == 73_000

    @pytest.mark.parametrize("end", ["killed", "stopped", "full"])
    def test_a_quiet_stream_is_not_taken_for_a_busy_one_because_it_was_unusually_silent_at_an_end(
        self, end: str
    ) -> None:
        """Trades each 20 s, and none in the last 45: one doubt until they come again, none of their habit."""

        def quiet(feed: Feed, begin: int, until: int) -> Feed:
            for t in range(T0 + begin, T0 + until, 500):
                trades = [xt(t)] if (t - T0) % 20_000 == 0 and not 600_000 < t - T0 < 645_000 else []
                feed.at(t, *trades, xq(t, x=2))
            return feed

        before = quiet(Feed(streams=("XT", "XQ")), 0, 645_000)
        (before.stop if end == "stopped" else before.flush)(T0 + 645_000)
        resume = before.slicer.dropped(before.resume()) if end == "full" else before.resume()
        after = quiet(Feed(resume=resume, streams=("XT", "XQ")), 648_000, 800_000)
        since, until, *_ = next(gap for gap in marked(after) if "XQ" in gap[2])
        assert 643_500 <= since < until == 648_000
        assert [gap for gap in marked(after) if "XT" in gap[2]] == [
            (600_000, 648_000, ["XT"], "stall"),
            (648_000, 660_000, ["XT"], "stall"),
        ]

    def test_killed_right_after_the_gap_of_a_stall_that_goes_on_it_is_marked_from_there_on(self) -> None:
        feed = busy()
        for t in range(T0 + 70_000, T0 + 82_000, 250):
            feed.at(t, xq(t, x=2))
        feed.slicer.stalled((T0 + 82_000) * NS_PER_MS)
        feed.lost(T0 + 82_000)
        feed.connected()
        for t in range(T0 + 83_100, T0 + 83_900, 100):
            feed.at(t, xq(t, x=2))
        after = Feed(resume=feed.resume(), streams=("XT", "XQ"))
        after.at(T0 + 85_000, xt(T0 + 85_000), xq(T0 + 85_000, x=2))
        after.flush(T0 + 86_000)
        for partition in range(8):
            stall, rest = [gap[:2] for one in (feed, after) for gap in marked(one, partition) if "XT" in gap[2]]
            assert stall == (69_750, 83_100)
            assert rest == (83_100, 85_000)

    def test_a_gap_that_stands_in_some_partitions_only_is_marked_in_the_others_by_who_goes_on(self) -> None:
        """Killed while its last round was on its way; a standby goes on, without its journal."""
        feed = without_trades()
        for t in range(T0 + 107_000, T0 + 107_500, 100):
            feed.at(t, xt(t), xq(t, x=2))
        feed.flush(T0 + 107_600)
        gap = next(n for n, record in enumerate(feed.records) if record.kind == "gap" and b'"silence"' in record.value)
        feed.records = [r for n, r in enumerate(feed.records) if n < gap or r.partition in (0, 1)]
        after = Feed(resume=feed.resume(), streams=("XT", "XQ"))
        after.at(T0 + 109_000, xt(T0 + 109_000), xq(T0 + 109_000, x=2))
        after.flush(T0 + 112_000)
        for partition in range(2, 8):
            since = min(since for since, _, of, _ in marked(after, partition) if "XT" in of)
            assert 98_000 < since < 99_000

    def test_a_silence_may_be_closed_as_empty_with_the_stretch_of_its_gap_but_not_while_another_is_pending(
        self,
    ) -> None:
        feed = without_trades()
        feed.at(T0 + 107_000, xt(T0 + 107_000), xq(T0 + 107_000, x=2))
        (suspicion,) = feed.slicer.suspicions()
        assert feed.slicer.suspicions() == []
        now = (T0 + 108_000) * NS_PER_MS
        feed.lost(T0 + 107_500)
        assert not feed.slicer.nothing_missed(suspicion, now)
        feed.connected()
        feed.at(T0 + 108_000, xt(T0 + 108_000))
        feed.until(T0 + 109_000)
        assert feed.slicer.nothing_missed(suspicion, now + NS_PER_MS)
        feed.take()
        for partition in range(8):
            silence, reconnect, word = [json.loads(r.value) for r in feed.of("gap", partition)][1:]
            assert silence == word | {"reason": "silence"}
            assert (reconnect["reason"], word["reason"]) == ("reconnect", "empty")

    def test_an_exchange_far_ahead_of_one_that_is_late_is_no_leader(self) -> None:
        feed = started()
        for t in range(T0 + 2_250, T0 + 3 * MINUTE, 250):
            feed.at(t, xt(t), *([xt(t - 20_000, x=2, i=f"late{t}")] if t % 1_000 == 0 else []))
        assert quarantined(feed) == []
        assert ticked(feed)[-1] > 3 * MINUTE - 2_000
