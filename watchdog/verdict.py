"""The judgement: from evidence, policy and history to a verdict. Pure functions over plain data.

    ok < suspect < restart-rank < drain < exclude

- Fatal classes (`exclude`) act on the first report, and stay for `probation_s` after the last.
- `drain` must be confirmed: by a condition that lasts, an event that comes again, or a second signal of the same GPU.
- `restart-rank` must be confirmed by the rank itself, which stands still; where it says nothing, by repetition. A rank
  that makes progress is never restarted for an Xid, which may have been another program's. Xids of this class lead to
  nothing else, however many there are.
- What is not confirmed is `suspect`: shown, not acted on.
- A GPU that failed `quarantine_failures` times within `quarantine_window_s` is excluded until an operator releases it;
  one whose ranks hung `repeat_restarts` times is drained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from watchdog.evidence import Evidence
from watchdog.signals import Rule, SignalClass, SignalTable


class Verdict(StrEnum):
    OK = "ok"
    SUSPECT = "suspect"
    RESTART_RANK = "restart-rank"
    DRAIN = "drain"
    EXCLUDE = "exclude"

    @property
    def severity(self) -> int:
        return list(Verdict).index(self)

    @property
    def acts(self) -> bool:
        """Whether somebody is to do something about it."""
        return self.severity >= Verdict.RESTART_RANK.severity

    @property
    def removes(self) -> bool:
        """Whether the GPU is to be taken out of service."""
        return self in (Verdict.DRAIN, Verdict.EXCLUDE)


@dataclass(frozen=True)
class Policy:
    """Times in seconds. A limit of 0 switches that limit's rule off, except for `max_exclusions`."""

    probation_s: float = 60.0
    """How long a GPU must be without a fatal or confirmed signal before it is `ok` again."""
    settle_s: float = 5.0
    """How long a condition that was never confirmed stays visible as `suspect`."""
    min_ranks: int = 1
    max_exclusions: int = 2
    """GPUs taken from ranks at the most within `exclusion_window_s`; as many restarts of ranks that nobody is seen to
    wait for, counted apart."""
    exclusion_window_s: float = 600.0
    quarantine_failures: int = 3
    quarantine_window_s: float = 24 * 3600.0
    repeat_restarts: int = 3
    repeat_window_s: float = 3600.0
    stall_s: float = 1.0
    """How long a rank must stand still to confirm an Xid of its GPU."""


@dataclass(frozen=True)
class GpuHistory:
    """What outlives a restart of the watchdog. Times are wall-clock seconds since the epoch."""

    failures: tuple[float, ...] = ()
    """Times at which the GPU was taken out of service."""
    restarts: tuple[float, ...] = ()
    """Times at which a rank on it hung and was to be restarted."""
    quarantined: float | None = None
    """Since when."""


@dataclass(frozen=True)
class RankView:
    """A rank as its heartbeat shows it. `stalled_s`: without any progress for so long; None when nothing is known."""

    rank: int
    incarnation: int
    gpu: str | None = None
    stalled_s: float | None = None


@dataclass(frozen=True)
class Judgement:
    """A verdict on one GPU, the signal that decided and all evidence that counted, weightiest first."""

    verdict: Verdict
    signal: str | None = None
    reason: str = ""
    evidence: tuple[Evidence, ...] = field(default=())
    confirmed: bool = False

    @property
    def holds_others_up(self) -> bool:
        """It is on a rank that hangs: no other gets on before it is gone."""
        return any(one.signal == HUNG for one in self.evidence)


@dataclass(frozen=True)
class _Weight:
    verdict: Verdict
    reason: str
    evidence: Evidence | None
    signal: str


HUNG = "hung"
"""The condition of heartbeats whose rank all others wait for."""

HEALTHY = Judgement(Verdict.OK)

_VERDICTS = {
    SignalClass.EXCLUDE: Verdict.EXCLUDE,
    SignalClass.DRAIN: Verdict.DRAIN,
    SignalClass.RESTART_RANK: Verdict.RESTART_RANK,
    SignalClass.SUSPECT: Verdict.SUSPECT,
    SignalClass.RE_READ: Verdict.SUSPECT,
}


