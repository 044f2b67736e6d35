"""All detectors. Another one is a file beside this and a line here; its thresholds become a setting by themselves."""

from collections.abc import Mapping
from typing import Any

import msgspec

from processors.detectors.base import Detector
from processors.detectors.crossed_quote import CrossedQuote, LockedQuote
from processors.detectors.disorder import Duplicate, LateData, OutOfOrder, TimestampOutOfBounds
from processors.detectors.gap import GapMarked
from processors.detectors.impossible_value import ImpossibleValue
from processors.detectors.price_spike import PriceSpike
from processors.detectors.stale_feed import StaleFeed
from processors.detectors.stale_pair import StalePair
from processors.detectors.trade_through import TradeThrough
from processors.detectors.vendor_mismatch import VendorMismatch
from processors.detectors.volume_spike import VolumeSpike
from processors.detectors.wide_spread import WideSpread

DETECTORS: tuple[type[Detector], ...] = (
    PriceSpike,
    VolumeSpike,
    TradeThrough,
    CrossedQuote,
    LockedQuote,
    WideSpread,
    StalePair,
    StaleFeed,
    OutOfOrder,
    LateData,
    TimestampOutOfBounds,
    Duplicate,
    GapMarked,
    VendorMismatch,
    ImpossibleValue,
)

Thresholds = tuple[tuple[str, Detector.Settings], ...]  # by kind


LARGEST = 1e9


class WrongThreshold(ValueError):
    """No such detector, no such threshold, or a value that it cannot have."""


def thresholds(chosen: Mapping[str, Mapping[str, Any]] | None = None) -> Thresholds:
    """The settings of every detector by kind: the defaults, but for what is chosen. Raises WrongThreshold."""
    chosen = chosen or {}
    kinds = {detector.kind: detector.Settings for detector in DETECTORS}
    for kind in chosen:
        if kind not in kinds:
            raise WrongThreshold(f"there is no detector {kind!r}; there are {', '.join(kinds)}")
    found: dict[str, Detector.Settings] = {}
    for kind, settings in kinds.items():
        try:
            found[kind] = msgspec.convert(dict(chosen.get(kind, {})), settings)
            if not all(abs(value) < LARGEST for value in msgspec.structs.astuple(found[kind])):
                raise msgspec.ValidationError(f"a threshold is not below {LARGEST:g}")
        except msgspec.ValidationError as error:
            names = ", ".join(settings.__struct_fields__) or "none"
            raise WrongThreshold(f"{kind}: {error} (its thresholds: {names})") from None
    return tuple(found.items())
