"""The docket: all cases. It collects evidence on GPUs and ranks, has it judged, and says which verdicts are new.

No I/O and no clock: the service around it says what was seen and when, and delivers the rulings.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from watchdog.bindings import Binding, Bindings
from watchdog.evidence import EvidenceLog, Observer
from watchdog.signals import SignalClass, SignalTable
from watchdog.state import State
from watchdog.verdict import (
    HEALTHY,
    Bound,
    Judgement,
    Policy,
    RankView,
    Verdict,
    as_json,
    held_back,
    judge_gpu,
    judge_rank,
)

Target = str | tuple[int, int]
"""A GPU's UUID, or (rank, incarnation)."""


class Mode(StrEnum):
    OBSERVE = "observe"
    ACT = "act"


@dataclass(frozen=True)
class Ruling:
    """One verdict as it is published. `act` is false when it is only to be known; `held` then says why."""

    id: str
    target: Target
    epoch: int
    verdict: Verdict
    signal: str | None
    reason: str
    evidence: tuple[dict[str, Any], ...]
    act: bool
    held: str | None
    wall: float
    incarnations: frozenset[int] = frozenset()
    """Of the ranks that were bound to the GPU then."""

    def as_json(self) -> dict[str, Any]:
        if isinstance(self.target, str):
            target: dict[str, Any] = {"gpu": self.target}
        else:
            target = {"rank": self.target[0], "incarnation": self.target[1]}
        return {
            "id": self.id,
            **target,
            "epoch": self.epoch,
            "verdict": self.verdict.value,
            "signal": self.signal,
            "reason": self.reason,
            "act": self.act,
            "held": self.held,
            "at": round(self.wall, 3),
            "evidence": list(self.evidence),
        }

    def for_log(self) -> dict[str, Any]:
        """The same in short: a line has its own time. Evidence by signal."""
        body = {name: value for name, value in self.as_json().items() if name != "at" and value is not None}
        body["evidence"] = {
            one["signal"]: {name: value for name, value in one.items() if name != "signal"} for one in self.evidence
        }
        return body


@dataclass
class Case:
    """One GPU or rank."""

    log: EvidenceLog
    ruling: Ruling | None = None
    judgement: Judgement = HEALTHY
    since: float = 0.0
    """Wall-clock time of the present verdict."""
    again: bool = False
    """Its ruling is to be issued once more."""


@dataclass(frozen=True)
class Present:
    """What the driver lists of a GPU. `slot`: its address on the PCI bus."""

    index: int
    name: str
    unsupported: tuple[str, ...]
    slot: str | None = None


@dataclass
class GpuCase(Case):
    observer: Observer = field(kw_only=True)
    index: int | None = None
    name: str = ""
    unsupported: tuple[str, ...] = ()
    slot: str | None = None