def judge_gpu(
    evidence: Sequence[Evidence],
    table: SignalTable,
    policy: Policy,
    history: GpuHistory,
    ranks: Sequence[RankView],
    now: float,
    wall: float,
) -> Judgement:
    """The verdict on a GPU with `ranks` bound to it. `now`: the clock of the evidence, `wall`: that of the history."""
    weights = [weight for one in evidence if (weight := _weigh(one, evidence, table, policy, ranks, now))]
    weights += _weigh_history(history, table, policy, wall)
    if not weights:
        return HEALTHY
    weights.sort(key=lambda weight: -weight.verdict.severity)
    first = weights[0]
    counted = tuple(weight.evidence for weight in weights if weight.evidence is not None)
    return Judgement(first.verdict, first.signal, first.reason, counted, first.verdict.acts)


def judge_rank(evidence: Sequence[Evidence], table: SignalTable, now: float) -> Judgement:
    """The verdict on a rank from the conditions `hung` and `straggler`. Whoever sets these has waited long enough.

    A rank is never excluded: what is wrong is on record for its GPU.
    """
    found = []
    for one in evidence:
        if one.active and (verdict := _VERDICTS.get(table.rule(one.signal).cls)):
            capped = min(verdict, Verdict.RESTART_RANK, key=lambda kind: kind.severity)
            found.append(_Weight(capped, _describe(table.rule(one.signal), one, now), one, one.signal))
    if not found:
        return HEALTHY
    found.sort(key=lambda weight: -weight.verdict.severity)
    first = found[0]
    return Judgement(
        first.verdict,
        first.signal,
        first.reason,
        tuple(weight.evidence for weight in found if weight.evidence),
        first.verdict.acts,
    )


def _weigh(
    one: Evidence,
    others: Sequence[Evidence],
    table: SignalTable,
    policy: Policy,
    ranks: Sequence[RankView],
    now: float,
) -> _Weight | None:
    """What one piece of evidence amounts to now; None when it is ignored or over."""
    rule = table.rule(one.signal)
    cls = rule.cls
    if cls is SignalClass.COMPANIONS:
        companion = _companion(one, rule, others, now)
        cls = SignalClass.EXCLUDE if companion else rule.alone
        if companion and now - one.last(now) <= max(rule.window_s, policy.probation_s):
            return _Weight(Verdict.EXCLUDE, f"{_describe(rule, one, now)}, with {companion}", one, one.signal)
    if cls not in _VERDICTS:
        return None
    wanted = _VERDICTS[cls]
    reason = _describe(rule, one, now)
    age = now - one.last(now)
    if wanted is Verdict.EXCLUDE:
        if _held(one, rule, now):
            return _Weight(wanted, reason, one, one.signal) if age <= policy.probation_s else None
    elif wanted is Verdict.DRAIN:
        if _drain_confirmed(one, rule, others, table, now) and age <= policy.probation_s:
            return _Weight(wanted, reason, one, one.signal)
    elif wanted is Verdict.RESTART_RANK and age <= rule.window_s and _restart_confirmed(one, rule, policy, ranks, now):
        return _Weight(wanted, reason, one, one.signal)
    remembered = rule.window_s if one.until is None else policy.settle_s
    if age <= remembered:
        return _Weight(Verdict.SUSPECT, reason, one, one.signal)
    return None


def _held(one: Evidence, rule: Rule, now: float) -> bool:
    return one.until is None or one.last(now) - one.first >= rule.hold_s


def _companion(one: Evidence, rule: Rule, others: Sequence[Evidence], now: float) -> str | None:
    for other in others:
        if other.signal in rule.companions and abs(other.last(now) - one.last(now)) <= rule.window_s:
            return other.signal
    return None


def _drain_confirmed(one: Evidence, rule: Rule, others: Sequence[Evidence], table: SignalTable, now: float) -> bool:
    if one.until is not None:
        if _held(one, rule, now) and (one.active or rule.hold_s > 0):
            return True
    elif one.count_since(now - rule.window_s) >= rule.count:
        return True
    seen = one.last(now)
    return any(
        other.signal != one.signal
        and table.rule(other.signal).cls in (SignalClass.DRAIN, SignalClass.COMPANIONS)
        and abs(other.last(now) - seen) <= rule.window_s
        # A condition that must last is no witness before it did.
        and _held(other, table.rule(other.signal), now)
        and _held(one, rule, now)
        for other in others
    )


def _restart_confirmed(one: Evidence, rule: Rule, policy: Policy, ranks: Sequence[RankView], now: float) -> bool:
    """A rank that stands still since the Xid; or, where no rank says anything, the Xid again and again."""
    stalls = [view.stalled_s for view in ranks if view.stalled_s is not None]
    if stalls:
        since = now - one.first
        return any(stall >= policy.stall_s and stall <= since + policy.stall_s for stall in stalls)
    return bool(ranks) and one.count_since(now - rule.window_s) > rule.count


