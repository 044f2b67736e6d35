"""What goes wrong in a soak, and when: the same seed gives the same schedule. Pure.

The producer's rests between connections grow on purpose, and only a minute of data or a new process makes
them short again: so a schedule spreads what costs a connection between the kills, evicts at most once and
leaves it the minute's rest that this costs.
"""

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

LEAD_S = 5.0  # the feed flows before the first fault
TAIL_S = 6.0  # and after the last
EVICTED_S = 70.0  # the rest after an eviction, and some data after it
LONG_S = 240.0  # a run with room for that
OUTAGE_S = 16.0, 20.0  # longer than a Kafka client's request and the lease's session
OUTAGE_SLOTS = 3  # faults that may pass before the broker is back
MOST_CUTS = 6  # connections and attempts lost in a row: the next rest is up to 16 s then

KILL_PRODUCER, KILL_BROKER, FREEZE = "kill-producer", "kill-broker", "freeze"
CUTS = {
    "drop": 1,
    "close": 1,
    "slow-consumer": 1,
    "huge": 1,
    "stall": 1,
    "evict": 1,
    "half-open": 2,
    "away": 3,
}
"""Kinds that cost the connection, and how many attempts at most."""


class Planned(NamedTuple):
    """A fault: seconds after the first subscription, its kind, and the parameters of its kind."""

    at_s: float
    kind: str
    parameters: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.parameters.items())])


def schedule(seed: int, faults: int, seconds: float) -> list[Planned]:
    """`faults` faults in order, in `seconds` (some of which are quiet before the first and after the last)."""
    rng = random.Random(seed)
    kinds = _order(rng, _kinds(rng, faults, seconds))
    evictions = kinds.count("evict")
    slot_s = (seconds - LEAD_S - TAIL_S - evictions * EVICTED_S) / (faults - evictions)
    if slot_s < 3:
        raise ValueError(f"{faults} faults do not fit into {seconds:g} s: the producer would never be well")
    killed = [number for number, kind in enumerate(kinds) if kind == KILL_BROKER]
    lasting = [number for number in killed if kinds[number + 1 : number + 2] != [KILL_PRODUCER]]  # so it is felt
    outage = rng.choice(lasting or killed) if seconds >= LONG_S else None
    plan, begin_s = [], LEAD_S
    for number, kind in enumerate(kinds):
        parameters = _parameters(rng, kind, slot_s)
        if number == outage:
            parameters = {"seconds": round(rng.uniform(*OUTAGE_S), 1)}
        plan.append(Planned(round(begin_s + rng.uniform(0, slot_s / 3), 2), kind, parameters))
        begin_s += EVICTED_S if kind == "evict" else slot_s
    return plan


def outage(seconds: float) -> list[Planned]:
    """Kafka is away for so long; the producer is killed shortly before it is back, and while it may be catching up."""
    end_s = LEAD_S + seconds
    return [
        Planned(LEAD_S, KILL_BROKER, {"seconds": seconds}),
        Planned(end_s - 20, KILL_PRODUCER, {}),
        Planned(end_s + 10, KILL_PRODUCER, {}),
    ]


def _kinds(rng: random.Random, faults: int, seconds: float) -> list[str]:
    kinds = [KILL_PRODUCER] * max(1, faults // 6) + [KILL_BROKER] * max(1, faults // 8) + [FREEZE] * (faults // 10)
    kinds += ["evict"] * (seconds >= LONG_S)
    cheap = ["malformed", "not-array", "truncated", "duplicate", "clock", "spike"]
    others = ["drop", "close", "slow-consumer", "huge", "half-open", "away", "stall", "stall", "stall", *cheap]
    while len(kinds) < faults:
        kinds += rng.sample(others, len(others))
    return kinds[:faults]


def _order(rng: random.Random, kinds: list[str]) -> list[str]:
    for _ in range(100_000):
        rng.shuffle(kinds)
        if _bearable(kinds):
            return kinds
    raise ValueError("these faults cannot be put into an order that the producer gets through")


def _bearable(kinds: Iterable[str]) -> bool:
    cuts, broker_killed = 0, -OUTAGE_SLOTS
    for number, kind in enumerate(kinds):
        cuts = 0 if kind == KILL_PRODUCER else cuts + CUTS.get(kind, 0)
        if cuts > MOST_CUTS:
            return False
        if kind == KILL_BROKER:
            if number - broker_killed < OUTAGE_SLOTS:
                return False
            broker_killed = number
    return True


def _parameters(rng: random.Random, kind: str, slot_s: float) -> dict[str, Any]:
    lasting = round(rng.uniform(2, max(2.5, min(5.0, slot_s / 2))), 1)
    match kind:
        case "kill-broker" | "freeze" | "away" | "half-open":
            return {"seconds": lasting}
        case "stall":
            stream = rng.choice([None, "XT", "XQ"])
            return {"seconds": lasting + 1} | ({"stream": stream} if stream else {})
        case "close":
            return {"code": rng.choice([1000, 1001, 1011, 1012])}
        case "malformed" | "not-array" | "truncated" | "duplicate":
            return {"count": rng.randint(1, 5)}
        case "clock":
            return {"amount": rng.choice([3600, -3600, 86_400 * 365]), "count": 1}
        case "spike":
            return {"count": rng.randint(1, 5), "amount": rng.choice([-50, 30])}
    return {}
