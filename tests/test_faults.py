"""Every way the simulator can fail, against the real producer and a real Kafka, scored: what is absent lies in a
gap that names it, nothing is there twice, and no gap is much longer than what was missed."""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from conftest import RATE, Market, Process, Produce, Spawn, flows, playing, recording, says, stopped, until

from bench.market import write_frames
from bench.scoring import Score, raw_log, score, spans_of
from processors.compute import FILES, compute
from processors.settings import PipelineSettings
from producers import service, session
from schemas import topics
from schemas.events import NS_PER_S
from schemas.raw import RawRecord, decode_gap_value
from tapedeck.embedded.ports import free_ports
from tapedeck.settings import Settings
from tapedeck.shell import Shell

EXCESS_S = 2.0  # for each fault


async def inject(market: Market, kind: str, **parameters: Any) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.post(market.control, json={"kind": kind, **parameters}) as response,
    ):
        assert response.status == 201, await response.text()


async def scored(settings: Settings, market: Market) -> tuple[Score, dict[int, list[RawRecord]]]:
    log = await raw_log(settings)
    found = score(market.record, log)
    assert found.lost == found.repeated == 0, found
    return found, log


def subscriptions(producer: Process) -> int:
    return producer.log.read_text().count('"event": "subscribed"')


async def back(producer: Process, before: int) -> None:
    """It has subscribed once more."""

    async def again() -> bool:
        return subscriptions(producer) > before

    await until(again, 40)


async def killed_and_replaced(producer: Process, start: Callable[[], Process], market: Market) -> None:
    producer.popen.kill()
    producer.popen.wait()
    again = start()
    await recording(again)
    await flows(market)
    await stopped(again)


DROP, GOING = {"kind": "drop"}, {"kind": "close", "code": 1001}


@pytest.mark.parametrize(
    "faults",
    [
        [DROP],
        [{"kind": "close", "code": 1000}, GOING],
        [{"kind": "close", "code": 1011}, {"kind": "slow-consumer"}],
        [{"kind": "huge"}, {"kind": "away", "seconds": 1}],
        [{"kind": "auth-timeout", "count": 1}, DROP],
    ],
    ids=lambda faults: "-".join(fault["kind"] for fault in faults),
)
async def test_a_lost_connection_however_it_ends_is_soon_back(
    settings: Settings, market: Market, produce: Produce, faults: list[dict[str, Any]]
) -> None:
    producer = produce(streams=["XT", "XQ"])
    await flows(market)
    for fault in faults:
        before = subscriptions(producer)
        await inject(market, **fault)
        if fault["kind"] != "auth-timeout":
            await back(producer, before)
            await flows(market, 0.5)
    await stopped(producer)
    found, _ = await scored(settings, market)
    assert set(found.gaps) == {"reconnect"}
    assert found.in_gaps > 0
    assert found.excess_s < EXCESS_S * len(faults), found
    if faults == [DROP]:
        assert found.marked_s < 2


@pytest.mark.parametrize("fault", [{}, {"stream": "XT"}, {"stream": "XQ"}, "half-open"])
async def test_a_feed_that_lies_about_being_alive_is_found_out(
    settings: Settings, market: Market, produce: Produce, fault: Any
) -> None:
    producer = produce(streams=["XT", "XQ"], feed_usual_s=1)
    await flows(market, 3)
    if fault == "half-open":
        await inject(market, "half-open", seconds=4)
        await back(producer, 1)
    else:
        await inject(market, "stall", seconds=3, **fault)
    await flows(market, 5)
    await stopped(producer)
    found, log = await scored(settings, market)
    assert "stall" in found.gaps
    stalls = [span for span in spans_of(log)[0] if span.reason == "stall"]
    wanted = {"XT", "XQ"} if fault == "half-open" else {fault.get("stream", "XT"), fault.get("stream", "XQ")}
    assert stalls[0].streams == wanted
    assert found.excess_s < EXCESS_S, found


async def test_killed_while_the_connection_is_half_open_and_nobody_knows_yet_all_that_was_missed_is_marked(
    settings: Settings, market: Market, produce: Produce
) -> None:
    producer = produce(streams=["XT", "XQ"])
    await flows(market, 2)
    await inject(market, "half-open", seconds=5)
    await flows(market, 5)
    await killed_and_replaced(producer, lambda: produce(streams=["XT", "XQ"]), market)
    assert "half open" not in producer.log.read_text()
    found, _ = await scored(settings, market)
    assert set(found.gaps) == {"away"}
    assert found.in_gaps > 5 * RATE
    assert found.excess_s < EXCESS_S, found


async def test_killed_before_it_noticed_a_stall_the_next_marks_the_silent_stream_from_its_last_event_on(
    settings: Settings, market: Market, produce: Produce
) -> None:
    producer = produce(streams=["XT", "XQ"], feed_usual_s=4)
    await flows(market, 6)
    await inject(market, "stall", seconds=15, stream="XT")
    await flows(market, 3)
    await killed_and_replaced(producer, lambda: produce(streams=["XT", "XQ"], feed_usual_s=4), market)
    found, _ = await scored(settings, market)
    assert found.in_gaps > 2.5 * RATE / 4
    assert found.excess_s < EXCESS_S, found
    assert {("away", frozenset({"XQ"})), ("stall", frozenset({"XT"}))} <= {(s.reason, s.streams) for s in found.missed}