class Docket:
    def __init__(self, table: SignalTable, policy: Policy, mode: Mode, state: State) -> None:
        self._table = table
        self.policy = policy
        self.mode = mode
        self.state = state
        self.bindings = Bindings()
        self.gpus: dict[str, GpuCase] = {}
        self.ranks: dict[tuple[int, int], Case] = {}
        self.views: dict[int, RankView] = {}
        """By incarnation, from heartbeats."""
        self._exclusions: list[float] = []
        self._restarts: list[float] = []
        self._run = secrets.token_hex(4)
        self._count = 0

    def gpu(self, uuid: str) -> GpuCase:
        if uuid not in self.gpus:
            log = EvidenceLog()
            self.gpus[uuid] = GpuCase(log, observer=Observer(self._table, log))
        return self.gpus[uuid]

    def see_gpus(self, present: Mapping[str, Present], absent: Iterable[str], now: float) -> None:
        """The driver's list, by UUID, and the known GPUs that are not on it any more."""
        for uuid, gpu in present.items():
            case = self.gpu(uuid)
            case.index, case.name, case.unsupported, case.slot = gpu.index, gpu.name, gpu.unsupported, gpu.slot
            case.log.hold("gpu_missing", False, now)
        for uuid in absent:
            self.gpu(uuid).log.hold("gpu_missing", True, now)

    def see_event(self, uuid: str, signal: str, number: int, now: float) -> bool:
        """Whether the driver's recovery action must be read again."""
        name = f"xid:{number}" if signal == "xid" else signal
        try:
            rule = self._table.rule(name)
        except KeyError:
            return False
        self.gpu(uuid).log.occur(name, now)
        return rule.cls is SignalClass.RE_READ

    def see_rank(self, binding: Binding, signal: str, holds: bool, now: float, **detail: Any) -> None:
        case = self.ranks.setdefault((binding.rank, binding.incarnation), Case(EvidenceLog()))
        case.log.hold(signal, holds, now, **detail)

    def bind(self, bindings: Bindings) -> None:
        """The daemon's present bindings. Cases of ranks that are gone are closed."""
        self.bindings = bindings
        current = {(one.rank, one.incarnation) for one in bindings.ranks}
        self.ranks = {key: case for key, case in self.ranks.items() if key in current}
        for key in current:
            self.ranks.setdefault(key, Case(EvidenceLog()))
        self.views = {
            one.incarnation: self.views[one.incarnation] for one in bindings.ranks if one.incarnation in self.views
        }
        for uuid, wall in bindings.released.items():
            if self.state.release(uuid, wall):
                self.gpu(uuid).log.forget()

    def say_again(self, targets: Iterable[Target] | None = None) -> None:
        """Issue these rulings (all) again at the next review: the daemon was restarted, or is in another epoch."""
        cases: Iterable[tuple[Target, Case]] = (*self.gpus.items(), *self.ranks.items())
        wanted = None if targets is None else set(targets)
        for target, case in cases:
            if case.ruling is not None and (wanted is None or target in wanted):
                case.again = case.ruling.verdict is not Verdict.OK

    def review(self, now: float, wall: float) -> list[Ruling]:
        """Judge all cases. Returns the rulings that are new, the gravest first."""
        rulings = []
        judged = {uuid: self._judge_gpu(uuid, case, now, wall) for uuid, case in self.gpus.items()}
        for uuid, judgement in sorted(judged.items(), key=lambda pair: -pair[1].verdict.severity):
            for_gpu = judgement if judgement.verdict is not Verdict.RESTART_RANK else _only_suspect(judgement)
            if ruling := self._rule(uuid, self.gpus[uuid], for_gpu, now, wall):
                rulings.append(ruling)
            self._remember(uuid, judgement, wall)
        for binding in self.bindings.ranks:
            key = (binding.rank, binding.incarnation)
            case = self.ranks[key]
            judgement = judge_rank(case.log.all(now), self._table, now)
            of_gpu = judged.get(binding.gpu or "", HEALTHY)
            if of_gpu.verdict is Verdict.RESTART_RANK and not judgement.verdict.acts and self._stands_still(binding):
                judgement = of_gpu
            if ruling := self._rule(key, case, judgement, now, wall):
                rulings.append(ruling)
        return sorted(rulings, key=lambda ruling: -ruling.verdict.severity)

    def _stands_still(self, binding: Binding) -> bool:
        view = self.views.get(binding.incarnation)
        return view is None or view.stalled_s is None or view.stalled_s >= self.policy.stall_s

    def _judge_gpu(self, uuid: str, case: GpuCase, now: float, wall: float) -> Judgement:
        bound = self.bindings.on_gpu(uuid)
        views = [self.views.get(one.incarnation, RankView(one.rank, one.incarnation, uuid)) for one in bound]
        history = self.state.record(uuid).history
        return judge_gpu(case.log.all(now), self._table, self.policy, history, views, now, wall)

    def _remember(self, uuid: str, judgement: Judgement, wall: float) -> None:
        """A GPU has failed when it is taken out of service, once until it is well again, also over a restart. What is
        held back, or only observed, does not count: it would be acted on later, by quarantine."""
        removes, ruling = judgement.verdict.removes, self.gpus[uuid].ruling
        if removes and (ruling is None or not ruling.act):
            return
        if removes and not self.state.record(uuid).verdict.removes:
            self.state.see(uuid, wall)
            if judgement.signal != "quarantine":
                self.state.add_failure(uuid, self.policy, wall)
        if uuid.startswith("GPU-") or judgement.verdict is not Verdict.OK:
            self.state.set_verdict(uuid, judgement.verdict)

    def _rule(self, target: Target, case: Case, judgement: Judgement, now: float, wall: float) -> Ruling | None:
        """The new ruling on a case, or None when what was said before still stands."""
        old = case.ruling
        if judgement.verdict is not case.judgement.verdict:
            case.since = wall
        case.judgement = judgement
        if judgement.verdict is Verdict.OK and old is None:
            return None
        incarnations = self._incarnations(target)
        standing = old is not None and old.act and old.verdict is judgement.verdict and incarnations <= old.incarnations
        held = None if standing else self._held(target, judgement, now)
        act = judgement.verdict.acts and held is None
        unchanged = old is not None and (old.verdict, old.act, old.held) == (judgement.verdict, act, held)
        if (
            old is not None
            and unchanged
            and not case.again
            and (not act or (standing and old.signal == judgement.signal))
        ):
            return None
        case.again = False
        if act and not standing:
            self._count_action(target, judgement, now, wall)
        self._count += 1
        case.ruling = Ruling(
            f"{self._run}-{self._count}",
            target,
            self.bindings.epoch,
            judgement.verdict,
            judgement.signal,
            judgement.reason,
            tuple(as_json(one, now, wall) for one in judgement.evidence),
            act,
            held,
            wall,
            incarnations,
        )
        return case.ruling

    def _incarnations(self, target: Target) -> frozenset[int]:
        return (
            frozenset(one.incarnation for one in self.bindings.on_gpu(target))
            if isinstance(target, str)
            else frozenset()
        )

    def _held(self, target: Target, judgement: Judgement, now: float) -> str | None:
        if not judgement.verdict.acts:
            return None
        if self.mode is Mode.OBSERVE:
            return "observe mode"
        return held_back(judgement, target if isinstance(target, str) else None, self.bound(now), self.policy, now)

    def bound(self, now: float) -> Bound:
        """What the breaker goes by."""
        since = now - self.policy.exclusion_window_s
        self._exclusions = [time for time in self._exclusions if time >= since]
        self._restarts = [time for time in self._restarts if time >= since]
        ranks: dict[str, tuple[int, ...]] = {}
        for one in self.bindings.ranks:
            ranks[one.gpu or f"rank {one.rank}"] = (*ranks.get(one.gpu or f"rank {one.rank}", ()), one.rank)
        leaving = frozenset(uuid for uuid, case in self.gpus.items() if self._is_leaving(uuid, case))
        return Bound(ranks, tuple(self._exclusions), tuple(self._restarts), leaving, self.bindings.min_ranks)

    def _is_leaving(self, uuid: str, case: Case) -> bool:
        """Its exclusion has been ordered for the ranks that are there now."""
        ruling = case.ruling
        if ruling is None or not ruling.act or not ruling.verdict.removes:
            return False
        return self._incarnations(uuid) <= ruling.incarnations

    def _count_action(self, target: Target, judgement: Judgement, now: float, wall: float) -> None:
        if isinstance(target, str):
            if judgement.verdict.removes and self.bindings.on_gpu(target):
                self._exclusions.append(now)
            return
        if not judgement.holds_others_up:
            self._restarts.append(now)
            return
        gpu = next((one.gpu for one in self.bindings.ranks if (one.rank, one.incarnation) == target), None)
        if gpu is not None:
            self.state.add_restart(gpu, wall)


def _only_suspect(judgement: Judgement) -> Judgement:
    """A GPU whose rank is to be restarted is itself only suspect: the ruling is on the rank."""
    return Judgement(Verdict.SUSPECT, judgement.signal, judgement.reason, judgement.evidence)
