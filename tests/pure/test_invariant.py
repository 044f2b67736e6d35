"""The invariant: every output is a function of the log, whatever way it was cut, sent, replayed or rebuilt.

The model in logs.py makes the logs. What cost the design a counterexample stands here by name, as a case of
its own; rules 1 to 4 have theirs in test_feed_clock.py and test_slicer.py too.
"""

import json
from collections.abc import Coroutine, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from processors import pipeline
from processors.compute import FILES, compute
from processors.pipeline import Output, Pipeline
from processors.rebuild import replay
from processors.settings import PipelineSettings
from processors.stages import RAW
from schemas import raw, topics
from schemas.events import MINUTE_NS, NS_PER_MS
from schemas.raw import RawRecord, log_line, read_log

from . import logs
from .feed import Feed, through, xt
from .logs import (
    CALM,
    HOUR,
    MINUTE,
    PARTITION,
    SETTINGS,
    START_MS,
    Crash,
    Fault,
    Hush,
    MemoryLog,
    Sent,
    Step,
    Trade,
    Trouble,
    Wait,
    Zombie,
    contents,
    cut,
    epochs_of,
    outputs_of,
    scripts,
    send,
)

RUN_IN = 40  # records: twice what the model ever has in flight, and far less than its logs are long
SHORT = SETTINGS[1]  # remembers ten minutes and not forty
T = TypeVar("T")

some_settings = st.sampled_from(SETTINGS)
lives = st.one_of(*[logs.market] * 8, logs.crashes)


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")


def rebuilt(
    log: Sequence[RawRecord], offset: int, settings: PipelineSettings, begin: int = 0, run_in: int = RUN_IN
) -> Pipeline:
    """The pipeline as processors.rebuild makes it, of a log whose offsets before `begin` are gone."""
    stage = RAW._replace(run_in=run_in)
    state = now(replay(MemoryLog(log, begin), stage, PARTITION, settings, offset))
    assert isinstance(state, Pipeline)
    return state


def assert_rebuilds(log: Sequence[RawRecord], settings: PipelineSettings, run_in: int = RUN_IN) -> None:
    """A rebuild at every offset has the whole state of one pass."""
    one_pass = Pipeline(PARTITION, settings)
    for offset, record in enumerate(log):
        state = rebuilt(log, offset, settings, run_in=run_in).state()
        assert state == one_pass.state(), f"rebuilt at offset {offset}"
        one_pass.process(record)


def sent(script: Sequence[Step], *trouble: Trouble, lengths: Sequence[int] = (1,)) -> Sent:
    return send(cut(epochs_of(script), lengths), trouble or [CALM])


def values(outputs: Sequence[Output], topic: topics.Topic) -> list[dict[str, Any]]:
    return [json.loads(output.value) for output in outputs if output.topic == topic.name]


def troubled(*faults: Fault, end: Fault | None = None, zombies: Sequence[Zombie] = ()) -> Trouble:
    return Trouble(list(faults), end, list(zombies))


