"""The vendor's minute aggregates (XA) of one pair, made of the very trades that are published."""

MINUTE_MS = 60_000
SIZE_DIGITS = 8

_KEPT_MINUTES = 8  # no trade is published longer after its time than the market's greatest lateness


class Minute:
    """One minute's aggregate so far; prices in ticks, volume in 1e-8 of the base currency.

    Open and close go by exchange time, trades of one millisecond by the order of publication.
    """

    def __init__(self, start_ms: int) -> None:
        self.start_ms = start_ms
        self.scheduled = False  # to be sent; a trade after that schedules it again: a revision
        self.trades = 0
        self.volume = 0
        self.notional = 0
        self._first: tuple[int, int] | None = None
        self._last: tuple[int, int] | None = None
        self.high = 0
        self.low = 0

    @property
    def end_ms(self) -> int:
        return self.start_ms + MINUTE_MS

    def add(self, t_ms: int, price: int, size: int) -> None:
        """Take in a trade of this minute."""
        if self._first is None or t_ms < self._first[0]:
            self._first = (t_ms, price)
        if self._last is None or t_ms >= self._last[0]:
            self._last = (t_ms, price)
        self.high = max(self.high, price)
        self.low = min(self.low, price) if self.trades else price
        self.trades += 1
        self.volume += size
        self.notional += price * size

    def encode(self, symbol: str, digits: int) -> bytes:
        """The XA message; `digits` is the number of decimals of a price, and vw has four more."""
        if self._first is None or self._last is None:
            raise ValueError("a minute without trades has no aggregate")
        vwap = (self.notional * 20_000 + self.volume) // (2 * self.volume)
        mean = self.volume // self.trades
        return (
            f'{{"ev":"XA","pair":"{symbol}","v":{decimal(self.volume, SIZE_DIGITS)}'
            f',"vw":{decimal(vwap, digits + 4)},"z":{decimal(mean, SIZE_DIGITS)}'
            f',"o":{decimal(self._first[1], digits)},"c":{decimal(self._last[1], digits)}'
            f',"h":{decimal(self.high, digits)},"l":{decimal(self.low, digits)}'
            f',"s":{self.start_ms},"e":{self.end_ms}}}'
        ).encode()


class Minutes:
    """The recent minutes of one pair."""

    def __init__(self) -> None:
        self._minutes: dict[int, Minute] = {}

    def add(self, t_ms: int, price: int, size: int) -> Minute:
        """Take in a trade; returns its minute."""
        start_ms = t_ms - t_ms % MINUTE_MS
        minute = self._minutes.get(start_ms)
        if minute is None:
            minute = self._minutes[start_ms] = Minute(start_ms)
            if len(self._minutes) > _KEPT_MINUTES:
                del self._minutes[min(self._minutes)]
        minute.add(t_ms, price, size)
        return minute


def decimal(number: int, digits: int) -> str:
    """`number` / 10**digits as plain JSON, exact, without trailing zeros: (4522000, 8) is 0.04522."""
    whole, fraction = divmod(number, 10**digits)
    return f"{whole}.{fraction:0{digits}}".rstrip("0").rstrip(".") if fraction else str(whole)
