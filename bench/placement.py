"""CPU time of one plan at the largest size: 72 ranks on nine hosts, 256 experts, 58 layers. The bar is 200 ms.

The table of `docs/planning.md`. Process time, best of five, so that other processes on the machine count little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from bench.command import positive
from elastic_daemon.placement import RepairPlan, evacuate, initial, repair, respread

BAR_S = 0.2
TRIALS = 5
EXPERTS, LAYERS, RANKS = 256, 58, 72
HOSTS = {rank: f"host{rank // 8}" for rank in range(RANKS)}
LOST = {4: range(1), 5: range(8), 8: range(8)}
"""By slots of a rank in a layer: as many as the copies allow, at most a whole host."""

Work = Callable[[], object]


def works(slots: int) -> dict[str, Work]:
    """What a daemon plans, by name, with `slots` slots of each rank in each layer."""
    generator = np.random.default_rng(0)
    load = generator.zipf(1.5, (LAYERS, EXPERTS)).clip(max=10_000).astype(np.int64)
    placement = initial(EXPERTS, LAYERS, range(RANKS), slots, HOSTS)
    lost = LOST[slots]
    balanced = respread(placement, range(RANKS), load=load, hosts=HOSTS).placement
    drifted = (load * generator.normal(1.0, 0.1, load.shape).clip(min=0.5)).astype(np.int64)
    shrunk = repair(placement, set(range(RANKS)) - set(lost)).placement
    return {
        "initial": lambda: initial(EXPERTS, LAYERS, range(RANKS), slots, HOSTS),
        "repair": lambda: repair(placement, set(range(RANKS)) - set(lost)),
        "evacuate": lambda: evacuate(placement, lost),
        "respread, ranks are back": lambda: respread(shrunk, range(RANKS), hosts=HOSTS),
        "respread, another load": lambda: respread(placement, range(RANKS), load=load, hosts=HOSTS),
        "respread, load drifted by 10%": lambda: respread(balanced, range(RANKS), load=drifted, hosts=HOSTS),
        "respread, ranks are back and another load": lambda: respread(shrunk, range(RANKS), load=load, hosts=HOSTS),
    }


def cpu_s(work: Work, trials: int) -> float:
    """The least of `trials`, in seconds."""

    def once() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return min(once() for _ in range(trials))


def loads_of(plan: object) -> str:
    return f", {len(plan.loads):,} loads" if isinstance(plan, RepairPlan) else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.placement", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=positive, default=TRIALS, metavar="N", help=f"of each plan ({TRIALS})")
    trials = parser.parse_args().trials
    for slots, lost in LOST.items():
        print(f"\nS = {slots}, {len(lost)} lost")
        for name, work in works(slots).items():
            seconds = cpu_s(work, trials)
            verdict = "met" if seconds <= BAR_S else "NOT met"
            print(f"  {name:42} {seconds * 1e3:6.0f} ms  bar {BAR_S * 1e3:.0f} ms {verdict}{loads_of(work())}")


if __name__ == "__main__":
    main()
