"""The demo's accounting: an absent event is excused by a gap that names it, and by no other."""

from collections import Counter

import pytest

from schemas.events import NS_PER_MS, Gap
from schemas.partition import partition_of
from tapedeck.demo.reconcile import Reconciler, Tables

from .feed import T0, xa, xq, xt

EMPTY = Tables({}, Counter(), Counter(), {})


def gap(streams: list[str], pairs: list[str], partition: int = 1) -> Gap:
    """Ten seconds from T0 on."""
    return Gap(T0 * NS_PER_MS, (T0 + 10_000) * NS_PER_MS, streams, pairs, "reconnect", 1, partition, 0)


def left_over(event: bytes, marked: Gap) -> int:
    """How many of one event, sent 5 s after T0 and stored nowhere, are not accounted for."""
    reconciler = Reconciler(EMPTY, [marked], [], [], 0)
    reconciler.line(b'{"clock_ns":%d,"frame":[%s]}' % ((T0 + 5_000) * NS_PER_MS, event))
    report = reconciler.report()
    assert report.left_over.total() + report.in_gaps.total() == 1
    return report.left_over.total()


@pytest.mark.parametrize("event", [xt(T0 + 5_000), xq(T0 + 5_000), xa(T0 - 60_000)])
def test_a_gap_over_all_streams_and_pairs_excuses_everything_in_its_partition(event: bytes) -> None:
    for partition in range(8):
        mine = partition == partition_of("BTC-USD")
        assert left_over(event, gap(["XT", "XQ", "XA"], ["*"], partition)) == (not mine)


def test_it_excuses_only_the_streams_and_pairs_that_it_names() -> None:
    assert not left_over(xt(T0 + 5_000), gap(["XT"], ["BTC-USD", "ETH-USD"]))
    assert left_over(xq(T0 + 5_000), gap(["XT"], ["*"]))
    assert left_over(xt(T0 + 5_000), gap(["XT", "XQ"], ["ETH-USD"]))


def test_an_aggregate_of_a_second_is_another_stream_than_that_of_a_minute() -> None:
    second = xa(T0).replace(b'"XA"', b'"XAS"')
    assert not left_over(second, gap(["XAS"], ["*"]))
    assert left_over(second, gap(["XA"], ["*"]))
