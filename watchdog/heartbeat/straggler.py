"""Which rank keeps its peers waiting, and by how much.

All ranks of a group are as fast as the slowest, so speed is not to be seen in their counters, but in what they do
between two collectives: the page adds up time outside collectives ("worked") and inside ("waited"). The slowdown of a
rank is its work per collective relative to the median of its peers; the median over several windows keeps one long
prefill or one stall from naming anybody (peer comparison as in "Falcon", Wu et al. 2024, on fail-slow GPUs).

On a device, what it may have waited for its host ("starved") is no work of its own, but counts as that of its peers:
the device whose host is the last of all does not keep them waiting, and is compared with hosts that are ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from watchdog.heartbeat.layout import Granularity, Snapshot, ahead


@dataclass(frozen=True, slots=True)
class StragglerPolicy:
    """`slowdown`: from which factor a rank is named. Windows are of observed time; `least_work_s` is per collective,
    below it differences are noise."""

    slowdown: float = 2.0
    window_s: float = 1.0
    windows: int = 9
    least_windows: int = 5
    least_collectives: int = 8
    least_work_s: float = 50e-6


class StragglerWatch:
    """Windows of work of one epoch's group. A change of the group starts anew."""

    def __init__(self, policy: StragglerPolicy) -> None:
        self._policy = policy
        self._start: dict[tuple[int, int], Snapshot] = {}
        self._epoch = -1
        self._observed_s = 0.0
        self._ratios: dict[int, deque[float]] = {}

    def observe(
        self, group: Sequence[Snapshot], epoch: int, credit_s: float, shared: bool = False
    ) -> Mapping[int, float]:
        """Ranks to be named, with their slowdown.

        Nobody is while work is not timed in the same way on all of them, or `shared`: some are on one device and take
        turns on it, so that their times are not their own.
        """
        ways = {page.granularity for page in group}
        if shared or len(ways) != 1 or Granularity.STEP in ways:
            self._restart({}, -1)
            return {}
        pages = {(page.rank, page.incarnation): page for page in group if not page.torn}
        if epoch != self._epoch or len(pages) != len(group) or pages.keys() != self._start.keys():
            if len(pages) == len(group):
                self._restart(pages, epoch)
            return self._slow()
        self._observed_s += credit_s
        if self._observed_s >= self._policy.window_s:
            self._close_window(pages)
        return self._slow()

    def _restart(self, pages: dict[tuple[int, int], Snapshot], epoch: int) -> None:
        self._epoch, self._start, self._observed_s, self._ratios = epoch, pages, 0.0, {}

    def _close_window(self, pages: dict[tuple[int, int], Snapshot]) -> None:
        work, own = {}, {}
        for identity, page in pages.items():
            start = self._start[identity]
            timed = ahead(page.timed, start.timed)
            if timed < self._policy.least_collectives:
                return  # idle or stuck: the window goes on
            worked, starved = ahead(page.worked_ns, start.worked_ns), ahead(page.starved_ns, start.starved_ns)
            work[page.rank] = max(worked, 0) * 1e-9 / timed
            own[page.rank] = max(worked - starved, 0) * 1e-9 / timed
        self._start, self._observed_s = pages, 0.0
        for rank in work:
            peers = [other for peer, other in work.items() if peer != rank]
            if peers:
                ratio = own[rank] / max(median(peers), self._policy.least_work_s)
                self._ratios.setdefault(rank, deque(maxlen=self._policy.windows)).append(ratio)

    def _slow(self) -> Mapping[int, float]:
        named = {}
        for rank, ratios in self._ratios.items():
            if len(ratios) >= self._policy.least_windows and (slowdown := median(ratios)) >= self._policy.slowdown:
                named[rank] = slowdown
        return named
