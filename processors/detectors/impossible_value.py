"""Numbers that cannot be."""

from processors.detectors.base import Counting, Note
from schemas.events import VendorBar


class ImpossibleValue(Counting):
    """Events refused for what stands in them (a price below zero, a NaN, a time in seconds), and aggregates of the
    vendor whose open, close or vwap lies outside their low and high, or with a high below the low."""

    kind = "impossible_value"
    severity = "critical"
    what = "impossible"
    verb = "events with impossible values"

    def vendor_bar(self, bar: VendorBar, at: int) -> None:
        inside = [bar.open, bar.close] if bar.vwap is None or not bar.vwap else [bar.open, bar.close, bar.vwap]
        if not bar.low <= min(inside) <= max(inside) <= bar.high:
            numbers = f"open {bar.open}, high {bar.high}, low {bar.low}, close {bar.close}, vwap {bar.vwap}"
            self.count(Note(self.what, bar.symbol, bar.start, f"aggregate with {numbers}", bar.epoch, bar.n), at)
