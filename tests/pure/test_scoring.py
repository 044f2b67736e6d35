"""The score of a producer's log: what it calls lost, repeated and in a gap."""

from pathlib import Path

from bench.scoring import Score, score
from producers.slicer import Resume
from schemas.events import NS_PER_MS

from .feed import LATENCY_MS, T0, Feed, xa, xt

MINUTE = 60_000


def scored(tmp_path: Path, sent: list[tuple[int, bytes]], feed: Feed) -> Score:
    """`sent`: ms of feed time and event."""
    record = tmp_path / "sent.ndjson"
    lines = (b'{"clock_ns":%d,"frame":[%s]}\n' % (ms * NS_PER_MS, event) for ms, event in sent)
    record.write_bytes(b"".join(lines))
    log = {p: [r for r in feed.records if r.partition == p] for p in range(8)}
    return score(record, log)


def with_a_gap(sent: list[tuple[int, bytes]], from_ms: int, until_ms: int) -> Feed:
    """What a producer makes of these when its connection is gone between two times."""
    resume = Resume(1, T0 - 1_000, (T0 - 1_000) * NS_PER_MS, [T0 - 1_000] * 8)
    feed = Feed(resume=resume)
    for ms, event in sent:
        if ms < from_ms:
            feed.frame(ms + LATENCY_MS, event)
    feed.lost(from_ms + LATENCY_MS)
    feed.connected()
    for ms, event in sent:
        if ms >= until_ms:
            feed.frame(ms + LATENCY_MS, event)
    feed.flush(sent[-1][0] + LATENCY_MS + 3_000)
    return feed


def trades(*times: int) -> list[tuple[int, bytes]]:
    return [(T0 + t, xt(T0 + t)) for t in times]


def test_what_is_absent_lies_in_a_gap_or_is_lost(tmp_path: Path) -> None:
    sent = trades(*range(0, 20_000, 250))
    feed = with_a_gap(sent, T0 + 5_000, T0 + 8_000)
    found = scored(tmp_path, sent, feed)
    assert (found.sent, found.logged, found.in_gaps) == (80, 68, 12)
    assert found.lost == found.repeated == found.disorder == 0
    hidden = (T0 + 10_100, xt(T0 + 10_100, i="hidden"))
    found = scored(tmp_path, sorted([*sent, hidden]), feed)
    assert found.lost == 1
    assert "hidden" in found.examples[0]


def test_one_more_in_the_log_than_was_sent_is_repeated(tmp_path: Path) -> None:
    sent = trades(*range(0, 5_000, 250))
    more = with_a_gap([*sent[:-1], sent[-2]], T0 + 2_000, T0 + 2_000)
    found = scored(tmp_path, sent[:-1], more)
    assert found.repeated == 1


def test_of_two_copies_the_one_that_was_sent_in_a_gap_is_the_absent_one(tmp_path: Path) -> None:
    """A vendor sends an aggregate again, and only the first was missed."""
    twice = xa(T0 - MINUTE)
    sent = sorted([*trades(*range(0, 20_000, 250)), (T0 + 6_010, twice), (T0 + 12_010, twice)])
    found = scored(tmp_path, sent, with_a_gap(sent, T0 + 5_000, T0 + 8_000))
    assert found.in_gaps == 13
    assert found.lost == found.repeated == found.disorder == 0
    found = scored(tmp_path, sorted([*sent, (T0 + 12_020, twice)]), with_a_gap(sent, T0 + 5_000, T0 + 8_000))
    assert found.lost == 1
