"""What is usual for a stream is learned: no fixed timer tells a quiet pair from a stalled feed."""

from itertools import accumulate

import pytest

from producers.rhythm import Rhythm
from schemas.events import NS_PER_S

FLOOR = 10 * NS_PER_S


def heard(*spells_s: float) -> tuple[Rhythm, int]:
    """A rhythm after frames that far apart, and the time of the last."""
    rhythm = Rhythm(FLOOR)
    rhythm.listen(0)
    times = [round(at * NS_PER_S) for at in accumulate(spells_s)]
    for at in times:
        rhythm.heard(at)
    return rhythm, times[-1]


def test_a_busy_stream_is_overdue_after_the_floor_and_a_quiet_one_is_not() -> None:
    for spells, usual_s in (([0.05] * 400, 10), ([60] * 20, 240)):
        for more, overdue in ((0, False), (1, True)):
            rhythm, now = heard(*spells)
            assert rhythm.overdue(now + usual_s * NS_PER_S + more) == overdue


def test_aggregates_that_come_in_a_burst_each_minute_are_quiet_for_a_minute() -> None:
    minutes, now = heard(*([60] + [0.01] * 20) * 5)
    assert not minutes.overdue(now + 90 * NS_PER_S)


def test_nothing_is_judged_before_enough_was_heard() -> None:
    """A burst on a quiet pair right at the beginning must not pass for its habit."""
    few, now = heard(0.1, 0.1, 0.1)
    assert not few.overdue(now + 3600 * NS_PER_S)
    burst, now = heard(*[0.01] * 50)
    assert not burst.overdue(now + 3600 * NS_PER_S)
    assert not burst.suspect(now + 3600 * NS_PER_S)


def test_a_calm_hour_ago_is_forgotten() -> None:
    rhythm, _ = heard(120, 120, *[1] * 6000)
    assert rhythm.longest_ns == NS_PER_S


def test_a_silence_that_ended_by_itself_is_suspect_when_it_is_beyond_all_experience() -> None:
    rhythm, now = heard(*[0.1] * 700)
    assert not rhythm.heard(now + NS_PER_S)
    assert rhythm.heard(now + 6 * NS_PER_S)
    assert not rhythm.heard(now + 11 * NS_PER_S), "by now it is a habit"
    young, now = heard(*[0.1] * 500)
    assert not young.heard(now + 6 * NS_PER_S)


def test_one_stall_does_not_hide_the_next_but_what_happens_again_and_again_becomes_a_habit() -> None:
    rhythm, now = heard(*[0.01] * 7_000)
    suspected = []
    for _ in range(12):
        now += 5 * NS_PER_S
        suspected.append(rhythm.heard(now))
        for _ in range(100):
            now += NS_PER_S // 100
            rhythm.heard(now)
    assert suspected == [True] * 7 + [False] * 5


def test_our_own_absence_is_no_silence_of_the_feed() -> None:
    rhythm, now = heard(*[1] * 30)
    rhythm.listen(now + 600 * NS_PER_S)
    rhythm.heard(now + 601 * NS_PER_S)
    assert rhythm.longest_ns == NS_PER_S


def test_the_first_event_after_a_reconnect_is_suspect_when_it_was_long_in_coming_and_no_habit() -> None:
    for after_s, suspect in ((1.9, False), (2.1, True)):
        rhythm, now = heard(*[1] * 70)
        rhythm.listen(now + 600 * NS_PER_S)
        assert rhythm.heard(now + 600 * NS_PER_S + round(after_s * NS_PER_S)) == suspect
        assert rhythm.longest_ns == NS_PER_S
    young, now = heard(*[1] * 30)
    young.listen(now)
    assert not young.heard(now + 9 * NS_PER_S)


def test_a_stream_that_was_lively_before_a_restart_is_judged_at_once_until_it_has_learned_otherwise() -> None:
    rhythm = Rhythm(FLOOR, lively=True)
    rhythm.listen(0)
    assert rhythm.suspect(NS_PER_S)
    now, suspected = 0, []
    for _ in range(8):
        now += 9 * NS_PER_S
        suspected.append(rhythm.heard(now))
    assert suspected == [True] * 3 + [False] * 5


def test_silence_before_a_loss_is_suspect_when_it_is_longer_than_any() -> None:
    rhythm, now = heard(*[1] * 30)
    assert not rhythm.suspect(now + 2 * NS_PER_S)
    assert rhythm.suspect(now + 2 * NS_PER_S + 1)


class TestFrozen:
    """The process was stopped for a while, and what came meanwhile waits in its socket."""

    def watched(self) -> tuple[Rhythm, int]:
        rhythm, now = Rhythm(NS_PER_S), 0
        rhythm.listen(now)
        for number in range(300):
            now += NS_PER_S // 100
            rhythm.heard(now)
            if number % 50 == 0:
                assert not rhythm.overdue(now)
        return rhythm, now

    def test_it_does_not_take_its_own_absence_for_a_stall_and_gives_up_what_waits(self) -> None:
        rhythm, now = self.watched()
        assert not rhythm.overdue(now + 5 * NS_PER_S)
        assert not rhythm.overdue(now + 5.9 * NS_PER_S)
        assert rhythm.overdue(now + 6.5 * NS_PER_S)  # nothing waited: silent for more than a second since

    @pytest.mark.parametrize("looks_first", [True, False])
    def test_nor_for_a_habit_of_the_stream_behind_which_a_stall_could_hide(self, looks_first: bool) -> None:
        rhythm, now = self.watched()
        now += 5 * NS_PER_S
        if looks_first:
            rhythm.overdue(now)
        rhythm.heard(now)
        assert rhythm.usual_ns <= 2 * NS_PER_S
        for _ in range(6):
            overdue, now = rhythm.overdue(now), now + NS_PER_S // 2
        assert overdue


def test_a_stream_that_connecting_anew_does_not_mend_costs_the_others_ever_less() -> None:
    rhythm, now = heard(*[1] * 60)
    waits = []
    for _ in range(4):
        rhythm.listen(now)
        began = now
        while not rhythm.overdue(now):
            now += NS_PER_S // 2
        waits.append((now - began) // NS_PER_S)
    assert waits == [10, 20, 40, 80]
    rhythm.heard(now)
    assert rhythm.overdue(now + 11 * NS_PER_S) is False  # first asked: it looks from here
    rhythm.listen(now)
    assert not rhythm.overdue(now + FLOOR)


def test_the_wait_for_a_streams_first_event_is_no_habit_of_it() -> None:
    """A feed of aggregates that begins 12 s before the minute ends must not think a minute's silence a stall."""
    rhythm = Rhythm(FLOOR)
    rhythm.listen(0)
    now = 12 * NS_PER_S
    for minute in range(5):
        for frame in range(12):
            rhythm.heard(now + minute * 60 * NS_PER_S + frame * NS_PER_S // 100)
        for second in range(1, 60):
            assert not rhythm.overdue(now + (minute * 60 + second) * NS_PER_S)
