"""A stretch of history computed anew gives what one pass over the whole log gives."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr
from rich.progress import Progress

from bench.market import write_frames
from processors.compute import run
from processors.recompute import Recomputation
from processors.rollups import DAY_NS
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import rest, topics
from schemas.events import INTERVALS_NS, MINUTE_NS, NS_PER_MS, Bar, decode_bar
from schemas.frames import Frame, read_frames
from schemas.partition import partition_of
from schemas.raw import GapValue, RawRecord
from tapedeck.archive import Archive, table_of
from tapedeck.errors import TapedeckError
from tapedeck.history import Entry
from tapedeck.settings import Settings
from tapedeck.spans import HOUR_MS, Span

BEGIN_MS = 1_723_161_240_000  # a whole minute


def frames(folder: Path, begin_ms: int, seconds: int) -> Iterable[Frame]:
    path = folder / f"{begin_ms}.ndjson"
    write_frames(path, 10, seconds, per_frame=5, begin_ms=begin_ms)
    return read_frames(path)


def archive(settings: Settings, topic: topics.Topic, entries: Iterable[Entry]) -> None:
    """A file for each partition and hour; the offsets are given here."""
    files = Archive(settings)
    groups: dict[tuple[int, int], list[Entry]] = {}
    offsets = [0] * topics.PARTITIONS
    for entry in entries:
        held = groups.setdefault((entry.partition, entry.timestamp_ms // HOUR_MS), [])
        held.append(entry._replace(offset=offsets[entry.partition]))
        offsets[entry.partition] += 1
    for (partition, hour), held in groups.items():
        span = Span(held[0].offset, held[-1].offset + 1, hour, topic.name, partition)
        files.put(span, [table_of(held)])


def archive_feed(settings: Settings, market: Iterable[Frame]) -> list[RawRecord]:
    """The raw log of it."""
    records = list(records_of(market, SlicerSettings(), ["XT", "XQ", "XA"], ["*"]))
    archive_records(settings, records)
    return records


def archive_records(settings: Settings, records: Iterable[RawRecord]) -> None:
    archive(settings, topics.RAW, (Entry(r.partition, 0, r.timestamp_ms, None, r.headers(), r.value) for r in records))


def archive_repair(settings: Settings, at_ms: int, minute: int) -> None:
    """A trade in a minute of BTC-USD, as REST told of it at a time."""
    trade = b'{"participant_timestamp":%d,"price":7,"size":1.25,"exchange":1,"id":"r","conditions":[1]}' % minute
    part, pair = partition_of("BTC-USD"), "BTC-USD"
    archive(
        settings,
        topics.RAW_REST,
        (
            Entry(part, 0, at_ms, None, headers, value)
            for headers, value in rest.records_of(1, pair, minute, "trades", [trade], minute + MINUTE_NS)
        ),
    )


async def recomputed(settings: Settings, wanted: Iterable[topics.Topic], since: int, until: int) -> list[bytes]:
    made = Recomputation(settings, PipelineSettings(), "archive", wanted, since, until)
    return [value async for _, values in made.values(Progress(disable=True)) for value in values]


def ended(values: Iterable[bytes], until: int) -> set[bytes]:
    """The bars that end before."""
    found = ((value, decode_bar(value)) for value in values)
    return {value for value, event in found if isinstance(event, Bar) and event.end <= until}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, archive_url=SecretStr(str(tmp_path / "archive")))


async def test_what_is_open_when_a_long_silence_begins_is_closed_as_it_was(settings: Settings, tmp_path: Path) -> None:
    records = archive_feed(settings, [*frames(tmp_path, BEGIN_MS, 150), *frames(tmp_path, BEGIN_MS + 5 * HOUR_MS, 10)])
    since, until = BEGIN_MS * NS_PER_MS, (BEGIN_MS + HOUR_MS) * NS_PER_MS
    found = await recomputed(settings, [topics.BARS_1M], since, until)
    outputs = run(((record.n, record) for record in records), PipelineSettings())
    expected = ended((output.value for _, output in outputs if output.topic == topics.BARS_1M.name), until)
    assert any(decode_bar(value).end == since + 3 * MINUTE_NS for value in expected)
    assert ended(found, until) == expected


async def test_a_time_that_the_log_has_not_come_to_is_not_compared(settings: Settings, tmp_path: Path) -> None:
    archive_feed(settings, frames(tmp_path, BEGIN_MS, 10))
    later = (BEGIN_MS + HOUR_MS) * NS_PER_MS
    with pytest.raises(TapedeckError, match="holds nothing of that time"):
        await recomputed(settings, [topics.TRADES], later, later + MINUTE_NS)


async def test_when_the_last_event_was_received_is_not_what_a_zombie_says(settings: Settings, tmp_path: Path) -> None:
    """Rows received later are not taken for wrong."""
    market = list(frames(tmp_path, BEGIN_MS, 10))
    records = list(records_of(market, SlicerSettings(), ["XT"], ["*"]))
    zombie = records[-1]._replace(n=0, recv=[(2**61, 1)])
    archive_records(settings, [*records, zombie])
    since = BEGIN_MS * NS_PER_MS
    made = Recomputation(settings, PipelineSettings(), "archive", [topics.TRADES], since, since + MINUTE_NS)
    async for _ in made.values(Progress(disable=True)):
        pass
    assert made.reach().taken[zombie.partition][2] <= market[-1].recv_ns


async def test_history_from_long_before_the_recording_is_rolled_up(settings: Settings, tmp_path: Path) -> None:
    archive_feed(settings, frames(tmp_path, BEGIN_MS, 10))
    day = BEGIN_MS * NS_PER_MS // DAY_NS * DAY_NS - 10 * DAY_NS
    minute = day + 61 * MINUTE_NS
    archive_repair(settings, BEGIN_MS, minute)
    found = await recomputed(settings, [topics.BARS_1M, *topics.ROLLUPS.values()], day, day + DAY_NS)
    made = [decode_bar(value) for value in ended(found, day + DAY_NS)]
    assert {bar.interval for bar in made if isinstance(bar, Bar)} == set(INTERVALS_NS)


async def test_the_days_of_a_long_outage_are_flagged_with_the_gap_that_is_told_of_at_its_end(
    settings: Settings, tmp_path: Path
) -> None:
    day = BEGIN_MS * NS_PER_MS // DAY_NS * DAY_NS + DAY_NS  # the first whole one of the outage
    back_ms = BEGIN_MS + 6 * DAY_NS // NS_PER_MS
    before, after = (
        list(records_of(frames(tmp_path, begin_ms, 10), SlicerSettings(), ["XT"], ["*"]))
        for begin_ms in (BEGIN_MS, back_ms)
    )
    missed = msgspec.json.encode(
        GapValue(before[-1].timestamp_ms * NS_PER_MS, back_ms * NS_PER_MS, ["XT"], ["*"], "away")
    )
    again = [r._replace(epoch=2, value=missed if r.kind == "gap" and not r.n else r.value) for r in after]
    archive_records(settings, [*before, *again])
    minute = day + 61 * MINUTE_NS
    archive_repair(settings, back_ms, minute)
    found = await recomputed(settings, [topics.BARS_1M, *topics.ROLLUPS.values()], day, day + DAY_NS)
    bars = [decode_bar(value) for value in ended(found, day + DAY_NS)]
    made = {bar.interval: bar for bar in bars if isinstance(bar, Bar) and bar.start >= day}
    assert made.keys() == set(INTERVALS_NS)
    assert made.pop("1m").flags == ["repaired"]
    for interval, bar in made.items():
        assert {"gap", "partial"} <= set(bar.flags), interval
        assert bar.missing_ns == INTERVALS_NS[interval] - MINUTE_NS
