"""Trades that came before: the same (symbol, exchange, id) again within its minute."""

from xxhash import xxh3_64_intdigest

from schemas.events import MINUTE_NS


class Repeats:
    """Remembers the trades of each minute in the horizon as 64-bit hashes seeded by exchange, gone with the minute.

    Repeats are looked for in the trade's own minute only: an id that comes back with another time is
    judged alike by one pass and by a rebuild.
    """

    def __init__(self, lateness_ns: int) -> None:
        self.memory_ns = lateness_ns + MINUTE_NS
        self._lateness_ns = lateness_ns
        self._minutes: dict[int, dict[str, set[int]]] = {}
        self._oldest = 0  # that is not forgotten yet

    def seen(self, start: int, symbol: str, exchange: int, trade_id: str) -> bool:
        """Whether the trade was seen before in its minute, which begins at `start`; from now on it was."""
        symbols = self._minutes.get(start)
        if symbols is None:
            symbols = self._minutes[start] = {}
        hashes = symbols.get(symbol)
        if hashes is None:
            hashes = symbols[symbol] = set()
        known = len(hashes)
        hashes.add(xxh3_64_intdigest(trade_id.encode(), exchange))
        return len(hashes) == known

    def tick(self, tick: int) -> None:
        """Forgets the minutes that are wholly past the horizon."""
        oldest = (tick - self._lateness_ns) // MINUTE_NS * MINUTE_NS
        if oldest != self._oldest:
            self._oldest = oldest
            for minute in [m for m in self._minutes if m < oldest]:
                del self._minutes[minute]

    def state(self) -> object:
        return self._minutes
