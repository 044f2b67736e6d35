"""What a producer made of a feed, against the feed's own record: nothing twice, nothing lost outside a marked
gap, and no gap that is much longer than what was missed."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from aiokafka import TopicPartition

from producers.split import split_frame
from schemas import topics, wire
from schemas.events import NOTHING_MISSED, NS_PER_MS, NS_PER_S
from schemas.partition import partition_of
from schemas.raw import RawRecord, decode_gap_value, from_kafka
from tapedeck import kafka
from tapedeck.settings import Settings

SLACK_NS = 50 * NS_PER_MS  # the feed's clock is the market's, the log's is the newest event's


class SentLine(msgspec.Struct):
    """A line of the feed's record; `clock_ns` is the market's time when it was sent."""

    clock_ns: int
    frame: msgspec.Raw = msgspec.Raw()
    base64: bytes = b""  # bytes that are no JSON array; events may be salvaged from them


class Span(NamedTuple):
    """A marked gap of one partition, ns; `since` is 0 for what was before the recording."""

    since: int
    until: int
    streams: frozenset[str]
    reason: str


class Score(NamedTuple):
    """Totals: events sent, in the log, more often in the log than sent, absent but inside a gap, absent and
    in none (with a few of them), and how many events stand before one that was sent earlier. `gaps` counts
    the marked gaps by reason, and `missed` says of each the first and last time that was missed in it, ns."""

    sent: int
    logged: int
    repeated: int
    in_gaps: int
    lost: int
    examples: list[str]
    disorder: int
    gaps: dict[str, int]
    missed: dict[Span, tuple[int, int] | None]
    marked_s: float
    missed_s: float

    @property
    def excess_s(self) -> float:
        return self.marked_s - self.missed_s


async def raw_log(settings: Settings) -> dict[int, list[RawRecord]]:
    """All records of the raw topic by partition."""
    places = [TopicPartition(settings.topic_prefix + topics.RAW.name, n) for n in range(topics.PARTITIONS)]
    reader = await kafka.consumer(settings, *places)
    found: dict[int, list[RawRecord]] = {place.partition: [] for place in places}
    try:
        ends = await reader.end_offsets(places)
        while sum(map(len, found.values())) < sum(ends.values()):
            for place, records in (await reader.getmany(timeout_ms=500)).items():
                found[place.partition] += [from_kafka(r.partition, r.timestamp, r.headers, r.value) for r in records]
    finally:
        await reader.stop()
    return found


def spans_of(log: Mapping[int, list[RawRecord]]) -> dict[int, list[Span]]:
    """The marked gaps of each partition, but for those that were closed as empty."""
    spans: dict[int, list[Span]] = defaultdict(list)
    for partition, records in log.items():
        for record in records:
            if record.kind == "gap":
                gap = decode_gap_value(record.value)
                until = record.timestamp_ms * NS_PER_MS if gap.to is None else gap.to
                spans[partition].append(Span(gap.from_ or 0, until, frozenset(gap.streams), gap.reason))
        closed = {span[:3] for span in spans[partition] if span.reason == NOTHING_MISSED}
        spans[partition] = [span for span in spans[partition] if span[:3] not in closed]
    return spans


def score(record: Path, log: Mapping[int, list[RawRecord]]) -> Score:
    """Counts every event that was sent up to the log's end, and adds up the gaps. Of copies that are the same to
    the byte, and not all there, those that were sent in a gap are the absent ones."""
    logged: Counter[bytes] = Counter()
    for records in log.values():
        for one in records:
            if one.kind == "slice":
                logged.update(item.data for item in split_frame(one.value))
    events = list(_sent(record))  # once, for the feed may be writing on
    copies = Counter(data for _, data, _ in events)
    absent = copies - logged
    spans = spans_of(log)
    place = {data: 0 for data, count in logged.items() if count == copies[data] == 1}
    end = max((one.timestamp_ms for records in log.values() for one in records), default=0) * NS_PER_MS
    sent = in_gaps = 0
    times: dict[Span, list[int]] = defaultdict(list)
    outside: dict[bytes, int] = {}
    for clock, data, head in events:
        if absent[data]:
            if clock > end:
                absent[data] -= 1
                continue
            within = [
                span
                for span in spans[partition_of(head.pair)]
                if head.ev in span.streams and span.since - SLACK_NS <= clock <= span.until + SLACK_NS
            ]
            for span in within:
                times[span].append(clock)
            if within:
                absent[data] -= 1
                in_gaps += 1
            else:
                outside[data] = clock
        sent += 1
        if data in place:
            place[data] = sent
    lost = +absent
    examples = [f"{outside[data]} {data[:120].decode()}" for data in lost]
    known = {span for each in spans.values() for span in each if span.since and span.reason != "stop"}
    missed = {span: (min(times[span]), max(times[span])) if span in times else None for span in known}
    return Score(
        sent,
        logged.total(),
        (logged - copies).total(),
        in_gaps,
        lost.total(),
        examples[:5],
        _disorder(log, place),
        dict(Counter(span.reason for span in known)),
        missed,
        *marked_and_missed(missed),
    )


def marked_and_missed(gaps: Mapping[Span, tuple[int, int] | None]) -> tuple[float, float]:
    """Seconds that the gaps cover, and that what was missed in them does."""
    marked = _union((span.since, span.until) for span in gaps)
    return marked / NS_PER_S, _union(missed for missed in gaps.values() if missed) / NS_PER_S


def _disorder(log: Mapping[int, list[RawRecord]], place: Mapping[bytes, int]) -> int:
    """`place`: when each event was sent, of those that are in the log once."""
    count = 0
    for records in log.values():
        latest, numbers = 0, (0, 0)
        for record in records:
            count += (record.epoch, record.n) < numbers
            numbers = (record.epoch, record.n)
            if record.kind == "slice":
                for item in split_frame(record.value):
                    at = place.get(item.data, latest)
                    count += at < latest
                    latest = max(latest, at)
    return count


def _sent(record: Path) -> Iterable[tuple[int, bytes, wire.Head]]:
    decode = msgspec.json.Decoder(SentLine).decode
    with record.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                continue  # torn by a kill, and so never sent
            sent = decode(line)
            for item in split_frame(bytes(sent.frame) or sent.base64):
                if item.head is not None and item.head.ev in wire.STREAMS:
                    yield sent.clock_ns, item.data, item.head


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """The length of what at least one of them covers."""
    length, reached = 0, 0
    for since, until in sorted(spans):
        length += max(0, until - max(since, reached))
        reached = max(reached, until)
    return length
