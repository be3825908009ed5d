"""Ranks are started, lost, started again on a GPU that can be used, and let into the group. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.service_control import EXIT_START, EXIT_STOPPED
from elastic_daemon.control.spread_control import SpreadControl
from elastic_daemon.membership import ALIVE, MEMBERS, Rank, RankState

NO_USABLE_GPU = "no usable GPU"


class CapacityControl(SpreadControl):
    def _fill(self) -> None:
        """Start every wanted rank that may be started now."""
        alive = {row.rank for row in self._ranks.where(*ALIVE)}
        for rank in sorted(self._wanted - alive):
            if self._is_startable(rank):
                self._start_rank(rank)
        if self._no_gpu and (at := self._gpus.next_usable(self._now)) is not None:
            self._deadlines.arm(Wait.GPU, at)
        else:
            self._deadlines.disarm(Wait.GPU)
        if self._phase is Phase.STARTING:
            self._open_group()

    def _is_startable(self, rank: int) -> bool:
        if rank in self._left_out or rank in self._deadlines.of(Wait.RANK_RESTART):
            return False
        return self._phase is Phase.STARTING or self._may_restore or rank in self._ordered

    @property
    def _may_restore(self) -> bool:
        return self._policy.restore and self._automatic and not self._ending

    def _is_alive(self, rank: int) -> bool:
        return any(row.rank == rank for row in self._ranks.where(*ALIVE))

    def _start_rank(self, rank: int) -> None:
        gpu = self._gpus.assign(rank, self._now)
        if gpu is None and self._gpus.is_known:
            if rank not in self._no_gpu:
                self._no_gpu.add(rank)
                self._ranks.enrol(rank, self._now, NO_USABLE_GPU)
                self._record("rank_waits_for_gpu", rank=rank)
            return
        self._no_gpu.discard(rank)
        row = self._ranks.start(rank, self._now)
        self._deadlines.arm(Wait.RANK_START, self._now + self._policy.start_timeout_s, rank)
        self._record("rank_starting", rank=rank, incarnation=row.incarnation, attempt=row.starts, gpu=gpu)
        members = tuple(sorted(self._wanted))
        self._emit(p.StartRank(rank, row.incarnation, members, self._policy.slots, gpu))

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
        if event.gpu is not None:
            self._gpus.locate(row.rank, event.gpu)
        self._record("rank_standby", rank=row.rank, incarnation=row.incarnation)

    def _open_group(self) -> None:
        """The first group: of all ranks, or of enough when the others cannot come or take too long."""
        standby = self._ranks.where(RankState.STANDBY)
        restarting = self._deadlines.of(Wait.RANK_RESTART)
        pending = [r for r in self._wanted if r in restarting or self._is_in(r, RankState.STARTING)]
        overdue = Wait.START not in self._deadlines
        if self._holds_all(len(standby)) and (overdue or not pending):
            self._deadlines.disarm(Wait.START)
            self._ranks.next_epoch()
            self._open_recovery("start")
            for row in standby:
                self._ranks.move(row.rank, RankState.JOINING, self._now)
            return self._regroup()
        # A GPU may yet come in place of one that is not there, not in place of ranks that fail.
        if not pending and (overdue or not self._no_gpu or any(map(self._gpus.is_barred, self._no_gpu))):
            missing = sorted(self._wanted - {row.rank for row in standby})
            self._exit(EXIT_START, "; ".join(f"rank {rank} {self._start_trouble(rank)}" for rank in missing))

    def _start_trouble(self, rank: int) -> str:
        gpu = self._gpus.of(rank)
        why = self._gpus.trouble(gpu) if gpu else "; ".join(("none is left", *self._gpus.bars))
        return self._left_out.get(rank) or f"has {NO_USABLE_GPU}: {why}"

    def _is_in(self, rank: int, state: RankState) -> bool:
        return any(row.rank == rank for row in self._ranks.where(state))

    @property
    def _can_grow(self) -> bool:
        """Whether ranks on standby could be let in now: nothing else goes on, and it helps."""
        standby = self._ranks.where(RankState.STANDBY)
        if self._phase is Phase.UNAVAILABLE:
            return self._holds_all(len(self._ranks.members) + len(standby))
        if not standby or self._phase is not Phase.SERVING or self._departure is not None:
            return False
        # Ranks that an operator added come together: one pause for all.
        return not any(self._is_coming(rank) for rank in self._ordered)

    def _is_coming(self, rank: int) -> bool:
        return rank in self._deadlines.of(Wait.RANK_RESTART) or self._is_in(rank, RankState.STARTING)

    def _enlist(self) -> None:
        """Let the ranks on standby in: the group regroups with them, in a new epoch."""
        standby = self._ranks.where(RankState.STANDBY)
        cause = f"rank {', '.join(str(row.rank) for row in standby)} joins"
        self._open_recovery(cause).join((row.identity for row in standby), cause)
        for row in standby:
            self._ranks.move(row.rank, RankState.JOINING, self._now)
        self._new_epoch()

    def _lose(
        self,
        reasons: Mapping[int, str],
        *,
        kill: bool = False,
        evidence_at: float | None = None,
        for_good: bool = False,
    ) -> None:
        """These ranks are dead, or (`kill`) given up, which is the same from now on: nobody waits for a corpse.

        `for_good`: they are not started again where they were, since the cause stays.
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
            self._let_come_back(row, had_served, for_good)
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

    def _let_come_back(self, row: Rank, had_served: Container[int], for_good: bool) -> None:
        """Plan the next start of a rank that was lost."""
        rank, gpu = row.rank, self._gpus.of(row.rank)
        if rank not in self._wanted:
            return self._gpus.forget(rank)
        if rank in self._left_out or not (self._phase is Phase.STARTING or self._may_restore or rank in self._ordered):
            return
        at = self._comebacks.after_loss(rank, self._now, had_served=rank in had_served)
        attempts = f"in {self._policy.max_start_attempts} attempts, the last: {row.reason}"
        if at is None and gpu is not None:  # it may be the GPU: elsewhere it gets another chance
            self._gpus.bar(gpu, f"rank {rank} did not start on it {attempts}")
            self._emit(p.StoreBarred(dict(self._gpus.barred)))
            self._record("gpu_barred", gpu=gpu, rank=rank, reason=row.reason)
            self._comebacks.forgive(rank)
        elif at is None or (for_good and gpu is None):
            self._leave_out(rank, row.reason or "" if for_good else f"did not start {attempts}")
        else:
            self._deadlines.arm(Wait.RANK_RESTART, at, rank)

    def _forgive_gpu(self, uuid: str) -> None:
        """An operator wants ranks to be tried on it again."""
        if self._gpus.release(uuid):
            self._emit(p.StoreBarred(dict(self._gpus.barred)))

    def _leave_out(self, rank: int, reason: str) -> None:
        self._left_out[rank] = reason
        self._record("rank_left_out", rank=rank, reason=reason)