def _weigh_history(history: GpuHistory, table: SignalTable, policy: Policy, wall: float) -> list[_Weight]:
    found = []
    if history.quarantined is not None:
        found.append(_history_weight("quarantine", table, f"{len(history.failures)} failures"))
    recent = sum(time >= wall - policy.repeat_window_s for time in history.restarts)
    if policy.repeat_restarts and recent >= policy.repeat_restarts:
        reason = f"its ranks hung {recent} times within {policy.repeat_window_s:g} s"
        found.append(_history_weight("repeat_offender", table, reason))
    return [weight for weight in found if weight is not None]


def _history_weight(signal: str, table: SignalTable, reason: str) -> _Weight | None:
    rule = table.rule(signal)
    if rule.cls not in _VERDICTS:
        return None
    return _Weight(_VERDICTS[rule.cls], f"{rule.name}: {reason}", None, signal)


def _describe(rule: Rule, one: Evidence, now: float) -> str:
    detail = ", ".join(f"{name} {value}" for name, value in one.detail.items() if value is not None)
    often = f"{len(one.times)} times" if one.until is None and len(one.times) > 1 else ""
    lasting = (
        f"for {one.last(now) - one.first:.1f} s" if one.until is not None and one.last(now) - one.first >= 1 else ""
    )
    extra = "; ".join(part for part in (detail, often, lasting) if part)
    return f"{rule.name} ({extra})" if extra else rule.name


def should_quarantine(history: GpuHistory, policy: Policy, wall: float) -> bool:
    recent = sum(time >= wall - policy.quarantine_window_s for time in history.failures)
    return bool(policy.quarantine_failures) and recent >= policy.quarantine_failures


@dataclass(frozen=True)
class Bound:
    """What the breaker must know: ranks in service by GPU, and when GPUs were taken out lately.

    `restarts`: when ranks were restarted lately that were not seen to hold others up.
    """

    ranks: Mapping[str, tuple[int, ...]]
    exclusions: tuple[float, ...] = ()
    restarts: tuple[float, ...] = ()
    leaving: frozenset[str] = frozenset()
    """GPUs whose exclusion has been ordered and whose ranks are still there."""
    min_ranks: int | None = None
    """The daemon's own minimum; the policy's when it says nothing."""


def held_back(judgement: Judgement, gpu: str | None, bound: Bound, policy: Policy, now: float) -> str | None:
    """Why the breaker keeps a verdict from being acted on; None when it does not.

    It covers verdicts from telemetry; the death of a process is the daemon's to see. A GPU without ranks takes nothing
    out of service, so it is never held back. Nor has a restart a minimum of ranks: the GPU comes back.

    A rank that hangs is never held back, however many were before it and however few are left: nobody is served until
    it is gone, so waiting saves nothing. Where none can be spared, the daemon asks the rank itself, by a fence. GPUs
    whose ranks hang again and again are drained, and drains are limited.
    """
    verdict = judgement.verdict
    if not verdict.acts:
        return None
    since = now - policy.exclusion_window_s
    limit = f"{policy.max_exclusions} within {policy.exclusion_window_s:g} s"
    if verdict is Verdict.RESTART_RANK:
        if not judgement.holds_others_up and sum(time >= since for time in bound.restarts) >= policy.max_exclusions:
            return f"breaker: already {limit} restarts"
        return None
    mine = len(bound.ranks.get(gpu, ())) if gpu else 0
    if not mine or gpu in bound.leaving:
        return None
    if sum(time >= since for time in bound.exclusions) >= policy.max_exclusions:
        return f"breaker: already {limit} exclusions"
    total = sum(len(ranks) for one, ranks in bound.ranks.items() if one not in bound.leaving)
    least = policy.min_ranks if bound.min_ranks is None else bound.min_ranks
    if total - mine < least:
        return f"breaker: {total} ranks in service, {least} must stay"
    return None


def as_json(one: Evidence, now: float, wall: float) -> dict[str, Any]:
    """Evidence for people and other processes, with wall-clock times."""
    shift = wall - now
    body: dict[str, Any] = {
        "signal": one.signal,
        "first": round(one.first + shift, 3),
        "last": round(one.last(now) + shift, 3),
    }
    if one.until is None:
        body["count"] = len(one.times)
    else:
        body["active"] = one.active
    if detail := {name: value for name, value in one.detail.items() if value is not None}:
        body["detail"] = detail
    return body
