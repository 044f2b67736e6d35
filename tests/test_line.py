"""The whole line as a user runs it: `tapedeck demo`, with everything killed, twice at once, interrupted."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from recordings import klines, recording, write_frames

from processors.compute import FILES
from schemas import topics

DEMO = [sys.executable, "-m", "tapedeck", "demo", "--json"]


class Demo:
    """A running demo."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self._err = (folder.parent / f"{folder.name}.err").open("w+")
        command = [*DEMO, "--data-dir", str(folder), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._err, text=True)

    def part(self, *words: str) -> psutil.Process:
        """The demo's child whose command line has these words, waited for."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children():
                    command = " ".join(child.cmdline())
                    if all(word in command for word in words):
                        return child
            time.sleep(0.05)
        raise AssertionError(f"no child {words}: {self.errors()}")

    def flowing(self, events: int = 500) -> None:
        """Waits until the feed has sent some."""
        record = self.folder / "sent.ndjson"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if record.exists() and record.stat().st_size > events * 150:
                return
            assert self.process.poll() is None, self.errors()
            time.sleep(0.1)
        raise AssertionError(f"nothing flows: {self.errors()}")

    def errors(self) -> str:
        self._err.seek(0)
        return self._err.read()

    def result(self, timeout_s: float = 120) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=timeout_s)
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        found["code"] = self.process.returncode
        found["errors"] = self.errors()
        return found


def leftovers(folder: Path) -> list[str]:
    """Processes that still have to do with a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(folder) in command and process.info["pid"] != os.getpid():
            found.append(command)
    return found


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder that PostgreSQL's account can reach when the tests run as root."""
    import shutil
    import tempfile

    base = Path(tempfile.mkdtemp(prefix="tapedeck-test-"))
    base.chmod(0o755)
    yield base / "data"
    shutil.rmtree(base, ignore_errors=True)


def assert_ok(result: dict[str, Any]) -> None:
    assert result["ok"], (result, result["errors"])
    assert result["code"] == 0
    assert result["bars_checked"] > 0
    assert result["left_over"] == result["extra"] == 0
    assert result["bars_wrong"] == result["bars_missing"] == result["bars_extra"] == 0


def assert_only(result: dict[str, Any], *allowed: str) -> None:
    """Nothing may be wrong but what is allowed."""
    assert all(complaint.startswith(allowed) for complaint in result["complaints"]), result["complaints"]


def assert_only_too_short(result: dict[str, Any]) -> None:
    """A run of seconds at 1x closes no minute and brings no aggregate; nothing else may be wrong."""
    assert_only(result, "no final bar", "nothing was sent on XA")


MALFORMED = [
    b'{"recv_ns":%d,"frame":[{"ev":"XT","pair":"BTC-USD","p":-5,"t":%d,"s":1,"i":1,"x":1}]}',
    b'{"recv_ns":%d,"frame":[{"ev":"XT","pair":"BTC-USD","p":"NaN","t":%d,"s":1,"i":2,"x":1}]}',
    b'{"recv_ns":%d,"frame":[{"ev":"XX","t":%d,"what":"unknown"}]}',
    b'{"recv_ns":%d,"frame":[{"ev":"XT","pair":"BTC-USD","p":5,"t":%d000000,"s":1,"i":3,"x":1}]}',
    b'{"recv_ns":%d,"frame":[{"ev":"XQ","pair":"BTC-USD","bp":5,"t":%d}]}',
]


