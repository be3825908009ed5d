"""A control plane for the routes: the real controller and the real desk, with ranks that answer at once, or when told.

Time is simulated: it passes with `pass_time` only.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from elastic_daemon import protocol as p
from elastic_daemon.control.policy import Policy
from elastic_daemon.controller import Controller
from elastic_daemon.membership import Status
from elastic_daemon.placement import initial
from elastic_daemon.routes.health import HealthView
from elastic_daemon.routes.operations import OperationDesk
from elastic_daemon.routes.placement_view import PlacementView
from elastic_daemon.routes.recovery_history import RecoveryHistory
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.metrics import Metrics

LAYERS = 2
POLICY = Policy(target=4, experts=16, slots=8, max_ranks=6, join_delay_s=0.0)
GPU = "GPU-00000000-0000-0000-0000-000000000001"


class OperatorPlane:
    """`play` off: what ranks and the front end would answer is kept until `resume`."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.events = EventLog()
        self.metrics = Metrics()
        self.recoveries = RecoveryHistory()
        self.is_turning = True
        self.min_ranks, self.max_ranks = 2, policy.max_ranks
        self.automation = True
        self.released: list[str] = []
        self.stored: list[int] = []
        self.play = True
        self.operations = OperationDesk(self.tell)
        self._policy = policy
        self._now = 0.0
        self._answers: deque[p.Event] = deque()
        self._columns: dict[int, p.Column] = {}
        self.controller: Controller | None = Controller(policy, self._now)
        self._carry_out(self.controller.start(self._now))
        self._settle()

    def health(self) -> HealthView:
        snapshot = self.controller.snapshot(self._now) if self.controller is not None else None
        return HealthView(snapshot, "tiny-moe", 4, 0, {}, {}, 1e9)

    def placement(self) -> PlacementView | None:
        return self.controller.placement if self.controller is not None else None

    async def ask_ranks(self, question: str) -> dict[int, Any]:
        return {}

    def set_automation(self, enabled: bool) -> None:
        self.automation = enabled
        self.tell(p.AutomationSwitched(enabled))

    def release_gpu(self, uuid: str) -> None:
        if uuid != GPU:
            raise LookupError(f"no GPU {uuid} is known")
        self.released.append(uuid)

    def tell(self, event: p.Event) -> None:
        if self.controller is not None:
            self._carry_out(self.controller.handle(event, self._now))
            if self.play:
                self._settle()

    @property
    def active(self) -> list[int]:
        assert self.controller is not None
        return [row.rank for row in self.controller.snapshot(self._now).ranks if row.state.value == "active"]

    def resume(self) -> None:
        self.play = True
        self._settle()

    @property
    def now(self) -> float:
        return self._now

    def carry_out(self, actions: tuple[p.Action, ...]) -> None:
        self._carry_out(actions)
        self._settle()

    def pass_time(self, seconds: float) -> None:
        assert self.controller is not None
        end = self._now + seconds
        while (deadline := self.controller.next_deadline()) is not None and deadline <= end:
            self._now = max(self._now, deadline)
            self.tell(p.Tick())
        self._now = end

    def lose(self, rank: int) -> None:
        """Its process dies."""
        assert self.controller is not None
        (row,) = [row for row in self.controller.snapshot(self._now).ranks if row.rank == rank]
        self.tell(p.RankExited(rank, row.incarnation, "process ended"))

    def _settle(self) -> None:
        """Let everybody answer, and what is due now happen."""
        assert self.controller is not None
        while True:
            deadline = self.controller.next_deadline()
            if self._answers:
                event = self._answers.popleft()
            elif deadline is not None and deadline <= self._now:
                event = p.Tick()
            else:
                return
            self._carry_out(self.controller.handle(event, self._now))

    def _carry_out(self, actions: tuple[p.Action, ...]) -> None:
        for action in actions:
            match action:
                case p.OperationChanged():
                    self.operations.changed(action.report)
                case p.StoreTarget():
                    self.stored.append(action.target)
                case _:
                    self._answers.extend(self._answer(action))

    def _answer(self, action: p.Action) -> list[p.Event]:
        assert self.controller is not None
        incarnations = {row.rank: row.incarnation for row in self.controller.snapshot(self._now).ranks}
        match action:
            case p.StartRank():
                placement = initial(self._policy.experts, LAYERS, sorted({*action.members, action.rank}), action.slots)
                self._columns[action.rank] = tuple(map(tuple, placement.columns[action.rank].tolist()))
                return [p.RankReady(action.rank, action.incarnation, LAYERS, self._columns[action.rank])]
            case p.KillRank():
                return [p.RankExited(action.rank, action.incarnation, "killed")]
            case p.Quiesce():
                return [p.RankQuiesced(action.rank, incarnations[action.rank], action.epoch)]
            case p.Fence():
                column = self._columns[action.rank]
                return [p.RankFenced(action.rank, incarnations[action.rank], action.epoch, column)]
            case p.Regroup():
                self._columns[action.rank] = tuple(map(tuple, action.placement.columns[action.rank].tolist()))
                seconds = {"group": 0.0, "repair": 0.0}
                return [p.RankRegrouped(action.rank, incarnations[action.rank], action.epoch, seconds)]
            case p.Respread():
                self._columns[action.rank] = column = tuple(map(tuple, action.placement.columns[action.rank].tolist()))
                at = (action.rank, incarnations[action.rank], action.epoch, action.serial)
                return [p.RankRespread(*at, column, 0.0, 0)]
            case p.StartFrontend():
                return [p.FrontendReady()]
            case p.Publish():
                return self._published(action.membership)
        return []

    @staticmethod
    def _published(membership: p.Snapshot) -> list[p.Event]:
        if membership.status not in (Status.OK, Status.DEGRADED):
            return []
        synced: list[p.Event] = [p.FrontendSynced(membership.epoch, 0, 0, 0, 0, 0)]
        if membership.draining:
            synced.append(
                p.FrontendMoved(membership.epoch, tuple(incarnation for _, incarnation in membership.draining))
            )
        return synced
