"""The soak: its schedule, its verdict, and a short one."""

import os
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import msgspec
import pytest

from bench.mayhem import CUTS, KILL_BROKER, KILL_PRODUCER, MOST_CUTS, TAIL_S, schedule
from bench.scoring import Span
from bench.soak import Blow, Sample, blame, growth_mb
from schemas.events import NS_PER_S
from simulator.faults import Fault

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("faults", "seconds"), [(20, 300.0), (4, 60.0), (3, 25.0)])
def test_the_same_seed_does_the_same_and_every_seed_leaves_the_producer_a_chance(faults: int, seconds: float) -> None:
    for seed in range(30):
        plan = schedule(seed, faults, seconds)
        assert plan == schedule(seed, faults, seconds)
        assert len(plan) == faults
        assert all(one.at_s < other.at_s for one, other in pairwise(plan))
        assert plan[-1].at_s < seconds - TAIL_S
        kinds = [planned.kind for planned in plan]
        assert KILL_PRODUCER in kinds
        assert KILL_BROKER in kinds
        assert kinds.count("evict") == (seconds >= 240)
        for killed, run in groupby(kinds, lambda kind: kind == KILL_PRODUCER):
            assert killed or sum(CUTS.get(kind, 0) for kind in run) <= MOST_CUTS
        for kind, parameters in [(p.kind, p.parameters) for p in plan if p.kind not in OURS]:
            msgspec.convert({"kind": kind, **parameters}, Fault)  # the simulator takes it


OURS = (KILL_PRODUCER, KILL_BROKER, "freeze")


def test_seeds_differ() -> None:
    assert len({tuple(map(str, schedule(seed, 20, 300))) for seed in range(20)}) == 20


def test_more_faults_than_the_time_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        schedule(1, 20, 60)


def test_a_gap_is_blamed_on_the_latest_fault_that_had_begun() -> None:
    one, two = schedule(1, 3, 25)[:2]
    blows = [Blow(one, 100 * NS_PER_S), Blow(two, 200 * NS_PER_S)]
    early, late = (Span(at * NS_PER_S, (at + 9) * NS_PER_S, frozenset({"XT"}), "reconnect") for at in (150, 200))
    before = Span(99 * NS_PER_S + 1, 103 * NS_PER_S, frozenset({"XT"}), "reconnect")
    assert blame(blows, {early: None, late: (1, 2), before: None}) == {
        0: {early: None, before: None},
        1: {late: (1, 2)},
    }


def test_memory_that_grows_within_a_life_is_seen_and_a_new_life_is_no_growth() -> None:
    flat = [Sample(second, 0, 70 + second % 2) for second in range(100)]
    growing = [Sample(100 + second, 1, 50 + second) for second in range(100)]
    brief = [Sample(200, 2, 500)]
    grown = growth_mb([*flat, *growing, *brief])
    assert grown[0] == 0
    assert grown[1] > 40
    assert 2 not in grown


@pytest.mark.timeout(180)
def test_a_short_soak_holds() -> None:
    """With both kills in it; `make bench BENCH=soak` is the long one."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.soak", "--seconds", "25", "--faults", "3", "--seed", "3"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It holds." in done.stdout
