"""Ranks that leave in order, and what an operator asked for: the books of both. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from elastic_daemon.membership import Rank, RankState
from elastic_daemon.protocol import Identity, OperationKind, OperationReport, OperationState, TelemetryVerdict


class Step(StrEnum):
    """What an orderly departure is at. Values read well as 'phase' of an operation."""

    REQUESTS = "moving requests"
    EXPERTS = "moving experts"
    LEAVING = "regrouping"


@dataclass
class Departure:
    """Members that leave: first their requests move, then what experts only they hold, then the group closes up.

    `after`: their state then. `forced`: when its time is over they leave as they are. `verdict`: that wants it.
    """

    ranks: frozenset[Identity]
    cause: str
    after: RankState
    forced: bool
    verdict: TelemetryVerdict | None = None
    step: Step = Step.REQUESTS
    moved: bool = False  # the front end has no request on them in this epoch
    overdue: bool = False

    def restart(self) -> None:
        """Another epoch: requests were placed anew."""
        self.step, self.moved = Step.REQUESTS, False


@dataclass
class Operation:
    """An order under way. `wanted_before`: who was to serve before it; `undoing`: how it will have ended."""

    id: str
    kind: OperationKind
    target: int
    previous: int
    started: float
    timeout_s: float
    retire: tuple[int, ...] | None = None
    wanted_before: frozenset[int] = frozenset()
    begun: bool = False
    ranks: tuple[int, ...] = ()
    phase: str = "waiting for the recovery under way"
    undoing: tuple[OperationState, str] | None = None
    reported: str = field(default="", repr=False)

    def report(
        self,
        state: OperationState = OperationState.RUNNING,
        message: str = "",
        ended: float | None = None,
        busy_with: str | None = None,
    ) -> OperationReport:
        return OperationReport(
            self.id,
            self.kind,
            state,
            self.phase,
            message,
            self.target,
            self.previous,
            self.ranks,
            self.started,
            ended,
            busy_with,
        )


def victims(rows: Iterable[Rank], wanted: frozenset[int], count: int) -> tuple[int, ...]:
    """Who is to leave when `count` of the `wanted` ranks must: first who serves least, then the highest ids."""
    order = [RankState.ACTIVE, RankState.SUSPECT, RankState.DRAINING, RankState.JOINING, RankState.STANDBY]
    state = {row.rank: row.state for row in rows}

    def worth(rank: int) -> tuple[int, int]:
        found = state.get(rank)
        return (order.index(found) if found in order else len(order), rank)

    return tuple(sorted(sorted(wanted, key=worth, reverse=True)[: max(count, 0)]))


def lowest_free(taken: frozenset[int], count: int) -> tuple[int, ...]:
    """The `count` lowest ids that are not taken."""
    return tuple(rank for rank in range(len(taken) + count) if rank not in taken)[:count]
