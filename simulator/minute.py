"""The vendor's minute and second aggregates (XA, XAS) of one pair, made of the very trades that are published."""

SIZE_DIGITS = 8

_KEPT_MS = 8 * 60_000  # no trade is published longer after its time than the market's greatest lateness


class Minute:
    """One minute's aggregate so far; prices in ticks, volume in 1e-8 of the base currency.

    Open and close go by exchange time, trades of one millisecond by the order of publication.
    """

    channel = "XA"
    width_ms = 60_000

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
        return self.start_ms + self.width_ms

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
        """The message; `digits` is the number of decimals of a price, and vw has four more."""
        if self._first is None or self._last is None:
            raise ValueError("a minute without trades has no aggregate")
        vwap = (self.notional * 20_000 + self.volume) // (2 * self.volume)
        mean = self.volume // self.trades
        return (
            f'{{"ev":"{self.channel}","pair":"{symbol}","v":{decimal(self.volume, SIZE_DIGITS)}'
            f',"vw":{decimal(vwap, digits + 4)},"z":{decimal(mean, SIZE_DIGITS)}'
            f',"o":{decimal(self._first[1], digits)},"c":{decimal(self._last[1], digits)}'
            f',"h":{decimal(self.high, digits)},"l":{decimal(self.low, digits)}'
            f',"s":{self.start_ms},"e":{self.end_ms}}}'
        ).encode()


class Second(Minute):
    """The same of a second."""

    channel = "XAS"
    width_ms = 1_000


class Windows:
    """The recent minutes, or seconds, of one pair."""

    def __init__(self, kind: type[Minute]) -> None:
        self._kind = kind
        self._windows: dict[int, Minute] = {}

    def add(self, t_ms: int, price: int, size: int) -> Minute:
        """Take in a trade; returns its window."""
        start_ms = t_ms - t_ms % self._kind.width_ms
        window = self._windows.get(start_ms)
        if window is None:
            window = self._windows[start_ms] = self._kind(start_ms)
            while (oldest_ms := next(iter(self._windows))) < start_ms - _KEPT_MS:
                del self._windows[oldest_ms]
        window.add(t_ms, price, size)
        return window


def decimal(number: int, digits: int) -> str:
    """`number` / 10**digits as plain JSON, exact, without trailing zeros: (4522000, 8) is 0.04522."""
    whole, fraction = divmod(number, 10**digits)
    return f"{whole}.{fraction:0{digits}}".rstrip("0").rstrip(".") if fraction else str(whole)
