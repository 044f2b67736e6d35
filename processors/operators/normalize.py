"""Polygon's messages to our events, or the reason why not. Nothing is remembered."""

from decimal import Decimal, Inexact, InvalidOperation
from functools import lru_cache

from schemas.events import NS_PER_MS, Quote, Side, Trade, VendorBar
from schemas.numbers import ACCEPTED, LEAST, MOST, ZERO, canonical
from schemas.wire import EARLIEST_MS, LATEST_MS, XA, XAS, XQ, XT, symbol_of

SELL, BUY = 1, 2  # Polygon's crypto conditions "sellside" and "buyside": the aggressor's side


class CannotNormalize(ValueError):
    """The message is well-formed JSON of a known type, and yet cannot be true."""


def _number(name: str, number: Decimal, positive: bool) -> Decimal:
    """Its canonical form; raises CannotNormalize."""
    try:
        if LEAST <= number <= MOST:
            return canonical(number, ACCEPTED)
    except InvalidOperation:  # NaN cannot be compared
        raise CannotNormalize(f"{name} is not a number") from None
    except Inexact:
        raise CannotNormalize(f"{name} has more than {ACCEPTED.prec} digits") from None
    if number.is_zero() and not positive:
        return ZERO
    bounds = f"from {LEAST} to {MOST}" if positive else f"zero or from {LEAST} to {MOST}"
    raise CannotNormalize(f"{name} is {number:.20g}, not {bounds}")


def _plain(name: str, number: Decimal | None) -> Decimal | None:
    return None if number is None else _number(name, number, False)


def _time(name: str, time_ms: int) -> int:
    """The time in ns; raises CannotNormalize for what is no time in milliseconds."""
    if not EARLIEST_MS <= time_ms < LATEST_MS:
        raise CannotNormalize(f"{name} is {time_ms}, not a time in milliseconds")
    return time_ms * NS_PER_MS


@lru_cache(maxsize=65536)
def _symbol(pair: str) -> str:
    try:
        return symbol_of(pair)
    except ValueError as error:
        raise CannotNormalize(str(error)) from error


def _small_int(name: str, number: int | None) -> int | None:
    if number is not None and not 0 <= number < 2**31:
        raise CannotNormalize(f"{name} is {number}, out of bounds")
    return number


def side_of(conditions: list[int] | None) -> Side:
    """The aggressor's side as the vendor's conditions tell it."""
    if conditions:
        if BUY in conditions:
            return "unknown" if SELL in conditions else "buy"
        if SELL in conditions:
            return "sell"
    return "unknown"


def trade(message: XT, recv: int, flags: list[str], epoch: int, partition: int, n: int) -> Trade:
    """Raises CannotNormalize."""
    trade_id = str(message.i)
    if not trade_id or len(trade_id) > 200 or "\x00" in trade_id:
        raise CannotNormalize("trade id is empty, too long or has a NUL in it")
    if message.c and len(message.c) > 100:
        raise CannotNormalize(f"{len(message.c)} conditions")
    if message.c and not all(-(2**31) <= condition < 2**31 for condition in message.c):
        raise CannotNormalize("a condition is out of bounds")
    exchange = _small_int("exchange", message.x)
    assert exchange is not None
    return Trade(
        _symbol(message.pair),
        _time("t", message.t),
        recv,
        None if message.r is None else _time("r", message.r),
        _number("price", message.p, True),
        _number("size", message.s, True),
        side_of(message.c),
        exchange,
        trade_id,
        message.c or [],
        flags,
        epoch,
        partition,
        n,
    )


def quote(message: XQ, recv: int, epoch: int, partition: int, n: int) -> Quote:
    """Raises CannotNormalize."""
    return Quote(
        _symbol(message.pair),
        _time("t", message.t),
        recv,
        _number("bid price", message.bp, False),
        _plain("bid size", message.bs),
        _number("ask price", message.ap, False),
        _plain("ask size", message.as_),
        _small_int("exchange", message.x),
        epoch,
        partition,
        n,
    )


def vendor_bar(message: XA | XAS, recv: int, epoch: int, partition: int, n: int) -> VendorBar:
    """Raises CannotNormalize."""
    start, end = _time("s", message.s), _time("e", message.e)
    if end <= start:
        raise CannotNormalize("the aggregate ends before it starts")
    return VendorBar(
        _symbol(message.pair),
        "1s" if isinstance(message, XAS) else "1m",
        start,
        end,
        recv,
        _number("open", message.o, True),
        _number("high", message.h, True),
        _number("low", message.l, True),
        _number("close", message.c, True),
        _number("volume", message.v, False),
        _plain("vwap", message.vw),
        epoch,
        partition,
        n,
    )
