"""The one path of start-up and recovery: fence, regroup, resume. Pure.

    members parked -> plan -> Regroup all -> all regrouped -> Resume all, publish -> the front end is in step

Start-up comes to it with ranks that are parked because they have just been built; a recovery opens a new epoch and
fences every member first.
"""

from __future__ import annotations

import numpy as np

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Frontend, Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.recovery import Recovery
from elastic_daemon.control.service_control import ServiceControl
from elastic_daemon.membership import RankState
from elastic_daemon.placement import NotEnoughSlots, Placement, repair

OF_THE_EPOCH = (
    Wait.QUIESCE,
    Wait.FENCE,
    Wait.REGROUP,
    Wait.SYNC,
    Wait.GRACE,
    Wait.HOLD,
    Wait.SPREAD_START,
    Wait.SPREAD,
    Wait.STORE,
    Wait.RECONSIDER,
)


class GroupControl(ServiceControl):
    def _open_recovery(self, cause: str, evidence_at: float | None = None) -> Recovery:
        """The recovery under way; a new one if there is none. `evidence_at`: when its cause was first seen."""
        if self._recovery is None:
            seen = (self._now, evidence_at, self._fault.at if self._fault else None)
            self._recovery = Recovery(cause, min(at for at in seen if at is not None), self._now)
            self._record("recovery_started", cause=cause)
        return self._recovery

    def _quiesce(self) -> None:
        """Have all members stop together between two steps, for a change that can wait that long: no step is voided."""
        self._phase = Phase.QUIESCING
        for row in self._ranks.members:
            self._deadlines.arm(Wait.QUIESCE, self._now + self._policy.quiesce_timeout_s, row.rank)
            self._emit(p.Quiesce(row.rank, self.epoch))

    def _new_epoch(self, hold: bool = True) -> None:
        """Void the current epoch and fence every member in the next. The world stops here.

        `hold`: whether requests wait for it, or are ended.
        """
        self._lap()
        # Who has not answered the fence before this one is not given more time.
        promised = self._deadlines.of(Wait.FENCE)
        self._deadlines.clear(*OF_THE_EPOCH)
        self._fault, self._hold, self._spread = None, hold, None
        if self._departure is not None:
            self._departure.restart()
        self._columns = {}
        self._phase = Phase.FENCING
        epoch = self._ranks.next_epoch()
        self._publish()
        for row in self._ranks.members:
            at = promised.get(row.rank, self._now + self._policy.fence_timeout_s)
            self._deadlines.arm(Wait.FENCE, at, row.rank)
            self._emit(p.Fence(row.rank, epoch))
        if not self._ranks.members:
            self._regroup()

    def _regroup(self) -> None:
        """All members are parked and have said what they hold: one plan for all, or none that could serve."""
        self._lap()
        members = tuple(row.rank for row in self._ranks.members)
        policy = self._policy
        if len(members) * policy.slots < policy.experts:
            return self._unavailable(NotEnoughSlots(policy.experts, len(members) * policy.slots, len(members)))
        held = Placement(policy.experts, {rank: np.array(self._columns[rank]) for rank in members})
        plan = repair(held, members, self._host_copies)
        self._phase = Phase.REGROUPING
        self._placement = plan.placement
        self._regrouped = {}
        self._record("regrouping", epoch=self.epoch, members=members, loads=len(plan.loads))
        for rank in members:
            self._deadlines.arm(Wait.REGROUP, self._now + policy.regroup_timeout_s, rank)
            loads = tuple(load for load in plan.loads if load.rank == rank)
            self._emit(p.Regroup(rank, self.epoch, members, plan.placement, loads))

    def _on_regrouped(self, event: p.RankRegrouped) -> None:
        if self._phase is not Phase.REGROUPING:
            return
        self._regrouped[event.rank] = event.seconds
        self._host_copies.difference_update(event.unusable)
        self._deadlines.disarm(Wait.REGROUP, event.rank)
        if not self._deadlines.of(Wait.REGROUP):
            self._resume()

    def _resume(self) -> None:
        assert self._recovery is not None
        self._recovery.regrouped(self._regrouped.values(), self._now)
        for row in self._ranks.members:
            if row.state is RankState.JOINING or (row.state is RankState.SUSPECT and not self._doubts.of(row.identity)):
                self._ranks.move(row.rank, RankState.ACTIVE, self._now)
            self._comebacks.served(row.rank)
            self._ordered.discard(row.rank)
        self._show_doubts()
        self._phase, self._hold, self._spread_due = Phase.RESUMING, True, self._spreads
        self._publish()  # before any rank steps, so that the front end knows the epoch its output belongs to
        for row in self._ranks.members:
            self._emit(p.Resume(row.rank, self.epoch))
        # No front end, no requests: over at once, though not in this step, which is about this epoch alone.
        patience_s = self._policy.sync_timeout_s if self._frontend is Frontend.READY else 0.0
        self._deadlines.arm(Wait.SYNC, self._now + patience_s)

    def _unavailable(self, why: NotEnoughSlots) -> None:
        """Ranks stay parked, and hold what they hold."""
        if self._phase is not Phase.UNAVAILABLE:
            self._phase = Phase.UNAVAILABLE
            self._deadlines.arm(Wait.HOLD, self._now + self._policy.hold_timeout_s)
        self._trouble = str(why)
        self._record("unavailable", epoch=self.epoch, reason=self._trouble)
        self._publish()