async def test_stopped_for_a_while_and_cut_off_meanwhile_all_behind_what_waited_for_it_is_marked(
    settings: Settings, market: Market, produce: Produce
) -> None:
    producer = produce(streams=["XT", "XQ"])
    await flows(market, 2)
    producer.popen.send_signal(signal.SIGSTOP)
    await flows(market, 2)
    await inject(market, "drop")
    await flows(market, 3)
    producer.popen.send_signal(signal.SIGCONT)
    await back(producer, 1)
    await flows(market)
    await stopped(producer)
    found, _ = await scored(settings, market)
    assert found.gaps == {"reconnect": 1}
    assert found.in_gaps > 2.5 * RATE
    assert found.excess_s < EXCESS_S, found


async def test_a_stall_that_ends_by_itself_before_it_is_given_up_is_marked_too(
    settings: Settings, market: Market, produce: Produce
) -> None:
    producer = produce(streams=["XT", "XQ"], feed_usual_s=2)
    await flows(market, 13)
    await inject(market, "stall", seconds=1.2, stream="XT")
    await flows(market, 3)
    await stopped(producer)
    found, log = await scored(settings, market)
    assert found.gaps == {"silence": 1}
    assert [span.streams for span in spans_of(log)[0] if span.reason == "silence"] == [{"XT"}]
    assert found.excess_s < EXCESS_S, found


def quiet_frames(path: Path, since_s: float, until_s: float) -> Path:
    """A feed on which nobody trades for a while."""
    write_frames(path, RATE, 60, per_frame=1, begin_ms=int(time.time() * 1000))
    lines = path.read_bytes().splitlines(keepends=True)
    trades = range(int(since_s * RATE), int(until_s * RATE))
    path.write_bytes(b"".join(line for n, line in enumerate(lines) if n not in trades or b'"ev":"XT"' not in line))
    return path


async def test_a_silence_in_which_nothing_was_missed_is_closed_and_one_in_which_something_was_is_not(
    settings: Settings, spawn: Spawn, tmp_path: Path
) -> None:
    quiet = quiet_frames(tmp_path / "frames", 13, 15)
    async with playing(spawn, quiet, tmp_path / "sent.ndjson") as market:
        vendor = {"polygon_ws_url": market.url, "polygon_rest_url": market.rest}
        producer = spawn("produce", symbols=["BTC-USD"], streams=["XT", "XQ"], feed_usual_s=2, **vendor)
        await inject(market, "rest-error", code=429, count=1)
        await says(producer, "its gap is closed")
        await inject(market, "stall", seconds=4, stream="XT")  # by now 1.5 s are no surprise
        await says(producer, "it stays a gap")
        await stopped(producer)
    found, log = await scored(settings, market)
    for records in log.values():
        gaps = [decode_gap_value(record.value) for record in records if record.kind == "gap"]
        trades = [gap for gap in gaps if gap.streams == ["XT"] and gap.reason != "stop"]
        words = [gap for gap in trades if gap.reason == "empty"]
        marked = [gap for gap in trades if gap.reason != "empty"]  # silences or, on a slow machine, stalls
        closed = [gap for gap in marked if msgspec.structs.replace(gap, reason="empty") in words]
        assert len(closed) == len(words) > 0
        assert all(gap.from_ > words[-1].to for gap in marked if gap not in closed)
        assert len(marked) > len(closed)
    assert found.in_gaps > 50
    assert found.excess_s < EXCESS_S, found


async def test_bytes_that_are_no_events_and_frames_that_come_twice_cost_nothing(
    settings: Settings, market: Market, produce: Produce
) -> None:
    producer = produce(streams=["XT", "XQ"])
    await flows(market)
    for kind in ("malformed", "not-array", "truncated", "duplicate"):
        await inject(market, kind, count=3)
        await flows(market, 0.5)
    await stopped(producer)
    found, log = await scored(settings, market)
    assert found.gaps == {}
    assert (
        sum(record.kind == "bad" for records in log.values() for record in records) == 6
    )  # broken UTF-8 is for the pipeline to judge
    assert found.sent == found.logged + found.in_gaps


async def test_a_vendors_clock_that_jumps_ahead_moves_nothing(
    settings: Settings, market: Market, produce: Produce
) -> None:
    producer = produce(streams=["XT", "XQ"])
    await flows(market, 2)
    await inject(market, "clock", amount=86400 * 365, count=1)
    await flows(market)
    await inject(market, "clock", amount=3600, exchange=2, count=40)
    await flows(market, 4)
    await stopped(producer)
    found, log = await scored(settings, market)
    assert found.gaps == {}
    stamps = [record.timestamp_ms for records in log.values() for record in records]
    assert max(stamps) - min(stamps) < 60_000