class TestEveryLog:
    @given(scripts(lives), logs.lengths, logs.lengths, some_settings)
    def test_any_cut_into_records_gives_the_same_outputs(
        self, script: list[Step], one: list[int], other: list[int], settings: PipelineSettings
    ) -> None:
        epochs = epochs_of(script)
        pipelines = [Pipeline(PARTITION, settings) for _ in range(2)]
        made = [
            contents([o for epoch in cut(epochs, lengths) for record in epoch for o in pipeline.process(record)])
            for pipeline, lengths in zip(pipelines, (one, other), strict=True)
        ]
        assert made[0] == made[1]
        assert contents(pipelines[0].close()) == contents(pipelines[1].close())

    @given(scripts(lives), logs.lengths, logs.troubles, some_settings)
    def test_what_was_resent_overtaken_or_sent_by_a_zombie_changes_no_output(
        self, script: list[Step], lengths: list[int], trouble: list[Trouble], settings: PipelineSettings
    ) -> None:
        log = send(cut(epochs_of(script), lengths), trouble)
        outputs = outputs_of(log.log, settings)
        if not log.holes:
            assert outputs == outputs_of(log.clean, settings)
        marked = [gap for gap in values(outputs, topics.GAPS) if gap["reason"] == "hole"]
        assert [(gap["from"], gap["to"], gap["epoch"], gap["n"]) for gap in marked] == [
            (None if since is None else since * NS_PER_MS, after.timestamp_ms * NS_PER_MS, after.epoch, 0)
            for since, after in log.holes
        ]

    @given(scripts(lives, 150), logs.lengths, logs.troubles, some_settings)
    def test_a_rebuild_at_any_offset_has_the_whole_state_of_one_pass(
        self, script: list[Step], lengths: list[int], trouble: list[Trouble], settings: PipelineSettings
    ) -> None:
        assert_rebuilds(send(cut(epochs_of(script), lengths), trouble).log, settings)

    @given(scripts(lives, 150), logs.lengths, logs.troubles, some_settings, st.integers(0, 1_000))
    def test_after_a_rebuild_all_later_outputs_are_those_of_one_pass(
        self,
        script: list[Step],
        lengths: list[int],
        trouble: list[Trouble],
        settings: PipelineSettings,
        at: int,
    ) -> None:
        log = send(cut(epochs_of(script), lengths), trouble).log
        offset = at % len(log)
        one_pass, other = Pipeline(PARTITION, settings), rebuilt(log, offset, settings)
        for record in log[:offset]:
            one_pass.process(record)
        for record in log[offset:]:
            assert one_pass.process(record) == other.process(record)
        assert contents(one_pass.close()) == contents(other.close())

    @given(scripts(lives, 150), logs.lengths, logs.troubles, some_settings, st.integers(1, 1_000))
    def test_a_log_whose_beginning_is_gone_is_taken_up_again(
        self,
        script: list[Step],
        lengths: list[int],
        trouble: list[Trouble],
        settings: PipelineSettings,
        begin: int,
    ) -> None:
        """Whatever stands first, a zombie's record or one that overtook: it gets in step and stays so."""
        log = send(cut(epochs_of(script), lengths), trouble).log
        begin = begin % len(log)
        whole, taken_up = Pipeline(PARTITION, settings), rebuilt(log, begin, settings, begin)
        for offset, record in enumerate(log):
            before = whole.counts["take"], taken_up.counts["take"]
            whole.process(record)
            if offset >= begin:
                taken_up.process(record)
            if offset >= begin + RUN_IN:
                assert whole.counts["take"] - before[0] == taken_up.counts["take"] - before[1], offset

    @given(scripts(lives), logs.lengths, logs.troubles, some_settings)
    def test_live_and_a_log_file_and_a_replay_of_it_agree(
        self, script: list[Step], lengths: list[int], trouble: list[Trouble], settings: PipelineSettings
    ) -> None:
        log = send(cut(epochs_of(script), lengths), trouble).log
        lines = [
            log_line(record.partition, offset, record.timestamp_ms, record.headers(), record.value)
            for offset, record in enumerate(log)
        ]
        read = [(line.offset, record) for line, record in read_log(lines)]
        assert [record for _, record in read] == log
        live: dict[str, bytes] = {
            FILES[stage_one]: b"" for stage_one in FILES.keys() - {t.name for t in topics.ROLLUPS.values()}
        }
        for output in outputs_of(log, settings):
            live[FILES[output.topic]] += output.value + b"\n"
        replayed = [(offset, record._replace(src="replay")) for offset, record in read]
        with TemporaryDirectory() as folder:
            for number, records in enumerate((read, replayed)):
                out = Path(folder, str(number))
                compute(records, out, settings, close=False)
                rollups = {FILES[topic.name] for topic in topics.ROLLUPS.values()}
                made = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in rollups}
                assert made == live

    @given(scripts(lives), logs.lengths, logs.troubles, some_settings, st.integers(1, 1_000))
    def test_a_replay_that_began_in_the_middle_gives_what_the_log_from_there_on_gives(
        self, script: list[Step], lengths: list[int], trouble: list[Trouble], settings: PipelineSettings, at: int
    ) -> None:
        log = send(cut(epochs_of(script), lengths), trouble).log
        first = at % len(log)
        original = Pipeline(PARTITION, settings, RUN_IN, lost=True)
        wanted = [output for record in log[first:] for output in original.process(record)]
        src = [raw.REPLAY_BEGINS] + [raw.REPLAY] * len(log)
        played = [record._replace(src=src) for record, src in zip(log[first:], src, strict=False)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "RUN_IN_RECORDS", RUN_IN)  # as in the rebuild
            assert outputs_of(played, settings) == wanted
            offset = len(played) * 2 // 3
            one_pass = Pipeline(PARTITION, settings)
            for record in played[:offset]:
                one_pass.process(record)
            assert rebuilt(played, offset, settings).state() == one_pass.state()


