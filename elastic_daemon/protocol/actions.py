"""What the controller asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_daemon.membership import Status
from elastic_daemon.placement import Placement, SlotLoad
from elastic_daemon.protocol.base import Identity
from elastic_daemon.protocol.reports import OperationReport, RecoveryReport


@dataclass(frozen=True)
class StartRank:
    """`members`: who is planned to be in the group, for the initial placement of this rank's experts.

    `gpu`: the UUID of its GPU; None where GPUs are not known.
    """

    rank: int
    incarnation: int
    members: tuple[int, ...]
    slots: int
    gpu: str | None = None


@dataclass(frozen=True)
class KillRank:
    """Kill without waiting: the controller already counts it as dead. `doubtful`: its stacks are worth a look first."""

    rank: int
    incarnation: int
    reason: str
    doubtful: bool = True


@dataclass(frozen=True)
class Fence:
    rank: int
    epoch: int


@dataclass(frozen=True)
class Regroup:
    """`placement` is that of all members, `loads` are this rank's own."""

    rank: int
    epoch: int
    members: tuple[int, ...]
    placement: Placement
    loads: tuple[SlotLoad, ...]


@dataclass(frozen=True)
class Quiesce:
    """Stop together with the other members, between two steps of `epoch`, and wait for the fence."""

    rank: int
    epoch: int


@dataclass(frozen=True)
class Resume:
    rank: int
    epoch: int


@dataclass(frozen=True)
class Respread:
    """Move experts, while the group serves, until it holds them as in `placement`. Sent to every member."""

    rank: int
    epoch: int
    serial: int
    placement: Placement


@dataclass(frozen=True)
class StoreExperts:
    """Copy these experts, (layer, slot, expert), from this rank's slots to host memory, while it serves."""

    rank: int
    epoch: int
    experts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class StartFrontend:
    pass


@dataclass(frozen=True)
class KillFrontend:
    """It did not become ready in time. Repeated until its exit is reported."""

    reason: str


@dataclass(frozen=True)
class Snapshot:
    """The membership, as the front end needs it."""

    epoch: int
    status: Status
    reason: str
    active: tuple[Identity, ...]
    excluded: tuple[Identity, ...]  # so far in this recovery
    hold: bool = True  # while not serving: hold requests; False once the hold timeout has passed: refuse them (503)
    draining: tuple[Identity, ...] = ()  # of the active ones: move their requests to the others, send them none


@dataclass(frozen=True)
class Publish:
    """For the front end.

    ok, degraded: put the requests of ranks that are not in `active` onto ones that are, open, then answer
    FrontendSynced(epoch); with `draining`, also FrontendMoved when nothing is left on those. stopping: take nothing
    new, finish what runs. Anything else: hold what comes in, and deliver nothing more from `excluded`.
    """

    membership: Snapshot


@dataclass(frozen=True)
class RecordEvent:
    """For `/events` and the log."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecoveryDone:
    report: RecoveryReport


@dataclass(frozen=True)
class OperationChanged:
    report: OperationReport


@dataclass(frozen=True)
class StoreTarget:
    """Remember over restarts that an operator wants so many ranks."""

    target: int


@dataclass(frozen=True)
class StoreBarred:
    """Remember over restarts which GPUs are barred, and why: all of them."""

    barred: Mapping[str, str]


@dataclass(frozen=True)
class StopAll:
    """End the front end and every rank process, whatever they are doing."""


@dataclass(frozen=True)
class Exit:
    """The last action ever: 0 stopped, 3 start-up impossible, 4 the front end keeps dying."""

    code: int
    reason: str


Action = (
    StartRank
    | KillRank
    | Quiesce
    | Fence
    | Regroup
    | Resume
    | Respread
    | StoreExperts
    | StartFrontend
    | KillFrontend
    | Publish
    | RecordEvent
    | RecoveryDone
    | OperationChanged
    | StoreBarred
    | StoreTarget
    | StopAll
    | Exit
)
