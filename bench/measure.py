"""What one fault did to the clients, and what many did. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.plan import Fault, Phase
from elastic_daemon.drill.report import Delay, Spread, StreamResult, compare

FIRST_TOKENS = (Phase.PREFILL, Phase.IDLE)
"""Phases in which clients wait for their first token after the kill."""

GAP_BAR_S = 0.2
RATIO_BAR = 200.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: `at` is monotonic, `wall` the time of day, as in the daemon's events."""

    rank: int
    at: float
    wall: float


@dataclass(frozen=True)
class Undisturbed:
    """The reference run of one life. Silences and times to the first token: of each stream, the longest."""

    silences: tuple[float, ...]
    first_tokens: tuple[float, ...]
    seconds: float
    tokens: int
    probe_max_s: float
    errors: int

    @classmethod
    def of(cls, streams: Sequence[StreamResult], delays: Sequence[Delay]) -> Undisturbed:
        return cls(
            silences=tuple(stream.longest_gap() for stream in streams),
            first_tokens=tuple(stream.arrivals[0] - stream.started for stream in streams if stream.arrivals),
            seconds=max(stream.ended for stream in streams) - min(stream.started for stream in streams),
            tokens=sum(stream.tokens for stream in streams),
            probe_max_s=max((delay.seconds for delay in delays), default=0.0),
            errors=sum(stream.error is not None for stream in streams),
        )


def client_gap(stream: StreamResult, killed_at: float) -> float:
    """The longest that this client waited for a token that came after the kill; the first counts from its request."""
    gap = stream.longest_gap(killed_at)
    if stream.arrivals and stream.arrivals[0] > killed_at:
        gap = max(gap, stream.arrivals[0] - stream.started)
    return gap


def calm_gap(streams: Sequence[StreamResult], phase: Phase) -> float:
    """What `client_gap` of the worst client is measured by: the same in an undisturbed run."""
    since = -math.inf if phase in FIRST_TOKENS else math.inf
    silences = [stream.longest_gap() for stream in streams]
    return max([*silences, *(client_gap(stream, since) for stream in streams)], default=0.0)


def outages(streams: Sequence[StreamResult], killed_at: float, resumed_at: float) -> tuple[float, ...]:
    """From the kill to the next token of each stream that was running then.

    What arrives before the group resumes had been computed before the kill: it does not count.
    """
    found = []
    for stream in streams:
        if stream.started < killed_at < stream.ended:
            after = [arrival for arrival in stream.arrivals if arrival > resumed_at]
            if after:
                found.append(after[0] - killed_at)
    return tuple(found)


@dataclass(frozen=True)
class FaultResult:
    """`detections_s`: of each kill, None where the daemon did not exclude that rank. `outages_s`: empty with IDLE.

    `resumed_s`: from the (first) kill until the survivors step again, None if they do not.
    `calm_gap_s`: the longest wait of any client in the undisturbed run, the first token included where `gaps_s` has it.
    `during`: whether the second kill fell into the recovery of the first, as DURING wants it; None elsewhere.
    """

    life: int
    fault: Fault
    streams: int
    lost: int
    changed: int
    differences: tuple[str, ...]
    detections_s: tuple[float | None, ...]
    gaps_s: tuple[float, ...]
    calm_gap_s: float
    resumed_s: float | None
    outages_s: tuple[float, ...]
    during: bool | None
    recoveries: tuple[Mapping[str, Any], ...]
    probe: Spread
    problems: tuple[str, ...] = ()

    @property
    def gap_s(self) -> float:
        """The longest that any client waited."""
        return max(self.gaps_s, default=0.0)

    @property
    def outage_s(self) -> float | None:
        """Until every interrupted stream has its next token."""
        return max(self.outages_s, default=None)

    @property
    def recompute_s(self) -> float | None:
        """From the first step of the survivors until every interrupted stream has its next token."""
        if self.resumed_s is None or self.outage_s is None:
            return None
        return self.outage_s - self.resumed_s

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gap_s": self.gap_s, "outage_s": self.outage_s, "recompute_s": self.recompute_s}