class TestTheCounterexamples:
    """Each broke a version of the design; the numbers are those of the fine print."""

    def test_1_a_first_event_from_2099_does_not_stick(self) -> None:
        t = START_MS
        feed = Feed()
        feed.at(t, xt(4_070_908_800_000, x=3), xt(t), xt(t, x=2))
        for ms in range(t + 250, t + 130_000, 1_000):
            feed.at(ms, xt(ms), xt(ms, x=2))
        feed.flush(t + 131_000)
        outputs = through(feed.records)
        assert [event["ts_event"] for event in values(outputs, topics.QUARANTINE)] == [4_070_908_800_000 * NS_PER_MS]
        assert {bar["start"] for bar in values(outputs, topics.BARS_1M) if bar["kind"] == "bar"} == {
            t * NS_PER_MS,
            t * NS_PER_MS + MINUTE_NS,
        }

    def test_1_a_good_trade_after_a_real_silence_is_no_ones_quarantine(self) -> None:
        t = START_MS
        feed = Feed()
        for ms in (t, t + 500, t + 3 * HOUR, t + 3 * HOUR + 400):
            feed.at(ms, xt(ms), xt(ms, x=2))
        feed.flush(t + 3 * HOUR + 1_000)
        outputs = through(feed.records)
        assert values(outputs, topics.QUARANTINE) == []
        assert [trade["flags"] for trade in values(outputs, topics.TRADES)] == [[]] * 8

    def test_1_one_bad_exchange_with_two_pairs_does_not_confirm_itself(self) -> None:
        t = START_MS
        feed = Feed()
        for ms in range(t, t + 2_000, 250):
            feed.at(ms, xt(ms), xt(ms, x=2))
        feed.at(t + 2_010, xt(t + 50_000, x=3), xt(t + 50_000, x=3, pair="SOL-USD"))
        for ms in range(t + 2_250, t + 6_000, 250):
            feed.at(ms, xt(ms), xt(ms, x=2))
        feed.flush(t + 6_100)
        outputs = through(feed.records)
        assert [event["symbol"] for event in values(outputs, topics.QUARANTINE)] == ["BTC-USD", "SOL-USD"]
        assert all("late" not in trade["flags"] for trade in values(outputs, topics.TRADES))

    def test_3_a_slice_that_would_linger_past_a_tick(self) -> None:
        """Its events were quarantined or not, depending on how long it lingered."""
        script: list[Step] = [
            Wait(600),
            Trade(-9_900),
            Wait(30),
            Trade(-10_000),
            Trade(-10_001),
            Wait(400),
            Trade(-10_000),
        ]
        made = [contents(outputs_of(sent(script, lengths=[n]).log, SHORT)) for n in (1, 2, 100)]
        assert made[0] == made[1] == made[2]

    def test_4_a_gap_that_ends_a_silence_in_which_bars_were_open(self) -> None:
        script: list[Step] = [
            Trade(),
            Wait(5_000),
            Trade(),
            Hush(3 * HOUR, 3 * HOUR),
            Trade(),
            Trade(3 * HOUR),
            Wait(MINUTE),
        ]
        log = sent(script).log
        bars = [bar for bar in values(outputs_of(log, SHORT), topics.BARS_1M) if bar["kind"] == "bar"]
        assert [(bar["trade_count"], "gap" in bar["flags"]) for bar in bars] == [(2, True), (1, True)]
        assert_rebuilds(log, SHORT, run_in=1)

    def test_5_and_6_a_rebuild_whose_first_tick_is_not_in_what_it_reads(self) -> None:
        """Without a last tick an event for 2099 was accepted for good."""
        script: list[Step] = [
            Wait(20 * MINUTE),
            Trade(),
            Trade(-75 * 365 * 24 * HOUR),
            Trade(),
            Wait(20 * MINUTE),
            Trade(),
        ]
        log = sent(script).log
        assert_rebuilds(log, SHORT, run_in=1)
        (event,) = values(outputs_of(log, SHORT), topics.QUARANTINE)
        middle = [record.kind for record in log].index("slice") + 1
        state = rebuilt(log, middle, SHORT, begin=middle - 1, run_in=1)
        (output,) = state.process(log[middle])
        assert json.loads(output.value)["ts_event"] == event["ts_event"]

    def test_7_an_id_that_comes_back_with_another_time(self) -> None:
        """It was dropped or not, depending on where the rebuild began."""
        script: list[Step] = [
            Trade(id=1),
            Wait(MINUTE),
            Trade(id=1),
            Trade(MINUTE, id=1),
            Wait(5 * MINUTE),
            Trade(id=1),
            *[Wait(MINUTE)] * 6,
            Trade(id=1),
            Trade(2 * MINUTE, id=1),
            Trade(2 * MINUTE + 30_000, id=1),
        ]
        log = sent(script).log
        assert_rebuilds(log, SHORT, run_in=1)
        assert len(values(outputs_of(log, SHORT), topics.TRADES)) == 6  # the third is the first one again

    def test_5_what_was_deleted_before_it_was_read_is_a_gap(self) -> None:
        """A silent skip left whole bars that were not."""
        script: list[Step] = [Trade(), Wait(5 * MINUTE), Trade(1_000), Trade(), Wait(MINUTE), Trade(), Wait(2 * MINUTE)]
        log = sent(script).log
        begin = [record.kind for record in log].index("slice", 3)
        state = rebuilt(log, begin, SHORT, begin)
        outputs = [output for record in log[begin:] for output in state.process(record)]
        (gap,) = values(outputs, topics.GAPS)
        at = log[begin].timestamp_ms * NS_PER_MS
        assert (gap["from"], gap["to"], gap["reason"], gap["n"]) == (None, at, "log", log[begin].n)
        bars = [bar for bar in values(outputs, topics.BARS_1M) if bar["kind"] == "bar"]
        assert [bar["flags"] for bar in bars] == [["partial", "gap"], []]
        for offset in range(begin + 1, len(log)):
            one_pass = rebuilt(log, begin, SHORT, begin)
            for record in log[begin:offset]:
                one_pass.process(record)
            assert rebuilt(log, offset, SHORT, begin).state() == one_pass.state()

    def test_5_a_late_trade_for_a_minute_from_before_the_deleted_stretch_makes_no_bar(self) -> None:
        """It would make one of itself alone, with a higher revision than the true bar that was told before."""
        script: list[Step] = [Trade(), Wait(3 * MINUTE), Trade(), Trade(2 * MINUTE), Wait(3 * MINUTE)]
        log = sent(script).log
        begin = [record.kind for record in log].index("slice", 2)
        state = rebuilt(log, begin, SETTINGS[0], begin)
        outputs = [output for record in log[begin:] for output in state.process(record)]
        assert [trade["flags"] for trade in values(outputs, topics.TRADES)] == [[], ["too_late"]]
        assert [bar["trade_count"] for bar in values(outputs, topics.BARS_1M) if bar["kind"] == "bar"] == [1]

    def test_5_nothing_is_lost_where_the_rebuild_need_not_reach_the_logs_beginning(self) -> None:
        log = sent([Trade(), *[Wait(MINUTE)] * 60, Trade(), Wait(MINUTE)]).log
        state = rebuilt(log, len(log) - 1, SHORT, begin=1, run_in=1)
        assert state.state() == rebuilt(log, len(log) - 1, SHORT).state()

    def test_9_a_slice_that_was_overtaken_and_sent_again(self) -> None:
        """A high-water mark lost it."""
        script: list[Step] = [Trade(), Trade(), Trade(), Wait(999), Trade(), Trade(), Wait(2 * MINUTE)]
        for at in range(len(sent(script).clean)):
            for size in (1, 2, 3):
                log = sent(script, troubled(Fault("overtake", at, size)))
                assert outputs_of(log.log, SHORT) == outputs_of(log.clean, SHORT)
                assert_rebuilds(log.log, SHORT)

    def test_9_a_hole_that_is_open_when_the_next_epoch_begins_becomes_a_gap(self) -> None:
        script: list[Step] = [Trade(), Trade(), Wait(999), Trade(), Trade(), Crash(MINUTE), Trade(), Wait(3 * MINUTE)]
        log = sent(script, troubled(end=Fault("hole", 3, 2)))
        (since, after) = log.holes[0]
        outputs = outputs_of(log.log, SHORT)
        (gap,) = [gap for gap in values(outputs, topics.GAPS) if gap["reason"] == "hole"]
        assert since is not None
        assert (gap["from"], gap["to"]) == (since * NS_PER_MS, after.timestamp_ms * NS_PER_MS)
        bars = [bar for bar in values(outputs, topics.BARS_1M) if bar["kind"] == "bar"]
        assert bars[0]["flags"] == ["partial", "gap"]
        assert_rebuilds(log.log, SHORT)

    def test_9_a_hole_is_marked_also_where_the_next_epochs_first_record_was_overtaken(self) -> None:
        script: list[Step] = [Trade(), Trade(), Trade(), Crash(MINUTE), Trade(), Trade(), Wait(3 * MINUTE)]
        trouble = [troubled(end=Fault("hole", 1, 1)), troubled(Fault("overtake", 0, 1))]
        log = sent(script, *trouble)
        gaps = values(outputs_of(log.log, SHORT), topics.GAPS)
        assert [gap["reason"] for gap in gaps] == ["start", "hole", "away"]
        assert_rebuilds(log.log, SHORT)

    def test_9_a_hole_is_marked_also_at_the_beginning_of_the_log(self) -> None:
        log = sent([Trade(), Crash(MINUTE), Trade()], troubled(end=Fault("hole", 0, 1)), CALM)
        gaps = values(outputs_of(log.log, SHORT), topics.GAPS)
        assert [(gap["from"] is None, gap["reason"]) for gap in gaps] == [(True, "hole"), (False, "away")]

    def test_a_rebuild_after_a_silence_where_the_first_record_after_it_overtook_a_failed_one(self) -> None:
        """The time of the record before the offset says nothing about the last one that was taken: bars were
        open when the silence began, and the run-in reaches only the last of their trades."""
        trades = [Trade() for _ in range(30)]
        script: list[Step] = [*trades, Hush(3 * HOUR, 3 * HOUR), Trade(), Trade(), Wait(MINUTE)]
        at = 1 + len(trades)
        for size in (1, 2):
            log = sent(script, troubled(Fault("overtake", at, size)))
            assert log.log[at].timestamp_ms > log.log[at - 1].timestamp_ms + 2 * HOUR
            assert_rebuilds(log.log, SHORT, run_in=8)
            assert outputs_of(log.log, SHORT) == outputs_of(log.clean, SHORT)

    def test_a_rebuild_where_the_run_in_begins_with_a_record_that_overtook_another(self) -> None:
        script: list[Step] = [Trade(), Trade(), Trade(), Hush(3 * HOUR, 3 * HOUR), Trade(), Trade(), Wait(999), Trade()]
        for at in range(1, 6):
            log = sent(script, troubled(Fault("overtake", at, 2), Fault("overtake", at + 1, 1)))
            for run_in in (8, 9, 10, 11, 12):
                assert_rebuilds(log.log, SHORT, run_in=run_in)

    def test_a_rebuild_where_a_new_epoch_begins_out_of_turn_right_before_the_offset(self) -> None:
        script: list[Step] = [Trade(), *[Wait(MINUTE)] * 20, Trade(), Crash(5 * HOUR), Trade(), Trade()]
        log = sent(script, CALM, troubled(Fault("overtake", 0, 2)))
        assert_rebuilds(log.log, SHORT, run_in=8)

    def test_a_log_that_begins_with_a_zombies_record_is_not_stuck(self) -> None:
        """Taken for the current epoch, it made every record of the real one look out of turn, for good."""
        script: list[Step] = [Trade(), Trade(), Crash(MINUTE), Trade(), Trade(), Wait(1_000), Trade()]
        log = sent(script, troubled(zombies=[Zombie(1, 1, 1)])).log
        begin = next(at for at, record in enumerate(log) if at and record.epoch < log[at - 1].epoch)
        state = rebuilt(log, begin, SHORT, begin=begin)
        for record in log[begin:]:
            state.process(record)
        assert state.counts["take"] == len(log) - begin
        assert state.taken_ms == log[-1].timestamp_ms


@given(scripts(logs.market), some_settings)
@example([], SHORT)
def test_running_again_what_was_run_before_gives_the_same_bytes(script: list[Step], settings: PipelineSettings) -> None:
    log = sent(script).log
    assert outputs_of(log, settings) == outputs_of(log, settings)
