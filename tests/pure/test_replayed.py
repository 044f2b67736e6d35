"""What a filtered replay leaves out takes a number all the same, and what it keeps keeps its bytes."""

from collections.abc import AsyncIterator

import pytest

from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from producers.replay import Stretch
from producers.replayed import filtered, has_event, symbol_of
from schemas import rest, topics, wire
from schemas.raw import RawRecord
from tapedeck.history import Entry

SYMBOLS = frozenset({"BTC-USD"})
OUT = wire.LEFT_OUT


def of(value: bytes, kind: str = "slice") -> bytes | None:
    record = RawRecord(1, 0, kind, 1, 0, [(0, 1)], value)
    return filtered(record.headers(), value, SYMBOLS)


@pytest.mark.parametrize(
    ("value", "after"),
    [
        (
            b'[{"ev":"XT", "pair":"X:BTCUSD"},{"ev":"XT","pair":"ETH-USD"}]',
            b'[{"ev":"XT", "pair":"X:BTCUSD"},' + OUT + b"]",
        ),
        (b'[{"ev":"XQ","pair":"eth-usd","p":1E+3}]', b"[" + OUT + b"]"),
        (b'[ {"ev":"XQ","pair":"BTC-USD","p":1E+3} ]', b'[ {"ev":"XQ","pair":"BTC-USD","p":1E+3} ]'),
        # What names no pair stays: it may be anybody's.
        (b'[null,5,{"ev":"XT"},{"ev":"XT","pair":7}]', b'[null,5,{"ev":"XT"},{"ev":"XT","pair":7}]'),
        (b"no array", b"no array"),
        (b"", b""),
    ],
)
def test_events_of_other_pairs_are_left_out(value: bytes, after: bytes) -> None:
    assert of(value) == after
    assert of(value, "bad") == value


def test_what_names_no_pair_is_no_event_of_one() -> None:
    assert has_event(b'[{"ev":"XT","pair":"ETH-USD"},{"ev":"XT","pair":"X:BTCUSD"}]', SYMBOLS)
    for value in (b'[null,{"ev":"XT"},{"ev":"XT","pair":"ETH-USD"}]', b'{"fresh":[]}', b"[]", b"", None):
        assert not has_event(value, SYMBOLS)


def test_the_pipeline_counts_what_was_left_out_and_says_nothing_of_it() -> None:
    pipeline = Pipeline(1, PipelineSettings())
    record = RawRecord(1, 1_732_200_000_000, "slice", 1, 0, [(0, 3)], b"[" + b",".join([OUT] * 3) + b"]", b"replay")
    assert pipeline.process(record) == []
    assert pipeline.counts == {"take": 1, "left_out": 3}


def test_groups_of_rest_go_by_their_pair() -> None:
    groups = [rest.records_of(1, pair, 1_732_200_000_000_000_000, "trades", [], 1) for pair in ("X:BTC-USD", "ETH-USD")]
    assert [symbol_of(headers) in SYMBOLS for ((headers, _),) in groups] == [True, False]
    assert symbol_of([("kind", b"something else")]) is None


class Middle:
    """The end of a log: somebody else's record with the headers of ours, as far as they went, then two of ours."""

    begin, end = 5, 8

    async def first_since(self, timestamp_ms: int) -> int:
        return timestamp_ms

    async def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        headers = RawRecord(1, 0, "slice", 1, 7, [(0, 1)], b"[null]").headers()
        yield [Entry(1, offset, offset, None, headers[2 if offset == 5 else 0 :], b"[null]") for offset in range(5, 8)]


async def test_the_first_record_of_ours_says_that_the_log_begins_in_its_middle() -> None:
    stretch = Stretch(topics.RAW, ("replay.raw.crypto.v1", 1), Middle(), 5, 8)
    assert await stretch.fill()
    assert stretch.lacks
    _, turn = stretch.take(9, frozenset())
    assert [dict(entry.headers)["src"] for entry in turn.entries] == [b"ws", b"replay-begins", b"replay"]


class Backwards:
    """Two batches: the second begins with a record that is older than the last of the first."""

    begin, end = 0, 4

    async def first_since(self, timestamp_ms: int) -> int:
        return 0

    async def batches(self, first: int, end: int) -> AsyncIterator[list[Entry]]:
        for times in ((10, 20), (15, 30)):
            yield [Entry(1, times[0] // 15 * 2 + n, ms, None, [], b"[null]") for n, ms in enumerate(times)]


async def test_a_record_is_played_no_earlier_than_those_before_it() -> None:
    stretch = Stretch(topics.RAW, ("replay.raw.crypto.v1", 1), Backwards(), 0, 4)
    turns = []
    while await stretch.fill():
        turns += stretch.take(99, frozenset())[1].times
    assert turns == [10, 20, 20, 30]
