"""The control core: hears events, decides, asks for actions.

Pure: no I/O, no clock, no tasks. The shell around it sends every event with the time, carries out the actions in order,
and sends a Tick no later than `next_deadline()`.

Start-up and recovery share one path, and never more than one is under way:

    members parked -> plan -> Regroup all -> all regrouped -> Resume all, publish -> the front end is in step

Start-up comes to it with ranks that are parked because they have just been built; a recovery opens a new epoch and
fences every member first. Whatever goes wrong on the way (one more death, silence, a failed regroup) leads back to
fencing, in the next epoch, with the members that are left.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import assert_never

import numpy as np

from elastic_daemon import protocol as p
from elastic_daemon.control_state import Frontend, Phase
from elastic_daemon.deadlines import Wait
from elastic_daemon.membership import MEMBERS, Rank, RankState
from elastic_daemon.placement import NotEnoughSlots, Placement, repair
from elastic_daemon.recovery import Fault, Recovery, Remedy
from elastic_daemon.service_control import EXIT_START, EXIT_STOPPED, ServiceControl
from elastic_daemon.verdicts import Measure, Situation, decide


class Controller(ServiceControl):
    def start(self, now: float) -> tuple[p.Action, ...]:
        """To be called once, first."""
        self._now = now
        for rank in range(self._policy.target):
            self._start_rank(rank)
        self._start_frontend()
        return self._flush()

    def handle(self, event: p.Event, now: float) -> tuple[p.Action, ...]:
        self._now = max(self._now, now)
        if self._phase is Phase.EXITED:
            return ()
        match event:
            case p.Tick():
                self._on_tick()
            case p.FrontendReady() | p.FrontendExited() | p.FrontendSynced():
                self._on_frontend(event)
            case p.StopRequested() | p.DrainComplete():
                self._on_operator(event)
            case p.TelemetryVerdict():
                self._on_verdict(event)
            case _:
                # An old incarnation, or one that was given up, is a zombie, whatever it says.
                if row := self._ranks.current(event.rank, event.incarnation):
                    self._on_rank(event, row)
        if self._can_grow and Wait.JOIN not in self._deadlines:
            self._deadlines.arm(Wait.JOIN, self._now + self._policy.join_delay_s)
        return self._flush()

    def next_deadline(self) -> float | None:
        """When the shell must send Tick at the latest. None: nothing that is waited for can be late."""
        return self._deadlines.next

    # --- events --------------------------------------------------------------------------------------------------

    def _on_rank(self, event: p.RankEvent, row: Rank) -> None:
        match event:
            case p.RankReady():
                self._on_ready(event, row)
            case p.RankExited():
                self._lose({row.rank: event.status})
            case _ if event.epoch != self.epoch:
                pass  # belongs to an epoch that is over
            case p.RankFenced():
                self._on_fenced(event)
            case p.RankRegrouped():
                self._on_regrouped(event)
            case p.RegroupFailed():
                if self._phase is Phase.REGROUPING:
                    self._regroup_failed((row.rank,), event.error)
            case p.RankFault():
                self._on_fault(event, row)
            case _:
                assert_never(event)

    def _on_frontend(self, event: p.FrontendEvent) -> None:
        match event:
            case p.FrontendReady():
                if self._frontend is Frontend.STARTING:
                    self._frontend = Frontend.READY
                    self._deadlines.disarm(Wait.FRONTEND_START)
                    self._record("frontend_ready")
                    self._publish()
            case p.FrontendExited():
                if self._frontend is not Frontend.DOWN:
                    self._on_frontend_exited(event.status)
            case p.FrontendSynced():
                if event.epoch == self.epoch:
                    self._fault_run.in_step(event.kept + event.replayed + event.restarted, event.delivered)
                if self._phase is Phase.RESUMING and event.epoch == self.epoch:
                    self._finish(p.RequestCounts(event.kept, event.replayed, event.restarted, event.lost))
            case _:
                assert_never(event)

    def _on_operator(self, event: p.OperatorEvent) -> None:
        match event:
            case p.StopRequested():
                self._on_stop(event.timeout_s)
            case p.DrainComplete():
                if self._phase is Phase.STOPPING:
                    self._exit(EXIT_STOPPED, "drained")
            case _:
                assert_never(event)

    def _on_tick(self) -> None:
        policy, now, due = self._policy, self._now, self._deadlines.pop_due
        if due(Wait.DRAIN, now):
            return self._exit(EXIT_STOPPED, "the time to drain is over")
        if ranks := due(Wait.RANK_START, now):
            self._lose(dict.fromkeys(ranks, f"not ready {policy.start_timeout_s:g} s after its start"), kill=True)
        for rank in due(Wait.RANK_RESTART, now):
            self._start_rank(rank)
        if ranks := due(Wait.FENCE, now):
            self._lose(dict.fromkeys(ranks, f"not parked {policy.fence_timeout_s:g} s after it was fenced"), kill=True)
        if ranks := due(Wait.REGROUP, now):
            # One hung rank keeps all others waiting: silence alone does not say who is at fault. The next fence
            # does, since whoever is alive answers it.
            self._regroup_failed(ranks, f"not done within {policy.regroup_timeout_s:g} s")
        if due(Wait.SYNC, now):
            self._record("frontend_not_in_step", epoch=self.epoch)
            self._finish(None)
        if due(Wait.JOIN, now) and self._can_grow:
            self._enlist()
        if due(Wait.GRACE, now) and self._fault is not None:
            self._on_lone_fault(self._fault)
        if due(Wait.HOLD, now):
            self._hold = False
            self._record("hold_over", reason=self._trouble)
            self._publish()
        if due(Wait.FRONTEND_START, now):
            self._watch_frontend()  # until its exit is reported
            self._emit(p.KillFrontend(f"not ready within {policy.frontend_start_timeout_s:g} s"))
        if due(Wait.FRONTEND_RESTART, now):
            self._start_frontend()

    # --- starting ------------------------------------------------------------------------------------------------

    def _start_rank(self, rank: int) -> None:
        row = self._ranks.start(rank, self._now)
        self._deadlines.arm(Wait.RANK_START, self._now + self._policy.start_timeout_s, rank)
        self._record("rank_starting", rank=rank, incarnation=row.incarnation, attempt=row.starts)
        self._emit(p.StartRank(rank, row.incarnation, tuple(range(self._policy.target)), self._policy.slots))

    def _on_ready(self, event: p.RankReady, row: Rank) -> None:
        if row.state is not RankState.STARTING:
            return  # said twice
        if self._layers is None:
            self._layers = event.layers
        if error := self._column_error(event.column):
            return self._lose({row.rank: error}, kill=True)
        self._ranks.move(row.rank, RankState.STANDBY, self._now)
        self._deadlines.disarm(Wait.RANK_START, row.rank)
        self._columns[row.rank] = event.column
        self._record("rank_standby", rank=row.rank, incarnation=row.incarnation)
        standby = self._ranks.where(RankState.STANDBY)
        if self._phase is Phase.STARTING and len(standby) == self._policy.target:
            self._ranks.next_epoch()
            self._open_recovery("start")
            for standby_row in standby:
                self._ranks.move(standby_row.rank, RankState.JOINING, self._now)
            self._regroup()

    @property
    def _can_grow(self) -> bool:
        """Whether ranks on standby could be let in now: nothing else goes on, and it helps."""
        standby, policy = self._ranks.where(RankState.STANDBY), self._policy
        if self._phase is Phase.UNAVAILABLE:
            return (len(self._ranks.members) + len(standby)) * policy.slots >= policy.experts
        return bool(standby) and self._phase is Phase.SERVING

    def _enlist(self) -> None:
        """Let the ranks on standby in: the group regroups with them, in a new epoch."""
        standby = self._ranks.where(RankState.STANDBY)
        cause = f"rank {', '.join(str(row.rank) for row in standby)} joins"
        self._open_recovery(cause).join((row.identity for row in standby), cause)
        for row in standby:
            self._ranks.move(row.rank, RankState.JOINING, self._now)
        self._new_epoch()

    # --- losing ranks --------------------------------------------------------------------------------------------

    def _lose(
        self,
        reasons: Mapping[int, str],
        *,
        kill: bool = False,
        evidence_at: float | None = None,
        for_good: bool = False,
    ) -> None:
        """These ranks are dead, or (`kill`) given up, which is the same from now on: nobody waits for a corpse.

        `for_good`: they are not started again, since the cause stays.
        """
        lost_members = []
        had_served = {row.rank for row in self._group}
        for rank, reason in reasons.items():
            if self._ranks[rank].state in MEMBERS:
                lost_members.append(self._ranks[rank].identity)
            row = self._ranks.move(rank, RankState.EXCLUDED, self._now, reason)
            self._deadlines.disarm(Wait.RANK_START, rank)
            self._columns.pop(rank, None)
            self._record("rank_excluded", rank=rank, incarnation=row.incarnation, reason=reason)
            if kill:
                self._emit(p.KillRank(rank, row.incarnation, reason))
        if self._phase is Phase.STARTING:
            return self._restart_later(reasons)
        if self._policy.restore and self._phase is not Phase.STOPPING:
            self._let_come_back(reasons, had_served, for_good)
        if self._phase is Phase.STOPPING and lost_members:
            self._exit(EXIT_STOPPED, "a rank was lost while draining")
        elif lost_members:
            cause = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
            self._fault_run.lost_member()
            self._open_recovery(cause, evidence_at).lose(lost_members, cause)
            if self._phase is Phase.UNAVAILABLE:
                self._ranks.next_epoch()
                self._regroup()  # says how few are left now; the survivors stay parked
            else:
                self._new_epoch()

    def _restart_later(self, reasons: Mapping[int, str]) -> None:
        for rank, reason in reasons.items():
            starts = self._ranks[rank].starts
            if starts >= self._policy.max_start_attempts:
                return self._exit(EXIT_START, f"rank {rank} did not start in {starts} attempts, the last: {reason}")
            self._deadlines.arm(Wait.RANK_RESTART, self._now + self._policy.backoff(starts), rank)

    def _let_come_back(self, ranks: Iterable[int], had_served: Container[int], for_good: bool) -> None:
        for rank in ranks:
            at = self._comebacks.after_loss(rank, self._now, had_served=rank in had_served)
            if at is not None and not for_good:
                self._deadlines.arm(Wait.RANK_RESTART, at, rank)
            else:
                self._record("rank_left_out", rank=rank, reason=self._ranks[rank].reason)

    def _on_fault(self, event: p.RankFault, row: Rank) -> None:
        fault = Fault(self._now, row.rank, event.error)
        match self._phase:
            case Phase.REGROUPING:
                self._regroup_failed((row.rank,), event.error)
            case Phase.STOPPING:
                self._exit(EXIT_STOPPED, f"a fault while draining: {fault.reason}")
            case Phase.RESUMING | Phase.SERVING:
                if row.state is RankState.ACTIVE:
                    self._ranks.move(row.rank, RankState.SUSPECT, self._now, event.error)
                    self._record("rank_fault", rank=row.rank, incarnation=row.incarnation, error=event.error)
                if self._fault is None:  # a death may follow that explains it
                    self._fault = fault
                    self._deadlines.arm(Wait.GRACE, self._now + self._policy.fault_grace_s)

    def _on_lone_fault(self, fault: Fault) -> None:
        """No death explains it. The same members regroup, unless that has cured nothing for too long."""
        members = self._ranks.members
        may_exclude = (len(members) - 1) * self._policy.slots >= self._policy.experts
        remedy = self._fault_run.fault(fault.rank, may_exclude)
        why = f"{self._policy.max_vain_faults} faults in a row before any request got a token, the last: {fault.reason}"
        if remedy is Remedy.EXCLUDE:
            return self._lose({self._fault_run.most_blamed(row.rank for row in members): why}, kill=True)
        hopeless = remedy is Remedy.END_REQUESTS
        cause = why if hopeless else fault.reason
        self._open_recovery(cause).add_cause(cause)
        if hopeless:
            self._record("requests_given_up", epoch=self.epoch, reason=why)
        self._new_epoch(hold=not hopeless)

    def _on_verdict(self, event: p.TelemetryVerdict) -> None:
        rows = [row for identity in event.ranks if (row := self._ranks.current(*identity))]
        members = sum(row.state in MEMBERS for row in rows)
        serving, stopping = self._phase in (Phase.RESUMING, Phase.SERVING), self._phase is Phase.STOPPING
        situation = Situation(len(rows), members, len(self._ranks.members), serving, stopping)
        decision = decide(event, situation, self._policy)
        self._doubts.hear(event, decision)
        self._show_doubts()
        match decision.measure:
            case Measure.EXCLUDE:
                bad_gpu = event.verdict is not p.VerdictKind.RESTART_RANK
                reasons = {row.rank: event.reason for row in rows}
                self._lose(reasons, kill=True, evidence_at=event.at, for_good=bad_gpu)
            case Measure.FENCE:
                cause = "; ".join(f"rank {row.rank}: {event.reason}" for row in rows)
                self._open_recovery(cause, event.at).add_cause(cause)
                self._new_epoch()
            case Measure.REFUSE:
                ranks, told = [row.rank for row in rows], event.verdict.value
                self._record("verdict_refused", ranks=ranks, verdict=told, reason=event.reason, why=decision.why)

    # --- the path: fence, regroup, resume ------------------------------------------------------------------------

    def _open_recovery(self, cause: str, evidence_at: float | None = None) -> Recovery:
        """The recovery under way; a new one if there is none. `evidence_at`: when its cause was first seen."""
        if self._recovery is None:
            seen = (self._now, evidence_at, self._fault.at if self._fault else None)
            self._recovery = Recovery(cause, min(at for at in seen if at is not None), self._now)
            self._record("recovery_started", cause=cause)
        return self._recovery

    def _new_epoch(self, hold: bool = True) -> None:
        """Void the current epoch and fence every member in the next. The world stops here.

        `hold`: whether requests wait for it, or are ended.
        """
        self._lap()
        # Who has not answered the fence before this one is not given more time.
        promised = self._deadlines.of(Wait.FENCE)
        self._deadlines.clear(Wait.FENCE, Wait.REGROUP, Wait.SYNC, Wait.GRACE, Wait.HOLD)
        self._fault, self._hold = None, hold
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

    def _on_fenced(self, event: p.RankFenced) -> None:
        if self._phase is not Phase.FENCING:
            return
        if error := self._column_error(event.column):
            return self._lose({event.rank: error}, kill=True)
        self._columns[event.rank] = event.column
        self._deadlines.disarm(Wait.FENCE, event.rank)
        if not self._deadlines.of(Wait.FENCE):
            self._regroup()

    def _regroup(self) -> None:
        """All members are parked and have said what they hold: one plan for all, or none that could serve."""
        self._lap()
        members = tuple(row.rank for row in self._ranks.members)
        policy = self._policy
        if len(members) * policy.slots < policy.experts:
            return self._unavailable(NotEnoughSlots(policy.experts, len(members) * policy.slots, len(members)))
        held = Placement(policy.experts, {rank: np.array(self._columns[rank]) for rank in members})
        plan = repair(held, members)
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
        self._deadlines.disarm(Wait.REGROUP, event.rank)
        if not self._deadlines.of(Wait.REGROUP):
            self._resume()

    def _regroup_failed(self, ranks: tuple[int, ...], error: str) -> None:
        recovery = self._open_recovery(error)
        recovery.regroup_failed(ranks)
        self._record("regroup_failed", epoch=self.epoch, ranks=ranks, error=error)
        joining = self._ranks.where(RankState.JOINING)
        if recovery.failed_regroups > 1 and 0 < len(joining) < len(self._ranks.members):
            # The others have worked together before: to grow is not worth a longer pause.
            return self._lose(dict.fromkeys((row.rank for row in joining), f"could not join: {error}"), kill=True)
        if recovery.failed_regroups < self._policy.max_regroup_failures:
            return self._new_epoch()
        culprit = recovery.most_blamed(row.rank for row in self._ranks.members)
        self._lose({culprit: f"{recovery.failed_regroups} regroups failed, the last: {error}"}, kill=True)

    def _resume(self) -> None:
        assert self._recovery is not None
        self._recovery.regrouped(self._regrouped.values(), self._now)
        for row in self._ranks.members:
            if row.state is RankState.JOINING or (row.state is RankState.SUSPECT and not self._doubts.of(row.identity)):
                self._ranks.move(row.rank, RankState.ACTIVE, self._now)
            self._comebacks.served(row.rank)
        self._show_doubts()
        self._phase, self._hold = Phase.RESUMING, True
        self._publish()  # before any rank steps, so that the front end knows the epoch its output belongs to
        for row in self._ranks.members:
            self._emit(p.Resume(row.rank, self.epoch))
        if self._frontend is Frontend.READY:
            self._deadlines.arm(Wait.SYNC, self._now + self._policy.sync_timeout_s)
        else:
            self._finish(None)  # no front end, no requests

    def _unavailable(self, why: NotEnoughSlots) -> None:
        """Ranks stay parked, and hold what they hold."""
        if self._phase is not Phase.UNAVAILABLE:
            self._phase = Phase.UNAVAILABLE
            self._deadlines.arm(Wait.HOLD, self._now + self._policy.hold_timeout_s)
        self._trouble = str(why)
        self._record("unavailable", epoch=self.epoch, reason=self._trouble)
        self._publish()
