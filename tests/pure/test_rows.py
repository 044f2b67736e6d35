"""What a topic's values become in COPY's text format."""

from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec
import pytest

from schemas import events
from sinks import tables

TRADE = events.Trade(
    symbol="BTC-USD",
    ts_event=1_723_161_240_000_000_000,
    ts_recv=1_723_161_240_000_000_001,
    ts_vendor=None,
    price=Decimal("61000.1"),
    size=Decimal("0.00000001"),
    side="buy",
    exchange=1,
    trade_id="a 1",
    conditions=[1, 2],
    flags=["late", "repaired"],
    epoch=-3,
    partition=0,
    n=7,
)
QUOTE = events.Quote("X", 1, 2, Decimal(3), None, Decimal("0.5"), Decimal(0), None, 1, 0, 7)
BAR = events.Bar(
    *("BTC-USD", "1m", 0, 60, *map(Decimal, (1, 3, 1, 2, 4)), Decimal("1.5"), Decimal("6.25"), 4, Decimal(3)),
    *(Decimal(1), "final", 0, 0, ["partial"], 0, Decimal("0.9833"), "trades", "f"),
)
ROW = (
    rb"BTC-USD	1723161240000000000	1723161240000000001	\N	61000.1	0.00000001	buy	1	a 1	{1,2}	"
    b'{"late","repaired"}\t-3\t0\t7\n'
)


def never(value: bytes) -> Any:
    raise AssertionError(value)


def values(row: bytes) -> list[Decimal | str]:
    """What its cells say, however numbers and lists are written."""
    return [number(cell) for cell in row.decode().removesuffix("\n").replace('"', "").split("\t")]


def number(cell: str) -> Decimal | str:
    try:
        return Decimal(cell)
    except InvalidOperation:
        return cell


@pytest.mark.parametrize("event", [TRADE, QUOTE, BAR])
def test_what_our_encoder_wrote_is_not_decoded(event: msgspec.Struct) -> None:
    line = tables._lines(type(event), never)(events.encode(event))
    assert line is not None
    assert line.count(b"\t") == len(msgspec.structs.astuple(event)) - 1


def test_a_row_says_what_the_event_says() -> None:
    assert tables.TRADES.line(events.encode(TRADE)) == ROW


def test_only_what_decoding_would_read_alike_is_taken_undecoded() -> None:
    """A trade with a byte changed, left out or put in, anywhere: 12,000 of them."""
    value, undecoded, taken = events.encode(TRADE), tables._lines(events.Trade, never), 0
    for at in range(len(value)):
        for change in (b"", *(bytes([byte]) for byte in b'"\\,:[]{}0-.e 1n\t\n\xff')):
            for after in (at, at + 1):
                spoilt = value[:at] + change + value[after:]
                try:
                    row = undecoded(spoilt)
                except AssertionError:
                    continue
                taken += 1
                decoded = tables.TRADES.line(b" " + spoilt)  # with a space it is not what our encoder writes
                assert values(row or b"") == values(decoded or b"")
    assert taken > 1000
