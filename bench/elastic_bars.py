"""The bars that elasticity is held to, and what a run makes of them. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.changes import Kind
from bench.elastic_run import RANKS, Results, Windows
from bench.footprint import COUNTS, LASTING, lasting_growth, memory_growth, rank_growth
from elastic_daemon.drill.report import Spread

GAP_S, GAP_P99_S = 0.2, 0.5
FULL_S = 5.0
SHARE = 0.6
THROUGHPUT = 0.97
GROWTH_MIB = 16
"""What the memory of a lasting process may have grown by after all changes: the C library keeps some of what is freed.
Less than a MiB for each of the cycles."""


@dataclass(frozen=True)
class Bar:
    """`value` in units of `unit`; None: it was not measured."""

    what: str
    value: float | None
    limit: float
    unit: str = "s"
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Throughput:
    """`before`, `after`: the changes, the ratio of the daemon that is changed to one that is left alone: the median of
    all pairs of windows. `ratio`: of the two, give or take `error` (one standard error). Two daemons that have just
    started differ by more than the bar allows, and the machine drifts by more than that: neither counts so. `noise`:
    the median difference between two windows in a row of one daemon, as a share.
    """

    pairs: int
    worn: float
    alone: float
    before: float
    after: float
    ratio: float
    error: float
    noise: float | None

    @classmethod
    def of(cls, before: Windows, after: Windows) -> Throughput | None:
        """None where a pair is missing."""
        first, last = before.ratios, after.ratios
        if not first or not last:
            return None
        differences = [abs(later / earlier - 1) for earlier, later in before.neighbours + after.neighbours]
        was, is_ = statistics.median(first), statistics.median(last)
        return cls(
            pairs=len(last),
            worn=statistics.median(after.worn),
            alone=statistics.median(after.alone),
            before=was,
            after=is_,
            ratio=is_ / was,
            error=is_ / was * math.hypot(_error(first) / was, _error(last) / is_),
            noise=statistics.median(differences) if differences else None,
        )


def _error(ratios: Sequence[float]) -> float:
    """One standard error of their mean."""
    return statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf


def join_waits(results: Results, kind: Kind) -> Spread:
    return Spread.of([wait for change in results.of(kind) for wait in change.joins])


def shares(results: Results) -> list[float]:
    """Of all changes in which a rank was started while others served."""
    kinds = (Kind.REJOIN, Kind.SPARE, Kind.REPLACEMENT, Kind.UP)
    found = (change.share for kind in kinds for change in results.of(kind))
    return [share for share in found if share is not None]


def bars(results: Results) -> list[Bar]:
    rejoins, ups = join_waits(results, Kind.REJOIN), join_waits(results, Kind.UP)
    replacements = [change.seconds for change in results.of(Kind.REPLACEMENT)]
    downs = [change.whole for change in results.of(Kind.DOWN)]
    share, throughput = Spread.of(shares(results)), Throughput.of(results.before, results.after)
    return [
        Bar("rejoin: longest wait of any client around the join, p50", rejoins.p50 if rejoins.count else None, GAP_S),
        Bar("rejoin: the same, p99", rejoins.p99 if rejoins.count else None, GAP_P99_S),
        Bar("replacement: new GPU -> full capacity, worst", max(replacements, default=None), FULL_S),
        Bar(f"scale {RANKS} -> {RANKS - 1}: longest wait, order to end, worst", max(downs, default=None), GAP_S),
        Bar(f"scale {RANKS - 1} -> {RANKS}: longest wait around the join, p50", ups.p50 if ups.count else None, GAP_S),
        Bar(f"scale {RANKS - 1} -> {RANKS}: the same, p99", ups.p99 if ups.count else None, GAP_P99_S),
        Bar(
            "tokens/s of the others while a rank loads / before, median",
            share.p50 if share.count else None,
            SHARE,
            "",
            True,
        ),
        *_wear_bars(throughput),
        *_growth_bars(results),
    ]


def _wear_bars(throughput: Throughput | None) -> list[Bar]:
    """None where it was not measured; a measurement that failed is a problem of the results."""
    what = "tokens/s after all changes / at the start, beside a daemon that is left alone"
    return [Bar(what, throughput.ratio, THROUGHPUT, "", True)] if throughput is not None else []


def _growth_bars(results: Results) -> list[Bar]:
    taken = list(results.footprints.values())
    ends = (taken[0], taken[-1]) if len(taken) > 1 else None
    lasting = max(lasting_growth(*ends).values()) if ends else None
    ranks = max(rank_growth(*ends).values()) if ends else None
    memory = max(memory_growth(*ends).values()) / 1024 if ends else None
    counted = ", ".join(COUNTS)
    return [
        Bar(f"growth in {counted} of lasting processes, beyond abandoned groups: the largest", lasting, 0, ""),
        Bar("growth in the same of ranks, beyond abandoned groups: the largest", ranks, 0, ""),
        Bar(f"growth of memory of {', '.join(LASTING)}: the largest", memory, GROWTH_MIB, "MiB"),
    ]
