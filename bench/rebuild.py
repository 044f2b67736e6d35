"""`tapedeck rebuild` over a day of a million trades: wall and CPU seconds, Kafka and PostgreSQL on the same machine.

The day is a log of trades alone, on all partitions, with a tick a second on each. The tables are filled by the
first run (`--apply` on empty ones), then compared, then mended after a hundredth of the rows was deleted.
"""

import argparse
import asyncio
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
from pydantic import SecretStr
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.line import span
from bench.market import BEGIN_MS, PAIRS
from producers.offline import records_of
from producers.slicer import SlicerSettings
from schemas import topics
from schemas.frames import Frame
from schemas.raw import RawRecord
from tapedeck import embedded, kafka
from tapedeck.settings import Settings

DAY_S = 86_400
NAMES = {
    "trades": "trades, no difference",
    "trades --apply": "trades --apply, a hundredth missing",
    "bars": "bars, no difference",
}
BEGIN = BEGIN_MS - BEGIN_MS % (DAY_S * 1000)


def frames(trades: int) -> Iterator[Frame]:
    """A day of them in frames of one to five, which is what a sweep of an order book brings."""
    rng = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(len(PAIRS))]
    number = 0
    while number < trades:
        ms = BEGIN + number * DAY_S * 1000 // trades
        rank = rng.choices(range(len(PAIRS)), weights)[0]
        events = []
        for _ in range(min(rng.randint(1, 5), trades - number)):
            price = round(60000 / (rank + 1) ** 2 + rng.uniform(-9, 9), 2)
            events.append(
                f'{{"ev":"XT","pair":"{PAIRS[rank]}","p":{price},"t":{ms},"s":0.{rng.randrange(1, 10**6):06d},'
                f'"c":[{rng.choice((1, 2))}],"i":"{number}","x":{rng.choice((1, 2, 6, 23))},"r":{ms + 20}}}'
            )
            number += 1
        yield Frame((ms + 20) * 1_000_000, f"[{','.join(events)}]".encode())


async def fill(settings: Settings, records: list[RawRecord]) -> None:
    await kafka.prepare(settings)
    publisher = kafka.Publisher(settings)
    await publisher.start()
    topic = settings.topic_prefix + topics.RAW.name
    for first in track(range(0, len(records), 20_000), "filling the log"):
        some = records[first : first + 20_000]
        await publisher.publish(
            kafka.Message(topic, r.partition, None, r.value, r.timestamp_ms, r.headers()) for r in some
        )
    await publisher.stop()


def rebuild(environment: dict[str, str], folder: Path, kind: str, *options: str) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command, start of the process included."""
    command = [
        sys.executable,
        "-m",
        "tapedeck",
        "rebuild",
        kind,
        "--from",
        str(BEGIN),
        "--to",
        str(BEGIN + DAY_S * 1000),
    ]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, *options], env=os.environ | environment, cwd=folder, capture_output=True, text=True, check=False
    )
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def delete(url: str) -> None:
    db = await asyncpg.connect(url)
    await db.execute("DELETE FROM crypto_trades WHERE n % 100 = 0")
    await db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trades", type=int, default=1_000_000)
    options = parser.parse_args()
    records = list(records_of(frames(options.trades), SlicerSettings(), ["XT"], ["*"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        environment = {key: value for state in embedded.start(folder) for key, value in state.addresses.items()}
        try:
            settings = Settings(
                _env_file=None,
                kafka_bootstrap_servers=environment["KAFKA_BOOTSTRAP_SERVERS"],
                database_url=SecretStr(environment["DATABASE_URL"]),
            )
            asyncio.run(fill(settings, records))
            took = {"trades --apply, into an empty table": [rebuild(environment, folder, "trades", "--apply")]}
            rebuild(environment, folder, "bars", "--apply")
            for _ in range(options.runs):
                for what in ("trades", "trades --apply", "bars"):
                    if "--apply" in what:
                        asyncio.run(delete(environment["DATABASE_URL"]))
                    took.setdefault(NAMES[what], []).append(rebuild(environment, folder, *what.split()))
        finally:
            embedded.stop(folder)
    table = Table(title=f"a day of {options.trades:,} trades in {len(records):,} raw records (min - max of the runs)")
    for column in ("tapedeck rebuild", "runs", "s", "CPU s"):
        table.add_column(column, justify="left" if column == "tapedeck rebuild" else "right")
    for what, values in took.items():
        table.add_row(what, str(len(values)), *(span(list(column), 1) for column in zip(*values, strict=True)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
