"""The settings of one simulator."""

import math
import re
from pathlib import Path

import msgspec

from simulator.faults import Fault

DEFAULT_SYMBOLS = ("BTC-USD", "ETH-USD", "SOL-USD", "MATIC-USD", "AVAX-USD")
MAX_SPEED = math.inf

_SYMBOL = re.compile(r"[A-Z0-9]+-[A-Z0-9]+")


class SimulatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to play, how fast, for whom; raises ValueError where a value makes no sense."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = 0
    """Port to listen on; 0 takes a free one, which `serve` reports."""

    rest_port: int = 0
    """Port of REST and of the control; 0 takes a free one."""

    rest_hours: float = 6.0
    """How many hours of market time REST knows trades of; 0 is none, and saves their memory."""

    rest_per_minute: int | None = None
    """How many REST requests a key may make in a minute; None is any number."""

    keys: frozenset[str] = frozenset()
    """The API keys that are accepted; when empty, any key is."""

    auth_timeout_s: float = 10.0
    """Wall seconds a client has for authenticating before it gets `auth_timeout` and is closed."""

    connections_per_key: int | None = None
    """A key's connections above this number evict its oldest; None is any number."""

    backlog_bytes: int | None = None
    """A client that leaves more than this unread is cut off; None holds the market up for it instead."""

    faults: tuple[Fault, ...] = ()
    """What is to go wrong, and when."""

    frames: Path | None = None
    """A frames file (.gz or plain) to play; None plays the synthetic market."""

    seed: int = 1
    """Seed of the synthetic market: the same seed, symbols and start give the same bytes."""

    symbols: tuple[str, ...] = DEFAULT_SYMBOLS
    """Pairs of the synthetic market, busiest first; of four or more the last two are quiet."""

    wide: bool = False
    """Whether the activity of the pairs is as different as that of hundreds: many then trade rarely."""

    start_ns: int | None = None
    """Where the synthetic market's time begins (ns since the epoch); None is 24 hours before now."""

    speed: float = 1.0
    """Market seconds per wall second; `MAX_SPEED` is as fast as the clients take it."""

    seconds: float | None = None
    """Stop sending this many wall seconds after the first subscription; None never does."""

    record: Path | None = None
    """A frames file to append what was published to, its faults beside it; None keeps no record."""

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ValueError(f"speed must be above 0, or inf for as fast as it goes; it is {self.speed}")
        if not 0 <= self.rest_hours < math.inf:
            raise ValueError(f"rest_hours must not be below 0, and finite; it is {self.rest_hours}")
        if self.rest_per_minute is not None and self.rest_per_minute < 0:
            raise ValueError("rest_per_minute must not be below 0")
        if self.connections_per_key is not None and self.connections_per_key < 1:
            raise ValueError("connections_per_key must be at least 1")
        if self.backlog_bytes is not None and self.backlog_bytes < 1:
            raise ValueError("backlog_bytes must be at least 1")
        if self.record is not None and self.record == self.frames:
            raise ValueError(f"record and frames are the same file, {self.record}: it would play without end")
        if not self.symbols:
            raise ValueError("symbols must name at least one pair, like BTC-USD")
        for symbol in self.symbols:
            if not _SYMBOL.fullmatch(symbol):
                raise ValueError(f"{symbol!r} is not a pair like BTC-USD")
        if len(set(self.symbols)) < len(self.symbols):
            raise ValueError(f"symbols must not repeat a pair: {','.join(self.symbols)}")