def write_bad_frames(frames: Path) -> None:
    """1,200 good trades and as many quotes; among them 13 bad ones and a repeat."""
    begin = 1_723_161_240_000
    with frames.open("wb") as file:
        for number in range(1200):
            ms = begin + number * 100
            good = b'{"ev":"XT","pair":"BTC-USD","p":%d,"t":%d,"s":0.5,"i":"g%d","x":1,"c":[2]}' % (
                100,
                ms,
                number,
            )
            quote = b'{"ev":"XQ","pair":"ETH-USD","bp":9,"bs":1,"ap":10,"as":1,"t":%d,"x":2}' % ms
            file.write(b'{"recv_ns":%d,"frame":[%s,%s]}\n' % (ms * 1_000_000, good, quote))
            if number % 100 == 50:
                bad = MALFORMED[(number // 100) % len(MALFORMED)]
                file.write(bad % (ms * 1_000_000, ms) + b"\n")
        file.write(b'{"recv_ns":%d,"base64":"eyJub3QiOiAiYW4gYXJyYXkifQ=="}\n' % (ms * 1_000_000))
        file.write(b'{"recv_ns":%d,"frame":[%s]}\n' % (ms * 1_000_000, good))  # a repeat


def assert_undisturbed(result: dict[str, Any]) -> None:
    assert result["in_gaps"] == result["quarantined"] == 0
    assert result["gaps"][:-1] == []  # an undisturbed run has none but the start, and the stop's own


def test_two_demos_side_by_side_share_nothing_and_bad_input_in_one_stops_neither(folder: Path, tmp_path: Path) -> None:
    market = Demo(folder.parent / "market", "--seconds", "9")
    bad = tmp_path / "frames.ndjson"
    write_bad_frames(bad)
    other = Demo(folder.parent / "bad", "--frames", str(bad), "--speed", "20")
    result = market.result()
    assert_ok(result)
    assert_undisturbed(result)
    assert result["duplicates"] == result["deadletters"] == 0
    assert all(result["sent"][stream] > 0 for stream in ("XT", "XQ", "XA"))
    assert result["sent"] == result["stored"]
    result = other.result()
    assert_ok(result)
    assert_undisturbed(result)
    assert result["deadletters"] == 13
    assert result["duplicates"] == 1
    assert result["stored"]["XT"] == result["stored"]["XQ"] == 1200
    assert not leftovers(market.folder)
    assert not leftovers(other.folder)


def test_everything_but_the_producer_may_be_killed_and_every_event_is_stored(folder: Path) -> None:
    demo = Demo(folder, "--seconds", "15")
    demo.flowing()
    for words in (("tapedeck", "process"), ("tapedeck", "sink", "trades"), ("kafka.Kafka",), ("bin/postgres",)):
        part = demo.part(*words)
        part.send_signal(signal.SIGKILL)
        time.sleep(2)
    result = demo.result()
    assert_ok(result)
    assert result["sent"] == result["stored"]
    assert result["in_gaps"] == 0


def test_a_killed_producer_marks_its_absence_and_not_much_more(folder: Path) -> None:
    demo = Demo(folder, "--seconds", "20", "--speed", "1", "--symbols", "BTC-USD,ETH-USD")
    demo.flowing(300)
    killed = time.time()
    old = demo.part("tapedeck", "produce")
    old.send_signal(signal.SIGKILL)
    while demo.part("tapedeck", "produce").pid == old.pid:
        time.sleep(0.01)
    log = folder / "produce.log"
    while log.read_text().count("subscribed") < 2:
        assert demo.process.poll() is None, "the demo was over before its producer was back"
        time.sleep(0.01)
    absent = time.time() - killed
    result = demo.result()
    assert_only_too_short(result)
    assert result["left_over"] == result["extra"] == result["bars_wrong"] == 0
    assert result["in_gaps"] > 0
    away = [gap for gap in result["gaps"] if gap["reason"] == "away"]
    assert len(away) == 1
    marked = (away[0]["to"] - away[0]["from"]) / 1e9
    assert absent - 2 <= marked <= absent + 2


def test_ctrl_c_stops_in_order_and_soon_and_a_killed_demo_leaves_a_clean_folder(folder: Path) -> None:
    demo = Demo(folder)
    demo.flowing()
    demo.process.kill()
    demo.process.wait()
    time.sleep(0.5)
    assert not leftovers(folder), "children must not outlive a killed demo"
    again = Demo(folder)
    record = folder / "sent.ndjson"
    size = record.stat().st_size
    deadline = time.monotonic() + 90
    while record.stat().st_size < size + 500_000 and time.monotonic() < deadline:
        time.sleep(0.1)
    began = time.monotonic()
    again.process.send_signal(signal.SIGINT)
    result = again.result()
    took = time.monotonic() - began
    assert not leftovers(folder)
    assert took < 20  # five where nobody else is at work
    # So short a run may see no aggregate, and on a machine that is too busy it says so.
    assert_only(result, "no final bar", "nothing was sent on XA", "what was on its way")
    assert result["left_over"] == result["extra"] == result["bars_wrong"] == result["bars_missing"] == 0


async def test_a_real_recording_passes_whole_and_its_bars_are_the_exchanges_own(folder: Path) -> None:
    frames = folder.parent / "frames.ndjson.gz"
    write_frames(frames, recording())
    result = Demo(folder, "--frames", str(frames), "--speed", "max").result()
    assert_ok(result)
    assert result["stored"] == {"XT": 19904, "XQ": 73174, "XA": 0}
    services = [sys.executable, "-m", "tapedeck", "local"]
    out = subprocess.run(
        [*services, "start", "--data-dir", str(folder)], capture_output=True, text=True, check=True
    ).stdout
    environment = dict(line.removeprefix("export ").split("=", 1) for line in out.splitlines())
    try:
        connection = await asyncpg.connect(environment["DATABASE_URL"])
        rows = await connection.fetch("SELECT * FROM crypto_aggregates WHERE interval = '1m'")
        counted = await connection.fetch("SELECT ts_event / 60000000000, count(*) FROM crypto_trades GROUP BY 1")
        await connection.close()
        bars, counts = {row["start"]: row for row in rows}, dict(counted)
        assert len(klines()) == 10
        for start, kline in klines().items():
            bar = bars[start]
            assert (bar["open"], bar["high"], bar["low"], bar["close"], bar["volume"]) == kline
            assert bar["trade_count"] == counts[start // 60_000_000_000]
            assert (bar["flags"], bar["quality"]) == ([], 1)
        await _topics_equal_compute(environment, folder.parent)
    finally:
        subprocess.run([*services, "stop", "--data-dir", str(folder)], check=True)
    assert not leftovers(folder)


async def _topics_equal_compute(environment: dict[str, str], folder: Path) -> None:
    """The topics of a live run hold exactly what `compute --log` makes of the dumped log."""
    tapedeck, log, out = [sys.executable, "-m", "tapedeck"], folder / "log.ndjson", folder / "computed"
    subprocess.run([*tapedeck, "log", "--out", str(log)], env=os.environ | environment, check=True)
    subprocess.run([*tapedeck, "compute", "--log", str(log), "--out", str(out)], check=True)
    consumer = AIOKafkaConsumer(bootstrap_servers=environment["KAFKA_BOOTSTRAP_SERVERS"])
    await consumer.start()
    try:
        for name, file in FILES.items():
            places = [TopicPartition(name, number) for number in range(topics.PARTITIONS)]
            ends = await consumer.end_offsets(places)
            consumer.assign(places)
            await consumer.seek_to_beginning()
            live: Counter[bytes] = Counter()
            while sum([await consumer.position(place) for place in places]) < sum(ends.values()):
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    live.update(record.value for record in records)
            assert live.keys() == set((out / file).read_bytes().splitlines()), name
    finally:
        await consumer.stop()


def test_parts_of_the_recording_at_its_own_pace_and_at_ten_times(folder: Path) -> None:
    whole = recording()
    demos = []
    for speed, seconds in (("1", 8), ("10", 90)):
        frames = folder.parent / f"{speed}.ndjson"
        part = [frame for frame in whole if frame.recv_ns < whole[0].recv_ns + seconds * 10**9]
        write_frames(frames, part)
        demos.append((Demo(folder.parent / speed, "--frames", str(frames), "--speed", speed), len(part)))
    for demo, events in demos:
        result = demo.result()
        assert_only_too_short(result)
        assert result["sent"] == result["stored"]
        assert sum(result["sent"].values()) == events
