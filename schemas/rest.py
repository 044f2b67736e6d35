"""A record of `raw.rest.v1`: a part of what the vendor's REST said of one pair's minute, byte for byte.

Its value is a JSON array of REST's results; headers `kind` (`repair`), `repair` (JSON of Repair) and `recv` (ns).
A group is all the parts of one (number, pair, minute).
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec
from msgspec import Raw

from schemas.events import MINUTE_NS, NS_PER_MS
from schemas.wire import EARLIEST_MS, LATEST_MS, Conditions, SmallInt

MAX_PART_RESULTS = 500
MAX_PART_BYTES = 512 * 1024
MAX_PARTS = 1_000  # half a million trades in a minute


class Repair(msgspec.Struct, frozen=True):
    """`number`: from 1, a new one for each attempt. `pair` with its hyphen; without one its last three letters are the
    quote currency (docs/protocol.md). `minute` its start in ns, `part` from 0. `of`: whether the results are those of
    `/v3/trades` or the one of `/v2/aggs`."""

    number: int
    pair: str
    minute: int
    part: int
    parts: int
    of: Literal["trades", "aggregates"]


Headers = list[tuple[str, bytes]]


class RestRecord(NamedTuple):
    """A record as Kafka has it; `timestamp_ms` is the feed clock at the raw topic's last tick."""

    timestamp_ms: int
    headers: Headers
    value: bytes
    offset: int


class NotARepair(ValueError):
    """The headers are not what the topic's contract says."""


class RestTrade(msgspec.Struct, frozen=True):
    """A result of `/v3/trades/{ticker}`; `participant_timestamp` is in ns."""

    participant_timestamp: int
    price: Raw
    size: Raw
    exchange: SmallInt
    id: str | int
    conditions: Conditions | None = None


class RestAggregate(msgspec.Struct, frozen=True):
    """A result of `/v2/aggs/ticker/{ticker}/range/1/minute/…`; `t` is its start in ms, `n` the number of trades. The
    vendor's specification lets `vw` and `n` be absent; without them it makes no bar."""

    o: Raw
    h: Raw
    l: Raw  # noqa: E741 - the vendor's name
    c: Raw
    v: Raw
    vw: Raw
    t: int
    n: SmallInt


decode_rest_trade = msgspec.json.Decoder(RestTrade).decode
decode_rest_aggregate = msgspec.json.Decoder(RestAggregate).decode
_decode_repair = msgspec.json.Decoder(Repair).decode


def repair_of(headers: Headers) -> tuple[Repair, int]:
    """What a record is part of, and when it was received, ns; raises NotARepair."""
    found = dict(headers)
    try:
        if found["kind"] != b"repair":
            raise ValueError(f"kind is {found['kind']!r}")
        repair, recv = _decode_repair(found["repair"]), int(found["recv"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise NotARepair(f"headers are not those of a repair: {error!r}") from error
    if not (0 < repair.number < 2**48 and 0 <= repair.part < repair.parts <= MAX_PARTS and 0 <= recv < 2**63):
        raise NotARepair(f"number, part or time of a repair out of bounds: {repair}, {recv}")
    if repair.minute % MINUTE_NS or not EARLIEST_MS <= repair.minute // NS_PER_MS < LATEST_MS:
        raise NotARepair(f"{repair.minute} is not the start of a minute in ns")
    return repair, recv


def records_of(
    number: int, pair: str, minute: int, of: Literal["trades", "aggregates"], results: Iterable[bytes], recv: int
) -> list[tuple[Headers, bytes]]:
    """(headers, value) of each part of a group of REST's results, each the bytes of one JSON object, in the order of
    time (`order=asc`). A group without results has one part. `minute` and `recv` in ns."""
    parts: list[list[bytes]] = [[]]
    size = len(b"[]")
    for result in results:
        if parts[-1] and (len(parts[-1]) == MAX_PART_RESULTS or size + len(result) > MAX_PART_BYTES):
            parts.append([])
            size = len(b"[]")
        parts[-1].append(result)
        size += len(result) + 1
    return [
        (_headers(Repair(number, pair, minute, part, len(parts), of), recv), b"[" + b",".join(results) + b"]")
        for part, results in enumerate(parts)
    ]


def _headers(repair: Repair, recv: int) -> Headers:
    return [("kind", b"repair"), ("repair", msgspec.json.encode(repair)), ("recv", b"%d" % recv)]
