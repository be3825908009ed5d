"""Random schedules of faults, each from one seed. SIM_SEED=n replays one, with all that happened in it on failure.

SIM_SCHEDULES sets how many are played.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.unit import simulation

SCHEDULES = int(os.environ.get("SIM_SCHEDULES", "10000"))
BATCHES = 10


@pytest.mark.skipif("SIM_SEED" not in os.environ, reason="set SIM_SEED to replay one schedule")
def test_one_schedule() -> None:
    simulation.run(int(os.environ["SIM_SEED"]), trace=True)


def test_a_seed_plays_the_same_schedule_again() -> None:
    for seed in range(100):
        first, again = (simulation.run(seed).trace for _ in range(2))
        assert first == again, f"seed {seed}"


@pytest.mark.skipif("SIM_SEED" in os.environ, reason="SIM_SEED replays one schedule only")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_schedules(batch: int) -> None:
    ends: Counter[str] = Counter()
    recoveries = tokens = 0
    for seed in range(batch, SCHEDULES, BATCHES):
        world = simulation.run(seed)
        ends[world.controller.phase] += 1
        recoveries += len(world.recoveries)
        tokens += world.serving.tokens
    if SCHEDULES >= 1000:  # the simulation must be hard, but not so hard that nothing ever works
        assert set(ends) == {"serving", "unavailable", "exited"}, ends
        assert recoveries > SCHEDULES // BATCHES
        assert tokens > SCHEDULES // BATCHES
