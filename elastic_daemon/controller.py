"""The control core: hears events, decides, asks for actions.

Pure: no I/O, no clock, no tasks. The shell around it sends every event with the time, carries out the actions in order,
and sends a Tick no later than `next_deadline()`, or says for how long it could not.

Start-up and recovery share one path, and never more than one is under way:

    members parked -> plan -> Regroup all -> all regrouped -> Resume all, publish -> the front end is in step

Start-up comes to it with ranks that are parked because they have just been built; a recovery opens a new epoch and
fences every member first; before a change that can wait, the members end their step. Whatever goes wrong on the way
(one more death, silence, a failed regroup) leads back to fencing, in the next epoch, with the members that are left.
"""

from __future__ import annotations

from typing import assert_never

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import STEPPING, Frontend, Phase
from elastic_daemon.control.deadlines import OF_OTHERS, Wait
from elastic_daemon.control.policy import Policy
from elastic_daemon.control.recovery import Fault, Remedy
from elastic_daemon.control.scaling_control import ScalingControl
from elastic_daemon.control.service_control import EXIT_STOPPED
from elastic_daemon.membership import Rank, RankState


class Controller(ScalingControl):
    def start(self, now: float) -> tuple[p.Action, ...]:
        """To be called once, first."""
        self._now = now
        self._deadlines.arm(Wait.START, now + self._policy.start_timeout_s)
        self._fill()
        self._start_frontend()
        return self._flush()

    def adopt(self, policy: Policy, now: float) -> tuple[p.Action, ...]:
        """Go on with another policy for the same deployment. What is being waited for keeps its deadline."""
        self._now = max(self._now, now)
        if self._phase is Phase.EXITED:
            return ()
        self.be_patient(policy)
        self._go_on()
        return self._flush()

    def handle(self, event: p.Event, now: float) -> tuple[p.Action, ...]:
        self._now = max(self._now, now)
        if self._phase is Phase.EXITED:
            return ()
        match event:
            case p.Tick():
                self._on_tick()
            case p.Stalled():
                self._on_stalled(event.seconds)
            case p.FrontendReady() | p.FrontendExited() | p.FrontendSynced():
                self._on_frontend(event)
            case p.StopRequested() | p.DrainComplete() | p.ScaleOrder() | p.RankOrder() | p.AutomationSwitched():
                self._on_operator(event)
            case p.TelemetryVerdict():
                self._on_verdict(event)
            case p.GpusSeen():
                self._gpus.see(event.gpus, self._now)
            case p.GpuReleased():
                self._forgive_gpu(event.uuid)
            case p.FrontendMoved():
                self._on_moved(event)
            case _:
                # An old incarnation, or one that was given up, is a zombie, whatever it says.
                if row := self._ranks.current(event.rank, event.incarnation):
                    self._on_rank(event, row)
        self._go_on()
        return self._flush()

    def _go_on(self) -> None:
        """Begin what can begin now. At most one change of the group is under way."""
        self._stop_when_serving()
        if self._phase not in (Phase.EXITED, Phase.STOPPING):
            self._fill()
        if self._phase in (Phase.EXITED, Phase.STOPPING):
            return
        self._wait_to_reconsider()
        self._advance_operation()
        self._advance_departure()
        self._advance_operation()  # a departure may just have ended
        if self._can_grow and Wait.JOIN not in self._deadlines:
            self._deadlines.arm(Wait.JOIN, self._now + self._policy.join_delay_s)
        if self._phase is Phase.SERVING:
            self._wait_to_spread()
        if self._phase in STEPPING and self._shown is not self.status:  # more or fewer are wanted
            self._publish()

    def next_deadline(self) -> float | None:
        """When the shell must send Tick at the latest. None: nothing that is waited for can be late."""
        return self._deadlines.next

    def _on_rank(self, event: p.RankEvent, row: Rank) -> None:
        match event:
            case p.RankReady():
                self._on_ready(event, row)
            case p.RankExited():
                self._lose({row.rank: event.status})
            case _ if event.epoch != self.epoch:
                pass  # belongs to an epoch that is over
            case p.RankQuiesced():
                self._on_quiesced(event)
            case p.RankFenced():
                self._on_fenced(event)
            case p.RankRegrouped():
                self._on_regrouped(event)
            case p.RegroupFailed():
                if self._phase is Phase.REGROUPING:
                    self._regroup_failed((row.rank,), event.error)
            case p.RankFault():
                self._on_fault(event, row)
            case p.RankRespread():
                self._on_respread(event, row)
            case p.RankStored():
                self._on_stored(event)
            case p.ColumnChanged():
                self._on_column(event, row)
            case _:
                assert_never(event)

    def _on_frontend(self, event: p.FrontendReady | p.FrontendExited | p.FrontendSynced) -> None:
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
                self._stop_operation("the daemon is stopping")
                if self._phase in STEPPING and self._fault is not None:
                    self._on_lone_fault(self._fault)  # requests could not end in a group that stands still
                self._on_stop(event.timeout_s)
            case p.DrainComplete():
                if self._phase is Phase.STOPPING:
                    self._exit(EXIT_STOPPED, "drained")
            case p.ScaleOrder():
                self._on_scale_order(event)
            case p.RankOrder():
                self._on_rank_order(event)
            case p.AutomationSwitched():
                self._automatic = event.enabled
                self._record("automation_switched", enabled=event.enabled)
            case _:
                assert_never(event)

    def _on_tick(self) -> None:
        policy, now, due = self._policy, self._now, self._deadlines.pop_due
        if due(Wait.DRAIN, now):
            return self._exit(EXIT_STOPPED, "the time to drain is over")
        if ranks := due(Wait.RANK_START, now):
            self._lose(dict.fromkeys(ranks, f"not ready {policy.start_timeout_s:g} s after its start"), kill=True)
        # What else these two waited for follows from them by itself.
        due(Wait.RANK_RESTART, now), due(Wait.GPU, now), due(Wait.START, now)
        if ranks := due(Wait.QUIESCE, now):
            self._quiesce_overdue(ranks)
        if ranks := due(Wait.FENCE, now):
            self._lose(dict.fromkeys(ranks, f"not parked {policy.fence_timeout_s:g} s after it was fenced"), kill=True)
        if ranks := due(Wait.REGROUP, now):
            # One hung rank keeps all others waiting: silence alone does not say who is at fault. The next fence
            # does, since whoever is alive answers it.
            self._regroup_failed(ranks, f"not done within {policy.regroup_timeout_s:g} s")
        if due(Wait.GRACE, now) and self._fault is not None:
            # Before all that is about this epoch: it ends here.
            self._on_lone_fault(self._fault)
        if due(Wait.SYNC, now):
            if self._frontend is Frontend.READY:
                self._record("frontend_not_in_step", epoch=self.epoch)
            self._finish(None)
        if due(Wait.JOIN, now) and self._can_grow:
            self._enlist() if self._phase is Phase.UNAVAILABLE else self._quiesce()
        if due(Wait.SPREAD, now):
            self._spread_late()
        if due(Wait.SPREAD_START, now):
            self._spread_for_safety()
        if due(Wait.RECONSIDER, now):
            self._reconsider()
        if due(Wait.STORE, now):
            self._store_single_copies()
        if due(Wait.DEPARTURE, now):
            self._departure_overdue()
        if due(Wait.OPERATION, now):
            self._operation_overdue()
        if due(Wait.HOLD, now):
            self._hold = False
            self._record("hold_over", reason=self._trouble)
            self._publish()
        if due(Wait.FRONTEND_START, now):
            self._watch_frontend()  # until its exit is reported
            self._emit(p.KillFrontend(f"not ready within {policy.frontend_start_timeout_s:g} s"))
        if due(Wait.FRONTEND_RESTART, now):
            self._start_frontend()

    def _on_stalled(self, seconds: float) -> None:
        """Nobody else was late in that time, as far as can be told."""
        self._record("supervisor_stalled", seconds=round(seconds, 3), doing=self.describe())
        self._deadlines.postpone(seconds, *OF_OTHERS)

    def _on_fault(self, event: p.RankFault, row: Rank) -> None:
        fault = Fault(self._now, row.rank, event.error)
        match self._phase:
            case Phase.REGROUPING:
                self._regroup_failed((row.rank,), event.error)
            case Phase.STOPPING:
                self._exit(EXIT_STOPPED, f"a fault while draining: {fault.reason}")
            case phase if phase in STEPPING:
                if row.state is RankState.ACTIVE:
                    self._ranks.move(row.rank, RankState.SUSPECT, self._now, event.error)
                    self._record("rank_fault", rank=row.rank, incarnation=row.incarnation, error=event.error)
                if self._fault is None:  # a death may follow that explains it
                    self._fault = fault
                    self._deadlines.arm(Wait.GRACE, self._now + self._policy.fault_grace_s)

    def _on_lone_fault(self, fault: Fault) -> None:
        """No death explains it. The same members regroup, unless that has cured nothing for too long."""
        members = self._ranks.members
        may_exclude = self._holds_all(len(members) - 1)
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

    def _on_fenced(self, event: p.RankFenced) -> None:
        if self._phase is not Phase.FENCING:
            return
        if error := self._column_error(event.column):
            return self._lose({event.rank: error}, kill=True)
        self._columns[event.rank] = event.column
        self._deadlines.disarm(Wait.FENCE, event.rank)
        if not self._deadlines.of(Wait.FENCE):
            self._regroup()

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
