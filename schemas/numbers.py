"""Decimals as they are written everywhere: exact, plain notation, no trailing zeros."""

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
