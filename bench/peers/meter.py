"""What every peer in Python shares: where its input is, the meter, and the bar that they all make."""

import json
import os
import time
from pathlib import Path

BROKER, SOURCE, SINK = os.environ["BENCH_BROKER"], os.environ["BENCH_SOURCE"], os.environ["BENCH_SINK"]
GROUP, STATE, RESULT = os.environ["BENCH_GROUP"], os.environ["BENCH_STATE"], Path(os.environ["BENCH_RESULT"])
EVENTS = int(os.environ["BENCH_EVENTS"])
SHAPE = os.environ["BENCH_SHAPE"]  # single: an event a record; arrays: a JSON array; slices: raw.crypto.v1 itself
PARTITIONS = 8
WINDOW_MS, GRACE_MS = 60_000, 2_000


class Meter:
    """From the first event handed to the program's own code to the last; `half` gives the rate once warm."""

    def __init__(self):
        self.count, self.half, self.times = 0, EVENTS // 2, {}

    def event(self):
        """Counts one; True for the last."""
        self.count = count = self.count + 1
        if count == 1:
            self.note("first")
        elif count == self.half:
            self.note("half")
        elif count == EVENTS:
            self.note("last")
            return True
        return False

    def note(self, name):
        self.times[name] = time.time()
        RESULT.write_text(json.dumps(self.times))


def new(pair, start, price, size):
    return {"pair": pair, "start": start, "o": price, "h": price, "l": price, "c": price, "v": size,
            "pv": price * size, "n": 1}  # fmt: skip


def fold(bar, price, size):
    if price > bar["h"]:
        bar["h"] = price
    if price < bar["l"]:
        bar["l"] = price
    bar["c"] = price
    bar["v"] += size
    bar["pv"] += price * size
    bar["n"] += 1


def final(bar):
    return {name: bar[name] for name in ("pair", "start", "o", "h", "l", "c", "v", "n")} | {"vw": bar["pv"] / bar["v"]}
