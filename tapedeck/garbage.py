"""Python's collector of cyclic garbage, for processes that make events by the million."""

import gc

OBJECTS = 50_000


def collect_seldom() -> None:
    """Looks for cycles after so many new objects, not after Python's 700: events are no part of any, and looking took a
    twelfth of the worker's time and a quarter of a replay's."""
    gc.set_threshold(OBJECTS)
