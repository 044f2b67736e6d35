"""What faults do to frames: junk that no client should swallow, and events with a wrong time or price."""

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from itertools import groupby

from schemas import wire
from simulator.faults import Faults, Incident
from simulator.frame import Event, Frame, Topic, join

MIB = 2**20

_TIMES = {"XA": re.compile(rb'("[se]"\s*:\s*)(\d+)'), "XAS": re.compile(rb'("[se]"\s*:\s*)(\d+)')}
_TIME = re.compile(rb'("t"\s*:\s*)(\d+)')
_PRICE = re.compile(rb'("p"\s*:\s*)([-+.\deE]+)')


def junk(kind: str, mib: float) -> bytes:
    """A message of this kind of fault; only `huge` has a size."""
    match kind:
        case "malformed":
            return b'[{"ev":"XT","pair":"BTC-USD","p":61000.1,"t":17'
        case "not-array":
            return b'{"ev":"XT","pair":"BTC-USD"}'
        case "truncated":
            return b'[{"ev":"XT","pair":"BTC-USD","note":"\xe2\x82"}]'  # two of the three bytes of a euro sign
        case "huge":
            head, tail = b'[{"ev":"huge","pad":"', b'"}]'
            return head + b"x" * (int(mib * MIB) - len(head) - len(tail)) + tail
    raise ValueError(f"{kind} has no message of its own")


def alter(
    frame: Frame, faults: Faults, wanted: Callable[[Topic | None], bool]
) -> Iterable[tuple[Frame, Incident | None]]:
    """The frame cut into the events that a clock or spike fault changed, with that fault, and the others."""
    if not any(faults.of("clock", "spike")):
        return [(frame, None)]
    changed = [_strike(event, faults) if wanted(event.topic) else (event, None) for event in frame.events]
    if all(incident is None for _, incident in changed):
        return [(frame, None)]
    cut = []
    for incident, run in groupby(changed, key=lambda one: one[1]):
        events = [event for event, _ in run]
        cut.append((Frame(frame.offset_ns, frame.clock_ns, join(events), events), incident))
    return cut


def _strike(event: Event, faults: Faults) -> tuple[Event, Incident | None]:
    topic = event.topic
    if topic is None:
        return event, None
    try:
        exchange = wire.decode_head(event.data).x
    except wire.DECODE_ERRORS:
        return event, None
    if (incident := faults.strike("clock", topic, exchange)) is not None:
        ahead_ms = int((incident.fault.amount or 0) * 1000)
        times = _TIMES.get(topic[0], _TIME)
        data = times.sub(lambda found: b"%b%d" % (found[1], int(found[2]) + ahead_ms), event.data)
        return Event(topic, data), incident
    if topic[0] == "XT" and (incident := faults.strike("spike", topic, exchange)) is not None:
        factor = 1 + Decimal(str(incident.fault.amount)) / 100
        data = _PRICE.sub(lambda found: found[1] + _times(found[2], factor), event.data)
        return Event(topic, data), incident
    return event, None


def _times(price: bytes, factor: Decimal) -> bytes:
    """The price times the factor, with the decimals it had."""
    old = Decimal(price.decode())
    return f"{(old * factor).quantize(old):f}".encode()
