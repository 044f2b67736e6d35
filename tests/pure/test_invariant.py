from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import event, given
from hypothesis import strategies as st

from processors.pipeline import Pipeline
from processors.rebuild import replay
from processors.settings import PipelineSettings

from . import logs
from .logs import PARTITION, MemoryLog, contents, cut, epochs_of, outputs_of, scripts, send

RUN_IN = 40
T = TypeVar("T")


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def rebuilt(records, offset: int, settings: PipelineSettings, begin: int = 0, run_in: int = RUN_IN) -> Pipeline:
    return now(replay(MemoryLog(records, begin), PARTITION, settings, offset, run_in))


some_settings = st.sampled_from(logs.SETTINGS)

@given(scripts(logs.market), logs.lengths, logs.lengths, some_settings)
def test_any_cut_into_records_gives_the_same_records(script, one, other, settings):
    epochs = epochs_of(script)
    first, second = (outputs_of((r for e in cut(epochs, lengths) for r in e), settings) for lengths in (one, other))
    assert contents(first) == contents(second)


@given(scripts(st.one_of(logs.market, logs.market, logs.market, logs.market, logs.crashes)), logs.lengths, logs.troubles, some_settings)
def test_troubled(script, lengths, trouble, settings):
    sent = send(cut(epochs_of(script), lengths), trouble)
    troubled = outputs_of(sent.log, settings)
    if not sent.holes:
        assert troubled == outputs_of(sent.clean, settings)
    event(f"holes {bool(sent.holes)}")
    one_pass = Pipeline(PARTITION, settings)
    for offset, record in enumerate(sent.log):
        state = rebuilt(sent.log, offset, settings)
        assert state.state() == one_pass.state(), offset
        one_pass.process(record)
