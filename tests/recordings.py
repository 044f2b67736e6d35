"""The real recording in ../shared/data, as frames a feed would have sent. Skips where it does not lie."""

import csv
import gzip
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest

from schemas.frames import Frame, frame_line

DATA = Path(__file__).parents[2] / "shared" / "data"
BINANCE = DATA / "binance-spot-btcusdt-2024-08-08"
CAPTURES = DATA / "polygon-captures"


def need(folder: Path) -> None:
    """Skips the test where recorded data are not beside the project."""
    if not folder.exists():
        pytest.skip(f"no recorded data at ../shared/data/{folder.name}")


@cache
def recording() -> list[Frame]:
    """Trades (XT) and quotes (XQ) in the order they were received, one event a frame, numbers as recorded."""
    need(BINANCE)
    events: list[tuple[int, str]] = []
    with gzip.open(BINANCE / "trades.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            condition = 1 if row["buyer_is_maker"] == "True" else 2
            text = (
                f'{{"ev":"XT","pair":"BTC-USDT","p":{row["price"]},"s":{row["qty"]},"t":{row["trade_ms"]},'
                f'"i":{row["trade_id"]},"x":10,"c":[{condition}]}}'
            )
            events.append((int(row["recv_ns"]), text))
    with gzip.open(BINANCE / "quotes.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            text = (
                f'{{"ev":"XQ","pair":"BTC-USDT","bp":{row["bid"]},"bs":{row["bid_qty"]},"ap":{row["ask"]},'
                f'"as":{row["ask_qty"]},"t":{int(row["recv_ns"]) // 10**6},"x":10}}'
            )
            events.append((int(row["recv_ns"]), text))
    events.sort(key=lambda event: event[0])
    return [Frame(recv_ns, f"[{text}]".encode()) for recv_ns, text in events]


@cache
def klines() -> dict[int, tuple[Decimal, ...]]:
    """The exchange's own bars of the ten whole minutes: start in ns to (open, high, low, close, volume)."""
    need(BINANCE)
    with (BINANCE / "official_klines_1m.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        start = int(datetime.fromisoformat(row["start_utc"]).timestamp()) * 10**9
        found[start] = tuple(Decimal(row[name]) for name in ("open", "high", "low", "close", "volume"))
    return {start: found[start] for start in sorted(found)[1:11]}


def write_frames(path: Path, frames: Iterable[Frame]) -> None:
    """A frames file, gzipped where the name says so."""
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.writelines(map(frame_line, frames))
