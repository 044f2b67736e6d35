"""A real market, recorded: our bars are the exchange's own, whatever way they are computed."""

import csv
import gzip
import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

import pytest
from recordings import BINANCE, klines, recording, write_frames

from processors.compute import compute
from processors.settings import PipelineSettings
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas.events import MINUTE_NS, NS_PER_MS, Bar, MinuteClosed, decode_bar
from schemas.frames import Frame, read_frames
from schemas.raw import RawRecord, log_line, read_log
from schemas.topics import PARTITIONS

STREAMS = ["XT", "XQ", "XA"]
TRADES, QUOTES = 19_904, 73_174
DELAY_MS = 15 * 60_000


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return recording()


@pytest.fixture(scope="module")
def records(frames: list[Frame]) -> list[RawRecord]:
    return list(records_of(frames, SlicerSettings(), STREAMS, ["*"]))


def computed(records: list[RawRecord], out: Path) -> dict[str, bytes]:
    """What `tapedeck compute --close` writes, by file."""
    compute(((record.n, record) for record in records), out, PipelineSettings(), close=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def outputs(records: list[RawRecord], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return computed(records, tmp_path_factory.mktemp("recording"))


def delayed(frames: Iterable[Frame]) -> list[Frame]:
    """The same with every event time a quarter of an hour earlier, received at the same times."""
    return [
        frame._replace(data=re.sub(rb'"t":(\d+)', lambda t: b'"t":%d' % (int(t[1]) - DELAY_MS), frame.data))
        for frame in frames
    ]


def bars_of(outputs: dict[str, bytes]) -> list[Bar]:
    found = [decode_bar(line) for line in outputs["bars.1m.ndjson"].splitlines()]
    return [bar for bar in found if isinstance(bar, Bar)]


def test_every_trade_and_quote_comes_through_and_nothing_else(outputs: dict[str, bytes]) -> None:
    counts = {name: data.count(b"\n") for name, data in outputs.items()}
    assert counts.pop("bars.1m.ndjson") == 12 + PARTITIONS * 11  # bars, and markers on every partition
    made = {name: counts.pop(name) for name in list(counts) if name.startswith("bars.") and "vendor" not in name}
    assert made.pop("bars.forming.ndjson") > 600  # one for nearly each of 660 s
    assert made == {"bars.5m.ndjson": 3} | {f"bars.{span}.ndjson": 1 for span in ("15m", "30m", "1h", "4h", "1d")}
    assert counts == {
        "trades.ndjson": TRADES,
        "quotes.ndjson": QUOTES,
        "bars.vendor.ndjson": 0,
        "anomalies.ndjson": 0,
        "gaps.ndjson": 8,
        "deadletters.ndjson": 0,
        "quarantine.ndjson": 0,
    }


def test_the_ten_whole_minutes_are_exactly_the_exchanges_own(outputs: dict[str, bytes]) -> None:
    ours = {bar.start: (bar.open, bar.high, bar.low, bar.close, bar.volume) for bar in bars_of(outputs)}
    official = klines()
    assert len(official) == 10
    assert {start: ours[start] for start in official} == official


def test_a_longer_bar_is_what_the_exchanges_own_minutes_make(outputs: dict[str, bytes]) -> None:
    official = klines()
    checked = 0
    for bar in map(decode_bar, outputs["bars.5m.ndjson"].splitlines()):
        assert isinstance(bar, Bar)
        minutes = [official[start] for start in range(bar.start, bar.end, MINUTE_NS) if start in official]
        if len(minutes) == 5:
            opens, highs, lows, closes, volumes = zip(*minutes, strict=True)
            whole = (opens[0], max(highs), min(lows), closes[-1], sum(volumes, Decimal(0)))
            assert (bar.open, bar.high, bar.low, bar.close, bar.volume) == whole
            assert (bar.flags, bar.quality) == ([], 1)
            checked += 1
        else:
            assert "partial" in bar.flags
    assert checked >= 1


def test_each_bar_counts_the_trades_of_its_minute(outputs: dict[str, bytes]) -> None:
    with gzip.open(BINANCE / "trades.csv.gz", "rt") as lines:
        counts = Counter(int(row["trade_ms"]) * NS_PER_MS // MINUTE_NS * MINUTE_NS for row in csv.DictReader(lines))
    assert {bar.start: bar.trade_count for bar in bars_of(outputs)} == counts


def test_the_whole_minutes_are_final_at_once_and_the_ends_are_partial(outputs: dict[str, bytes]) -> None:
    bars = bars_of(outputs)
    assert [bar.revision for bar in bars] == [0] * 12
    assert [bar.flags for bar in bars] == [["partial"], *[[]] * 10, ["partial"]]
    assert all(bar.quality == 1 and bar.missing_ns == 0 for bar in bars[1:-1])
    assert all(Decimal(0) < bar.quality < 1 for bar in (bars[0], bars[-1]))


def test_a_marker_closes_each_minute_on_each_partition(outputs: dict[str, bytes]) -> None:
    lines = [decode_bar(line) for line in outputs["bars.1m.ndjson"].splitlines()]
    markers = [(line.partition, line.end) for line in lines if isinstance(line, MinuteClosed)]
    first = min(klines())
    ends = [first + minute * MINUTE_NS for minute in range(11)]
    assert sorted(markers) == [(partition, end) for partition in range(PARTITIONS) for end in ends]


def test_a_feed_delayed_by_a_quarter_of_an_hour_gives_the_same_bars_then(
    frames: list[Frame], outputs: dict[str, bytes], tmp_path: Path
) -> None:
    """The feed clock is the feed's, not the wall's."""
    records = list(records_of(delayed(frames), SlicerSettings(), STREAMS, ["*"]))
    shift = DELAY_MS * NS_PER_MS
    shifted = []
    for bar in bars_of(computed(records, tmp_path)):
        fields = {name: getattr(bar, name) for name in bar.__struct_fields__}
        fields |= {"start": bar.start + shift, "end": bar.end + shift}
        shifted.append(Bar(**fields))
    assert shifted == bars_of(outputs)


def test_slices_that_linger_for_a_second_change_no_byte(
    frames: list[Frame], outputs: dict[str, bytes], tmp_path: Path
) -> None:
    settings = SlicerSettings(linger_ns=1_000 * NS_PER_MS)
    assert computed(list(records_of(frames, settings, STREAMS, ["*"])), tmp_path) == outputs


def test_slices_of_one_event_change_no_byte(frames: list[Frame], tmp_path: Path) -> None:
    some = frames[:15_000]
    usual, single = (
        list(records_of(some, settings, STREAMS, ["*"]))
        for settings in (SlicerSettings(), SlicerSettings(max_events=1))
    )
    assert sum(record.kind == "slice" for record in single) == 15_000 > sum(record.kind == "slice" for record in usual)
    assert computed(single, tmp_path / "single") == computed(usual, tmp_path / "usual")


def test_the_log_as_a_file_gives_the_same_bytes(
    records: list[RawRecord], outputs: dict[str, bytes], tmp_path: Path
) -> None:
    offsets: Counter[int] = Counter()
    lines = []
    for record in records:
        lines.append(
            log_line(
                record.partition,
                offsets[record.partition],
                record.timestamp_ms,
                record.headers(),
                record.value,
            )
        )
        offsets[record.partition] += 1
    entries = list(read_log(lines))
    assert [record for _, record in entries] == records
    compute(((entry.offset, record) for entry, record in entries), tmp_path, PipelineSettings(), close=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == outputs


def test_the_frames_survive_their_file(frames: list[Frame], tmp_path: Path) -> None:
    some = frames[:5_000]
    for path in (tmp_path / "frames.ndjson", tmp_path / "frames.ndjson.gz"):
        write_frames(path, some)
        assert list(read_frames(path)) == some
