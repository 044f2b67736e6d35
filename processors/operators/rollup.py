"""Minutes of a symbol merged into longer ranges, and kept small: an hour of them as one compressed piece."""

import zlib
from collections.abc import Iterable
from decimal import Decimal

import msgspec

from schemas.events import MINUTE_NS, Bar, MinuteEmpty
from schemas.numbers import EXACT, ZERO

HOUR_NS = 60 * MINUTE_NS
FLAGS = {"partial": 1, "gap": 2, "late": 4, "repaired": 8}
AGGREGATES, EMPTY = 16, 32  # marks beside the flags: made from the vendor's aggregates; without any trade
FIVE = 5  # minutes: every longer interval is a multiple


class Row(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What some minutes add to a bar. `known`: a bit for each minute of their hour that has a record. `repair` and
    `revision` are their share of the order; `marks` are flags and what stands beside them. `unsided` is the volume
    neither bought nor sold, so often 0 that it takes less room than what was sold. Where all minutes were EMPTY the
    prices mean nothing."""

    known: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    notional: Decimal
    buy: Decimal
    unsided: Decimal
    count: int
    repair: int
    revision: int
    marks: int
    missing_ns: int


def row_of(event: Bar | MinuteEmpty) -> Row:
    """A minute that has a record. It counts one more than its revision, so that a minute's first bar counts too."""
    known = 1 << event.start // MINUTE_NS % 60
    if isinstance(event, MinuteEmpty):
        prices = (ZERO,) * 8
        return Row(known, *prices, 0, event.repair, 1, FLAGS["repaired"] | EMPTY, 0)
    marks = AGGREGATES if event.source == "aggregates" else 0
    for flag in event.flags:
        marks |= FLAGS.get(flag, 0)
    return Row(
        known,
        event.open,
        event.high,
        event.low,
        event.close,
        event.volume,
        event.notional,
        event.buy_volume,
        EXACT.subtract(event.volume, EXACT.add(event.buy_volume, event.sell_volume)),
        event.trade_count,
        event.repair,
        event.revision + 1,
        marks,
        event.missing_ns,
    )


def merge(rows: Iterable[Row]) -> Row | None:
    """One row of several in the order of time, sums exact; None of none. A range is EMPTY if all in it are."""
    known = count = repair = revision = marks = missing_ns = 0
    open_ = high = low = close = None
    volume = notional = buy = unsided = ZERO
    add = EXACT.add
    for row in rows:
        known |= row.known
        repair += row.repair
        revision += row.revision
        marks |= row.marks & ~EMPTY
        missing_ns += row.missing_ns
        if row.marks & EMPTY:
            continue
        if open_ is None or high is None or low is None:
            open_, high, low = row.open, row.high, row.low
        else:
            if row.high > high:
                high = row.high
            if row.low < low:
                low = row.low
        close = row.close
        volume = add(volume, row.volume)
        notional = add(notional, row.notional)
        buy = add(buy, row.buy)
        unsided = add(unsided, row.unsided)
        count += row.count
    if open_ is None or high is None or low is None or close is None:
        if not known:
            return None
        open_ = high = low = close = ZERO
        marks |= EMPTY
    return Row(
        known, open_, high, low, close, volume, notional, buy, unsided, count, repair, revision, marks, missing_ns
    )


_encode = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(Row).decode
_decode = msgspec.msgpack.Decoder().decode


_NO_ROWS: dict[int, bytes] = {}  # those of all that is packed: never written to
_NO_FIVES: dict[int, Row | None] = {}


class Hour:
    """The newest record of each minute of a symbol's hour.

    While it is worked with, minutes stand apart, encoded, and merged by fives; packed it is one compressed piece and
    the row of the whole hour. Decimals as objects would take twenty times the room.
    """

    __slots__ = ("_fives", "_packed", "_rows", "_whole")

    def __init__(self) -> None:
        self._rows: dict[int, bytes] = {}
        self._fives: dict[int, Row | None] = {}
        self._packed = b""
        self._whole = b""

    def put(self, minute: int, row: Row) -> bool:
        """Keeps the higher order of two; whether it was the new one. `minute` is from 0 to 59."""
        self._unpack()
        held = self._rows.get(minute)
        if held is not None:
            other = _decode_row(held)
            if (row.repair, row.revision) <= (other.repair, other.revision):
                return False
        self._rows[minute] = _encode(row)
        self._fives.pop(minute // FIVE, None)
        return True

    def part(self, minute: int, minutes: int) -> Row | None:
        """The minutes from `minute` on as one row, None where none has a record; both are multiples of five."""
        if minutes == 60 and self._packed:
            return _decode_row(self._whole)
        self._unpack()
        fives = (self._five(five) for five in range(minute // FIVE, (minute + minutes) // FIVE))
        return merge(five for five in fives if five)

    def pack(self) -> None:
        """As little memory as it goes, until it is worked with again."""
        if not self._packed:
            self._whole = _encode(self.part(0, 60))
            rows = [_decode(row) for _, row in sorted(self._rows.items())]
            self._packed = zlib.compress(_encode(list(zip(*rows, strict=True))))  # fields side by side: a fifth smaller
            self._rows, self._fives = _NO_ROWS, _NO_FIVES

    def rows(self) -> dict[int, Row]:
        """By minute."""
        self._unpack()
        return {minute: _decode_row(row) for minute, row in self._rows.items()}

    def _unpack(self) -> None:
        if self._packed:
            rows = zip(*_decode(zlib.decompress(self._packed)), strict=True)
            self._rows = {row[0].bit_length() - 1: _encode(row) for row in rows}
            self._fives = {}
            self._packed = self._whole = b""

    def _five(self, five: int) -> Row | None:
        if five not in self._fives:
            rows = (self._rows.get(minute) for minute in range(five * FIVE, five * FIVE + FIVE))
            self._fives[five] = merge(_decode_row(row) for row in rows if row)
        return self._fives[five]
