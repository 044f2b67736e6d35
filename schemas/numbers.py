"""Decimals as they are written everywhere: exact, plain notation, no trailing zeros."""

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation
from typing import cast

import msgspec

# Wide enough that no sum or product of accepted numbers is ever rounded; Inexact traps the day it is not.
EXACT = Context(prec=200, rounding=ROUND_HALF_EVEN, traps=[Inexact, InvalidOperation])
# What is accepted from a feed: at most 40 digits, from 1e-20 to 1e20, so that products and sums fit in EXACT.
ACCEPTED = Context(prec=40, traps=[Inexact, InvalidOperation])
LEAST, MOST = Decimal("1e-20"), Decimal("1e20")
VWAP = Context(prec=12, rounding=ROUND_HALF_EVEN)
ZERO = Decimal(0)


def canonical(number: Decimal, context: Context = EXACT) -> Decimal:
    """The same value without trailing zeros and without a positive exponent (1E+3 becomes 1000).

    Raises decimal.Inexact when it has more digits than the context.
    """
    return context.add(context.normalize(number), ZERO)


def plain_json(number: Decimal) -> Decimal:
    """Something msgspec writes as a plain JSON number; `number` must be canonical.

    str() of a Decimal below 1e-6 is scientific, so those are handed over as ready-made JSON text.
    """
    if number.adjusted() < -6:
        return cast(Decimal, msgspec.Raw(format(number, "f").encode()))
    return number


class Number(msgspec.Struct, frozen=True, gc=False):
    """An accepted number: exact, as ready-made JSON text in the guise of a Decimal, and as a float to judge by."""

    exact: Decimal
    json: Decimal
    approx: float


class NotAccepted(ValueError):
    """It is no number, or one out of bounds; says what it is."""


_decode = msgspec.json.Decoder(Decimal).decode
# Canonical already, and within ACCEPTED's digits and bounds: up to 20 digits before the point, 19 behind it.
_ready = re.compile(rb"(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{0,18}[1-9])?").fullmatch
_number = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?").fullmatch
REMEMBERED = 32_768  # texts, of at most so many bytes
SHORT = 48
ABSENT = Number(ZERO, cast(Decimal, None), 0.0)


class Numbers(dict[bytes, Number]):
    """JSON texts of numbers to what they mean; remembers, for prices and sizes come again. Raises NotAccepted.

    `positive`: zero is refused. `optional`: null, or nothing at all, is ABSENT.
    """

    def __init__(self, positive: bool = False, optional: bool = False) -> None:
        self._bounds = f"from {LEAST} to {MOST}" if positive else f"zero or from {LEAST} to {MOST}"
        self._positive, self._optional = positive, optional

    def __missing__(self, text: bytes) -> Number:
        if self._optional and text in (b"", b"null"):
            return ABSENT
        if _ready(text):
            plain, written = text, text.decode()
            exact = Decimal(written)
        else:
            exact, written = self._canonical(text)
            plain = written.encode()
        if not exact and self._positive:
            raise NotAccepted(f"is 0, not {self._bounds}")
        number = Number(exact, cast(Decimal, msgspec.Raw(plain)), float(written))
        if len(text) <= SHORT:
            if len(self) >= REMEMBERED:
                self.clear()
            self[text] = number
        return number

    def _canonical(self, text: bytes) -> tuple[Decimal, str]:
        if text[:1] == b'"' and not _number(text[1:-1]):  # decimal.Decimal would read much more than that
            raise NotAccepted("is not a number")
        try:
            number = _decode(text)
            if LEAST <= number <= MOST:
                number = canonical(number, ACCEPTED)
            elif number.is_zero():
                number = ZERO
            else:
                raise NotAccepted(f"is {number:.20g}, not {self._bounds}")
        except Inexact:
            raise NotAccepted(f"has more than {ACCEPTED.prec} digits") from None
        except (InvalidOperation, msgspec.MsgspecError, UnicodeDecodeError):  # NaN cannot be compared
            raise NotAccepted("is not a number") from None
        return number, format(number, "f")


_optional = Numbers(optional=True)


def ready(json: msgspec.Raw) -> Decimal | None:
    """A number that nobody reckons with, as ready-made JSON in the guise of a Decimal; None for null and for nothing.
    It is not remembered: what is canonical goes on as it came. Raises NotAccepted."""
    return cast(Decimal, json) if _ready(json) else _optional[bytes(json)].json


def decimal_of(json: bytes) -> Decimal | None:
    """The number of a JSON text, as it stands; None for null and for nothing."""
    return None if json in (b"", b"null") else _decode(json)