async def test_a_key_that_is_refused_later_ends_it_with_exit_2(market: Market, produce: Produce) -> None:
    producer = produce()
    await flows(market)
    await inject(market, "auth-failed")
    await inject(market, "drop")
    assert await asyncio.to_thread(producer.ended, 60) == 2
    assert "refused the key" in producer.log.read_text()


async def test_a_refused_channel_is_named_and_the_others_flow(
    settings: Settings, market: Market, produce: Produce
) -> None:
    await inject(market, "refuse", stream="XQ")
    producer = produce()
    await flows(market, 0.5)
    await stopped(producer)
    assert '"refused": ["XQ.*"]' in producer.log.read_text()
    kinds = {part[:9] for records in (await raw_log(settings)).values() for r in records for part in [r.value[1:10]]}
    assert b'{"ev":"XT' in kinds
    assert b'{"ev":"XQ' not in kinds


async def test_evicted_it_rests_and_explains_and_a_silent_pair_is_named(
    settings: Settings, market: Market, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "EVICTED_REST_S", 1.5)
    monkeypatch.setattr(service, "STATISTICS_S", 1.0)
    wanted = {"symbols": ["BTC-USD", "NOP-USD"], "streams": ["XT", "XQ"]}
    vendor = {"polygon_ws_url": market.url, "polygon_rest_url": market.rest}
    shell = Shell(settings.model_copy(update=wanted | vendor), "produce")
    running = asyncio.create_task(service.run(shell))
    await flows(market, 0.2)
    await asyncio.sleep(1.5)
    began = time.monotonic()
    await inject(market, "evict")

    async def gone() -> bool:
        return bool(shell.health["feed"])

    async def back() -> bool:
        return not shell.health["feed"]

    await until(gone)
    await until(back)
    assert time.monotonic() - began > 1.5
    shell.stopping.set()
    await asyncio.wait_for(running, 10)
    said = capsys.readouterr()
    assert "another client uses this key" in said.out + said.err
    statistics = next(line for line in (said.out + said.err).splitlines() if "] statistics " in line)
    told = {part.partition("=")[0] for part in statistics.split()}
    assert told >= {"uptime_s", "events", "events_per_s", "last_event_age_s", "errors", "reconnects"}
    assert told >= {"queue_frames", "journal_records", "journal_bytes"}
    assert "XQ.NOP-USD" in said.out + said.err
    assert "XT.BTC-USD" not in (said.out + said.err).split("never delivered")[1].splitlines()[0]


async def test_a_dry_run_prints_ten_events_and_needs_no_kafka(market: Market, produce: Produce, tmp_path: Path) -> None:
    done = produce("--dry-run", kafka_bootstrap_servers="127.0.0.1:1")
    assert await asyncio.to_thread(done.ended, 60) == 0
    lines = done.log.read_text().splitlines()
    assert sum(line.startswith('{"ev":') for line in lines) == 10
    assert any(line.startswith("subscribed to 3 of 3 channels") for line in lines)
    await inject(market, "auth-failed", count=1)
    refused = produce("--dry-run")
    assert await asyncio.to_thread(refused.ended, 60) == 2


async def test_aggregates_of_seconds_come_where_they_are_asked_for_and_are_what_the_trades_make(
    settings: Settings, spawn: Spawn, tmp_path: Path
) -> None:
    port, rest = free_ports(2)
    market = Market(tmp_path / "sent.ndjson", f"ws://127.0.0.1:{port}/crypto", f"http://127.0.0.1:{rest}")
    ports = ["--port", str(port), "--rest-port", str(rest)]
    await says(spawn("simulate", *ports, "--speed", "10", "--record", str(market.record)), '"event": "feed"')
    vendor = {"polygon_ws_url": market.url, "polygon_rest_url": market.rest, "symbols": ["*"]}
    producer = spawn("produce", streams=["XT", "XAS"], **vendor)

    async def enough() -> bool:
        return market.record.exists() and market.record.read_bytes().count(b'"XAS"') > 150

    await until(enough, 60)
    await stopped(producer)
    _, log = await scored(settings, market)
    records = ((place, record) for part in log.values() for place, record in enumerate(part))
    compute(records, tmp_path / "out", PipelineSettings(), close=True)
    bars, trades = (
        [json.loads(line) for line in (tmp_path / "out" / FILES[topic.name]).read_bytes().splitlines()]
        for topic in (topics.VENDOR_BARS, topics.TRADES)
    )
    assert {bar["interval"] for bar in bars} == {"1s"}
    made: Counter[tuple[str, int]] = Counter()
    last: dict[tuple[str, int], int] = {}
    for trade in trades:
        place = trade["symbol"], trade["ts_event"] // NS_PER_S * NS_PER_S
        made[place] += trade["size"]
        last[place] = trade["ts_recv"]
    settled = max(last.values()) - NS_PER_S  # the stop cut off what came to be said of later ones
    volumes = {(b["symbol"], b["start"]): b["volume"] for b in bars if last[b["symbol"], b["start"]] < settled}
    assert len(volumes) > 50
    assert {place: made[place] for place in volumes} == pytest.approx(volumes)
