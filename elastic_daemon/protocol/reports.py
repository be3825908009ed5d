"""What the controller reports: recoveries, operations, health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from elastic_daemon.membership import RankState, Status


class RecoveryKind(StrEnum):
    START = "start"
    SHRINK = "shrink"
    GROW = "grow"
    REGROUP = "regroup"  # the same members again, after a fault without a death


@dataclass(frozen=True)
class RequestCounts:
    kept: int
    replayed: int
    restarted: int
    lost: int


@dataclass(frozen=True)
class RecoveryReport:
    """`seconds`: detect, fence, regroup, repair, resume, total; the phases add up to the total.

    `requests` is None where no front end was there to tell.
    """

    epoch: int
    kind: RecoveryKind
    ranks: tuple[int, ...]  # lost in it; those that joined, when it grew
    cause: str
    seconds: Mapping[str, float]
    requests: RequestCounts | None


class OperationKind(StrEnum):
    SCALE = "scale"
    DRAIN = "drain"
    EXCLUDE = "exclude"
    RELEASE = "release"


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    INVALID = "invalid"  # it asks for what cannot be; nothing was changed
    BUSY = "busy"  # another one is running; nothing was changed
    TIMED_OUT = "timed out"  # nothing is changed
    ROLLED_BACK = "rolled back"  # it failed, and what it had begun was undone

    @property
    def ended(self) -> bool:
        return self is not OperationState.RUNNING


@dataclass(frozen=True)
class OperationReport:
    """What an operator's order has come to.

    `phase`: what it is at, in words. `message`: how it ended, or why it was refused. `target` and `previous`: ranks to
    serve with, after and before. `ranks`: that join or leave. `busy_with`: the operation in its way, when `busy`.
    """

    operation: str
    kind: OperationKind
    state: OperationState
    phase: str
    message: str
    target: int
    previous: int
    ranks: tuple[int, ...]
    started: float
    ended: float | None = None
    busy_with: str | None = None


@dataclass(frozen=True)
class RankHealth:
    rank: int
    state: RankState
    since: float
    reason: str | None
    incarnation: int
    gpu: str | None = None


@dataclass(frozen=True)
class HealthSnapshot:
    """`/health`, less what only the shell knows (pids, GPUs, requests in flight, wall-clock time).

    `expert_safety` and `survivable_losses` are -1 when an expert is in no rank's memory, or finds no slot;
    `expert_safety` is None before the first placement. `doing`: one sentence on what goes on and what it waits for.
    `frontend_ready`: whether somebody is there to accept requests, be it to hold them.
    """

    status: Status
    reason: str
    doing: str
    epoch: int
    target: int
    active: int
    expert_safety: int | None
    survivable_losses: int
    ranks: tuple[RankHealth, ...]
    last_recovery: RecoveryReport | None
    last_shrink: RecoveryReport | None
    last_grow: RecoveryReport | None
    frontend_ready: bool
