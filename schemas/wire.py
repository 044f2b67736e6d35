"""Polygon's crypto WebSocket messages, as the wire has them (docs/protocol.md), not as the spec says.

Times are integer milliseconds, unknown fields are ignored. `i` is an integer or a string; captured quotes
have undocumented fields; sizes come in scientific notation. Numbers are left as the
JSON that they are (schemas.numbers.Numbers reads them): most are seen again and again. Without gc, for events
come by the million and none can be part of a cycle.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Raw

SmallInt = Annotated[int, Meta(ge=0, lt=2**31)]
Conditions = Annotated[list[Annotated[int, Meta(ge=-(2**31), lt=2**31)]], Meta(max_length=100)]


class XT(msgspec.Struct, tag_field="ev", tag="XT", frozen=True, gc=False):
    """A trade: price, size, exchange time, trade id, exchange, conditions, the vendor's receive time."""

    pair: str
    p: Raw
    s: Raw
    t: int
    i: int | str
    x: SmallInt
    c: Conditions | None = None
    r: int | None = None


class XQ(msgspec.Struct, tag_field="ev", tag="XQ", frozen=True, gc=False):
    """A best bid and ask."""

    pair: str
    bp: Raw
    ap: Raw
    t: int
    bs: Raw = Raw()
    as_: Raw = msgspec.field(default=Raw(), name="as")
    x: SmallInt | None = None
    r: int | None = None


class XA(msgspec.Struct, tag_field="ev", tag="XA", frozen=True, gc=False):
    """The vendor's minute aggregate for [s, e); sent again with other values when it is revised."""

    pair: str
    o: Raw
    h: Raw
    l: Raw  # noqa: E741 - the vendor's name
    c: Raw
    v: Raw
    s: int
    e: int
    vw: Raw = Raw()
    z: Raw = Raw()


class XAS(XA, tag_field="ev", tag="XAS", frozen=True):
    """The same for a second."""


class LeftOut(msgspec.Struct, tag_field="ev", tag="left-out", frozen=True, gc=False):
    """Not the vendor's: it stands where a filtered replay left an event out, so that the others keep their numbers."""


LEFT_OUT = b'{"ev":"left-out"}'
Message = XT | XQ | XA | XAS | LeftOut
STREAMS = ("XT", "XQ", "XA", "XAS")


class Head(msgspec.Struct, frozen=True):
    """The fields of any message that routing and the feed clock need; `s` is a time in XA, a size in XT."""

    ev: str
    pair: str = ""
    t: int | None = None
    s: int | float | None = None
    x: int | None = None
    status: str | None = None
    message: str | None = None

    @property
    def time_ms(self) -> int | None:
        """Event time in ms, or None where the message carries none that could be true."""
        time = self.s if self.ev in ("XA", "XAS") else self.t
        return time if isinstance(time, int) and EARLIEST_MS <= time < LATEST_MS else None


# A time outside these bounds is not a time in milliseconds: before Bitcoin, or past the year 2200.
EARLIEST_MS = 1_230_768_000_000
LATEST_MS = 7_258_118_400_000

decode_slice = msgspec.json.Decoder(list[Message]).decode
decode_message = msgspec.json.Decoder(Message).decode
split_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
decode_heads = msgspec.json.Decoder(list[Head]).decode
decode_head = msgspec.json.Decoder(Head).decode

# Deeper events are bad. The interpreter's own limit counts the caller's frames too, so that an event could be
# a trade in one process and a dead letter in another.
MAX_DEPTH = 64

#: What the decoders raise: wrong JSON or shape, text that is not UTF-8, nesting bombs.
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


MAX_PAIR = 40  # letters; no exchange lists a longer one, and a table's key has its limits


def symbol_of(pair: str) -> str:
    """`BTC-USD` for `BTC-USD`, `X:BTC-USD`, `X:BTCUSD`, `BTCUSD`; raises ValueError for anything else.

    Without a hyphen the last three letters are the quote currency: never longer, for `BTCTUSD` or
    `XUSDT` cannot be told apart by looking (docs/protocol.md).
    """
    name = pair.removeprefix("X:") if len(pair) <= MAX_PAIR else ""
    base, hyphen, quote = name.partition("-")
    if not hyphen:
        base, quote = name[:-3], name[-3:]
    if not (base.isascii() and base.isalnum() and quote.isascii() and quote.isalnum()):
        raise ValueError(f"{pair[:MAX_PAIR]!r} is not a currency pair like BTC-USD")
    return f"{base}-{quote}".upper()