def judge(
    life: int,
    fault: Fault,
    kills: Sequence[Kill],
    reference: Sequence[StreamResult],
    streams: Sequence[StreamResult],
    delays: Sequence[Delay],
    events: Sequence[Mapping[str, Any]],
    reports: Sequence[Mapping[str, Any]],
) -> FaultResult:
    """What became of one fault. `events`: those of the daemon since before it; `reports`: its recoveries since.

    Raises ValueError where nobody was killed.
    """
    if not kills:
        raise ValueError("nobody was killed")
    first = kills[0]
    comparison = compare(reference, streams)
    changed = {difference.stream for difference in comparison.differences}
    problems = [f"stream {n}: {stream.error}" for n, stream in enumerate(streams) if stream.error is not None]
    if len(kills) < len(fault.ranks):
        problems.append(f"only {len(kills)} of {len(fault.ranks)} signals were sent: the streams ended before")
    excluded = {event["rank"]: event["time"] for event in events if event["event"] == "rank_excluded"}
    detections = tuple(excluded[kill.rank] - kill.wall if kill.rank in excluded else None for kill in kills)
    done = [event for event in events if event["event"] == "recovery_done"]
    resumed_s = done[-1]["time"] - done[-1]["seconds"]["resume"] - first.wall if done else None
    if None in detections:
        problems.append("a killed rank was not excluded")
    if not reports:
        problems.append("the daemon reported no recovery")
    return FaultResult(
        life=life,
        fault=fault,
        streams=len(streams),
        lost=len(comparison.lost),
        changed=len(changed),
        differences=tuple(map(str, comparison.differences)),
        detections_s=detections,
        gaps_s=tuple(client_gap(stream, first.at) for stream in streams),
        calm_gap_s=calm_gap(reference, fault.phase),
        resumed_s=resumed_s,
        outages_s=() if fault.phase is Phase.IDLE else outages(streams, first.at, first.at + (resumed_s or 0.0)),
        during=_during(kills, events) if fault.phase is Phase.DURING else None,
        recoveries=tuple(reports),
        probe=Spread.of([delay.seconds for delay in delays if delay.at > first.at]),
        problems=tuple(problems),
    )


def _during(kills: Sequence[Kill], events: Sequence[Mapping[str, Any]]) -> bool:
    ends = [event["time"] for event in events if event["event"] == "recovery_done"]
    return bool(ends) and all(kill.wall < ends[0] for kill in kills)


@dataclass(frozen=True)
class Summary:
    """Many faults. `gaps`: the longest wait of any client, per fault; `client_gaps`: of every client in every fault.

    `calm_gaps`: beside `gaps`, the same in the undisturbed runs.
    """

    faults: int
    kills: int
    lost: int
    changed: int
    gaps: Spread
    calm_gaps: Spread
    client_gaps: Spread
    probe: Spread
    outages: Spread
    detections: Spread
    resumed: Spread
    recomputes: Spread
    phases: Mapping[str, Spread] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Iterable[FaultResult]) -> Summary:
        results = list(results)
        seconds = [report["seconds"] for result in results for report in result.recoveries]
        names = list(dict.fromkeys(name for one in seconds for name in one))
        return cls(
            faults=len(results),
            kills=sum(len(result.detections_s) for result in results),
            lost=sum(result.lost for result in results),
            changed=sum(result.changed for result in results),
            gaps=Spread.of([result.gap_s for result in results]),
            calm_gaps=Spread.of([result.calm_gap_s for result in results]),
            client_gaps=Spread.of([gap for result in results for gap in result.gaps_s]),
            probe=Spread.of([result.probe.max for result in results]),
            outages=Spread.of([result.outage_s for result in results if result.outage_s is not None]),
            detections=Spread.of([one for result in results for one in result.detections_s if one is not None]),
            resumed=Spread.of([result.resumed_s for result in results if result.resumed_s is not None]),
            recomputes=Spread.of([result.recompute_s for result in results if result.recompute_s is not None]),
            phases={name: Spread.of([one[name] for one in seconds if name in one]) for name in names},
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def by_phase(results: Iterable[FaultResult]) -> dict[Phase, Summary]:
    """In the order of `Phase`; phases without a fault are left out."""
    results = list(results)
    grouped = {phase: [result for result in results if result.fault.phase is phase] for phase in Phase}
    return {phase: Summary.of(some) for phase, some in grouped.items() if some}


def restart_ratio(restart_s: float | None, outage_p50_s: float) -> float | None:
    """How many of our outages one restart lasts; None where either was not measured."""
    if restart_s is None or outage_p50_s <= 0:
        return None
    return restart_s / outage_p50_s
