"""Polygon's messages to our events, or the reason why not. Nothing is remembered."""

from functools import lru_cache

from schemas.events import NS_PER_MS, Quote, Side, Trade, VendorBar
from schemas.numbers import ABSENT, NotAccepted, Number, Numbers, ready
from schemas.wire import EARLIEST_MS, LATEST_MS, XA, XAS, XQ, XT, symbol_of

SELL, BUY = 1, 2  # Polygon's crypto conditions "sellside" and "buyside": the aggressor's side
NO_FLAGS: list[str] = []

positive, plain, optional = Numbers(positive=True), Numbers(), Numbers(optional=True)


class CannotNormalize(ValueError):
    """The message is well-formed JSON of a known type, and yet cannot be true."""


def _time(name: str, time_ms: int) -> int:
    """The time in ns; raises CannotNormalize for what is no time in milliseconds."""
    if not EARLIEST_MS <= time_ms < LATEST_MS:
        raise CannotNormalize(f"{name} is {time_ms}, not a time in milliseconds")
    return time_ms * NS_PER_MS


def number(name: str, text: bytes, numbers: Numbers) -> Number:
    """Raises CannotNormalize with the name, which the tables do not know."""
    try:
        return numbers[text]
    except NotAccepted as error:
        raise CannotNormalize(f"{name} {error}") from None


@lru_cache(maxsize=65536)
def _symbol(pair: str) -> str:
    try:
        return symbol_of(pair)
    except ValueError as error:
        raise CannotNormalize(str(error)) from error


def side_of(conditions: list[int] | None) -> Side:
    """The aggressor's side as the vendor's conditions tell it."""
    if conditions:
        if BUY in conditions:
            return "unknown" if SELL in conditions else "buy"
        if SELL in conditions:
            return "sell"
    return "unknown"


def trade(message: XT, recv: int, flags: list[str], epoch: int, partition: int, n: int) -> tuple[Trade, Number, Number]:
    """The trade with its price and size, which stand in it as ready-made JSON. Raises CannotNormalize."""
    trade_id = message.i
    if type(trade_id) is not str:
        trade_id = str(trade_id)
    if not trade_id or len(trade_id) > 200 or "\x00" in trade_id:
        raise CannotNormalize("trade id is empty, too long or has a NUL in it")
    ts, received = message.t, message.r
    if not EARLIEST_MS <= ts < LATEST_MS:
        _time("t", ts)
    try:
        price, size = positive[bytes(message.p)], positive[bytes(message.s)]
    except NotAccepted:
        number("price", bytes(message.p), positive)
        number("size", bytes(message.s), positive)
        raise
    conditions = message.c
    symbol = _symbol(message.pair)
    if received is not None:
        received = received * NS_PER_MS if EARLIEST_MS <= received < LATEST_MS else _time("r", received)
    event = Trade(
        symbol,
        ts * NS_PER_MS,
        recv,
        received,
        price.json,
        size.json,
        side_of(conditions),
        message.x,
        trade_id,
        conditions or [],
        flags,
        epoch,
        partition,
        n,
    )
    return event, price, size


def quote(message: XQ, recv: int, epoch: int, partition: int, n: int) -> tuple[Quote, Number, Number]:
    """The quote with its bid and ask price, which stand in it as ready-made JSON. Raises CannotNormalize."""
    ts = message.t
    if not EARLIEST_MS <= ts < LATEST_MS:
        _time("t", ts)
    try:
        bid, ask = plain[bytes(message.bp)], plain[bytes(message.ap)]
        bid_size, ask_size = ready(message.bs), ready(message.as_)
    except NotAccepted:
        number("bid price", bytes(message.bp), plain)
        number("ask price", bytes(message.ap), plain)
        number("bid size", bytes(message.bs), optional)
        number("ask size", bytes(message.as_), optional)
        raise
    event = Quote(
        _symbol(message.pair),
        ts * NS_PER_MS,
        recv,
        bid.json,
        bid_size,
        ask.json,
        ask_size,
        message.x,
        epoch,
        partition,
        n,
    )
    return event, bid, ask


def vendor_bar(message: XA | XAS, recv: int, epoch: int, partition: int, n: int) -> VendorBar:
    """Raises CannotNormalize."""
    start, end = _time("s", message.s), _time("e", message.e)
    if end <= start:
        raise CannotNormalize("the aggregate ends before it starts")
    vwap = number("vwap", bytes(message.vw), optional)
    return VendorBar(
        _symbol(message.pair),
        "1s" if isinstance(message, XAS) else "1m",
        start,
        end,
        recv,
        number("open", bytes(message.o), positive).exact,
        number("high", bytes(message.h), positive).exact,
        number("low", bytes(message.l), positive).exact,
        number("close", bytes(message.c), positive).exact,
        number("volume", bytes(message.v), plain).exact,
        None if vwap is ABSENT else vwap.exact,
        epoch,
        partition,
        n,
    )
