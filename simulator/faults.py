"""What can go wrong with a feed, as data: the kinds of faults, what each takes, and which are at work now."""

import asyncio
import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from websockets.exceptions import ProtocolError
from websockets.frames import Close

from schemas import wire
from simulator.frame import Topic

_LASTING = {"seconds": None, "count": None}

KINDS: Mapping[str, Mapping[str, Any]] = {
    "drop": {},
    "half-open": {"seconds": None},
    "stall": {"stream": None, "pair": None, "seconds": None},
    "close": {"code": 1000},
    "evict": {},
    "slow-consumer": {},
    "away": {"seconds": 5.0},
    "auth-failed": _LASTING,
    "auth-timeout": _LASTING,
    "refuse": {"stream": None, "pair": None, **_LASTING},
    "malformed": {"count": 1},
    "not-array": {"count": 1},
    "truncated": {"count": 1},
    "huge": {"count": 1, "amount": 20.0},
    "duplicate": {"count": 1},
    "clock": {"stream": None, "pair": None, "exchange": None, "amount": 3600.0, **_LASTING},
    "spike": {"pair": None, "exchange": None, "amount": 10.0, **_LASTING},
    "rest-error": {"path": None, "code": 500, **_LASTING},
    "rest-slow": {"path": None, "amount": 5.0, **_LASTING},
    "rest-empty": {"path": None, **_LASTING},
}
"""Every kind with the parameters it takes and their defaults; docs/simulator.md says what each does."""

REST_CODES = (401, 403, 404, 429, 500, 502, 503)
_ALWAYS = {"kind", "at_s", "label"}


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault as it is asked for; raises ValueError for what its kind does not take or cannot be."""

    kind: str

    at_s: float | None = None
    """Wall seconds after the first subscription; None is at once."""

    seconds: float | None = None
    """How long it lasts; without it and `count` until it is ended."""

    count: int | None = None
    """How many times it strikes at most: frames, events, conversations or requests, as the kind has it."""

    stream: str | None = None
    pair: str | None = None
    exchange: int | None = None
    """What it strikes: XT, BTC-USD, 23; None is all."""

    path: str | None = None
    """What a REST path it strikes begins with; None is any."""

    code: int | None = None
    """The WebSocket close code, or the HTTP status."""

    amount: float | None = None
    """clock: seconds ahead; spike: per cent; huge: MiB; rest-slow: seconds of delay."""

    label: str | None = None
    """Its name in the record and the control, unique; made of its kind when None."""

    def __post_init__(self) -> None:
        takes = KINDS.get(self.kind)
        if takes is None:
            raise ValueError(f"{self.kind!r} is not a fault; there are {', '.join(KINDS)}")
        for name in self.__struct_fields__:
            given = getattr(self, name) is not None
            if given and name not in takes and name not in _ALWAYS:
                raise ValueError(f"{self.kind} takes {', '.join(takes) or 'nothing'}, not {name}")
            if not given and takes.get(name) is not None:
                msgspec.structs.force_setattr(self, name, takes[name])
        if self.kind in ("clock", "spike") and self.count is None and self.seconds is None:
            msgspec.structs.force_setattr(self, "count", 1)
        for name in ("at_s", "seconds"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} must not be below 0, and finite")
        if self.count is not None and self.count < 1:
            raise ValueError("count must be at least 1")
        if not math.isfinite(self.amount or 0) or (self.kind in ("huge", "rest-slow") and (self.amount or 0) <= 0):
            raise ValueError("amount must be finite, and above 0 for a size or a delay")
        if self.kind == "spike" and (self.amount or 0) <= -100:
            raise ValueError("amount must be above -100: a price is above 0")
        if self.stream is not None and self.stream not in wire.STREAMS:
            raise ValueError(f"stream must be one of {', '.join(wire.STREAMS)}")
        if self.pair not in (None, "*"):
            msgspec.structs.force_setattr(self, "pair", wire.symbol_of(self.pair))
        if self.kind == "close":
            _check_close_code(self.code or 0)
        if self.kind == "rest-error" and self.code not in REST_CODES:
            raise ValueError(f"code must be one of {', '.join(map(str, REST_CODES))}")

    def covers(self, topic: Topic | None, exchange: int | None = None) -> bool:
        """Whether it strikes events of this topic and exchange; what has no topic only when it strikes all."""
        stream, pair = topic or (None, None)
        return self.stream in (None, stream) and self.pair in (None, pair) and self.exchange in (None, exchange)


def _check_close_code(code: int) -> None:
    try:
        Close(code, "").check()
    except ProtocolError as error:
        raise ValueError(f"{code} is no code that a server can close with") from error


def parse(text: str) -> Fault:
    """A fault as the command line has it, `AT_S:KIND[,NAME=VALUE…]`; raises ValueError."""
    at_s, colon, rest = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not of the form 20:stall,stream=XT,seconds=5")
    kind, *parameters = rest.split(",")
    fields: dict[str, str] = {"kind": kind, "at_s": at_s}
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        fields[name.strip()] = value.strip()
    try:
        return msgspec.convert(fields, Fault, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{text!r}: {error}") from error


class Incident:
    """A fault that is to come, at work or over."""

    def __init__(self, label: str, fault: Fault) -> None:
        self.label = label
        self.fault = fault
        self.state = "pending"
        self.spent = asyncio.Event()
        self._left = fault.count

    def strike(self) -> None:
        """Use it once."""
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self.spent.set()


class Faults:
    """The faults at work."""

    def __init__(self) -> None:
        self._incidents: list[Incident] = []

    def begin(self, incident: Incident) -> None:
        self._incidents.append(incident)

    def end(self, incident: Incident) -> None:
        self._incidents.remove(incident)

    def of(self, *kinds: str) -> Iterator[Incident]:
        """Those of these kinds that are not spent."""
        return (one for one in self._incidents if one.fault.kind in kinds and not one.spent.is_set())

    def strike(self, kind: str, topic: Topic | None = None, exchange: int | None = None) -> Incident | None:
        """Use the first of this kind that covers the topic; None if there is none."""
        for incident in self.of(kind):
            if incident.fault.covers(topic, exchange):
                incident.strike()
                return incident
        return None
