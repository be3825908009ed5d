"""Operators' orders are carried out. Pure.

An *operation* is an order that takes time: it changes who is wanted, waits for ranks to come or depart, and is undone
where that fails.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.departure import Departure, Operation, lowest_free, victims
from elastic_daemon.control.verdict_control import VerdictControl
from elastic_daemon.membership import IN_GROUP, Rank, RankState
from elastic_daemon.protocol import OperationKind, OperationState


class ScalingControl(VerdictControl):
    def _on_scale_order(self, order: p.ScaleOrder) -> None:
        operation = self._operation_of(order.operation, OperationKind.SCALE, order.timeout_s)
        operation.target, operation.retire = order.target, order.retire
        if not self._refuse_at_end(operation):
            self._take(operation)

    def _on_rank_order(self, order: p.RankOrder) -> None:
        operation = self._operation_of(order.operation, OperationKind(order.deed.value), order.timeout_s)
        operation.ranks = (order.rank,)
        if self._refuse_at_end(operation):
            return
        match order.deed:
            case p.RankDeed.DRAIN:
                self._take(operation)
            case p.RankDeed.EXCLUDE:
                self._exclude(operation, order.rank)
            case p.RankDeed.RELEASE:
                self._release(operation, order.rank)

    def _refuse_at_end(self, operation: Operation) -> bool:
        if self._ending:
            self._answer(operation, OperationState.INVALID, "the daemon is stopping")
        return self._ending

    def _operation_of(self, id_: str, kind: OperationKind, timeout_s: float) -> Operation:
        return Operation(id_, kind, self.target, self.target, self._now, timeout_s)

    def _answer(self, operation: Operation, state: OperationState, message: str) -> None:
        self._record("operation_ended", operation=operation.id, kind=operation.kind, state=state, message=message)
        self._emit(p.OperationChanged(operation.report(state, message, self._now)))

    def _take(self, operation: Operation) -> None:
        """Begin it, now or when the recovery under way is over."""
        if self._operation is not None:
            other = self._operation
            busy = f"operation {other.id} is running: {other.phase}"
            return self._emit(
                p.OperationChanged(operation.report(OperationState.BUSY, busy, self._now, busy_with=other.id))
            )
        self._operation = operation
        self._deadlines.arm(Wait.OPERATION, self._now + operation.timeout_s)
        self._record("operation_started", operation=operation.id, kind=operation.kind, target=operation.target)
        self._advance_operation()

    def _end(self, state: OperationState, message: str) -> None:
        assert self._operation is not None
        operation, self._operation = self._operation, None
        self._deadlines.disarm(Wait.OPERATION)
        if state is OperationState.DONE and operation.kind is OperationKind.SCALE:
            self._emit(p.StoreTarget(operation.target))
        self._answer(operation, state, message)

    def _stop_operation(self, why: str) -> None:
        if self._operation is not None:
            if self._operation.begun:
                self._wanted = set(self._operation.wanted_before)
            self._end(OperationState.ROLLED_BACK, why)

    def _exclude(self, operation: Operation, rank: int) -> None:
        row = next((row for row in self._ranks if row.rank == rank), None)
        if row is None or not self._is_alive(rank):
            return self._answer(operation, OperationState.INVALID, f"rank {rank} is not there")
        if row.state in IN_GROUP and not self._holds_all(len(self._ranks.members) - 1):
            return self._answer(operation, OperationState.INVALID, self._too_few(1))
        self._left_out[rank] = "excluded by an operator"
        self._answer(operation, OperationState.DONE, f"rank {rank} is excluded until it is released")
        self._lose({rank: "excluded by an operator"}, kill=True)

    def _release(self, operation: Operation, rank: int) -> None:
        if rank not in self._wanted:
            why = f"rank {rank} is not one of the {self.target} to serve: scale up to have it back"
            return self._answer(operation, OperationState.INVALID, why)
        if self._is_alive(rank):
            return self._answer(operation, OperationState.DONE, f"rank {rank} was not left out")
        self._invite(rank)
        self._fill()
        waits = rank in self._no_gpu
        told = f"rank {rank} waits for a usable GPU" if waits else f"rank {rank} is started again"
        self._answer(operation, OperationState.DONE, told)

    def _invite(self, rank: int) -> None:
        """Start it as soon as can be, whatever was before."""
        self._left_out.pop(rank, None)
        self._comebacks.forgive(rank)
        self._deadlines.disarm(Wait.RANK_RESTART, rank)
        if gpu := self._gpus.of(rank):
            self._forgive_gpu(gpu)
        self._ordered.add(rank)

    def _advance_operation(self) -> None:
        operation = self._operation
        if operation is None:
            return
        if not operation.begun:
            quiet = self._phase is Phase.SERVING and self._departure is None
            if quiet or (self._phase is Phase.UNAVAILABLE and operation.kind is OperationKind.SCALE):
                self._begin(operation)
        elif self._phase in (Phase.SERVING, Phase.UNAVAILABLE):
            self._review(operation)
        if self._operation is operation:
            self._show(operation)

    def _begin(self, operation: Operation) -> None:
        operation.begun, operation.wanted_before = True, frozenset(self._wanted)
        operation.previous = self.target
        if operation.kind is OperationKind.DRAIN:
            error = self._begin_drain(operation)
        else:
            error = self._begin_scale(operation)
        if error:
            self._end(OperationState.INVALID, error)
        else:
            self._review(operation)

    def _begin_drain(self, operation: Operation) -> str | None:
        rows = [row for row in self._group if row.rank in operation.ranks]
        if not rows:
            return f"rank {operation.ranks[0]} does not serve"
        if not self._holds_all(len(self._ranks.members) - 1):
            return self._too_few(1)
        self._start_departure(rows, "drained by an operator", RankState.EXCLUDED)
        for row in rows:
            self._left_out[row.rank] = "drained by an operator"
        return None

    def _begin_scale(self, operation: Operation) -> str | None:
        if error := self._scale_error(operation):
            return error
        change = operation.target - self.target
        leaving = set(operation.retire or ())
        # Beside those named, ranks that do not serve are the first that are not wanted any more.
        leaving |= set(victims(self._ranks, frozenset(self._wanted - leaving), -change - len(leaving)))
        wanted = (self._wanted - leaving) | set(lowest_free(frozenset(self._wanted), max(change, 0)))
        absent = {rank for rank in wanted if not self._is_alive(rank)}
        if self._gpus.is_known and (room := self._gpus.room_for(absent)) < len(absent):
            why = "".join(f"; {trouble}" for trouble in self._gpus.troubles)
            return f"{len(absent)} more ranks need a GPU, and {room} can have one{why}"
        operation.ranks = tuple(sorted(absent | leaving))
        self._wanted = wanted
        for rank in absent:
            self._invite(rank)
        self._fill()
        self._send_away(leaving)
        return None

    def _scale_error(self, operation: Operation) -> str | None:
        target, most = operation.target, self._policy.max_ranks
        if target > most:
            return f"at most {most} ranks can serve (--max-ranks), not {target}"
        if not self._holds_all(target):
            needed = self._policy.min_ranks
            return f"{target} ranks cannot hold {self._policy.experts} experts: the minimum is {needed}"
        return None if operation.retire is None else self._retire_error(operation.retire, target)

    def _retire_error(self, retire: tuple[int, ...], target: int) -> str | None:
        active = {row.rank for row in self._group}
        if unknown := sorted(set(retire) - active):
            return f"retire_ranks: {unknown} do not serve; {sorted(active)} do"
        if len(set(retire)) != len(retire):
            return "retire_ranks: a rank is named twice"
        if len(retire) != len(active) - target:
            return f"retire_ranks: {len(active)} ranks serve, so {len(active) - target} must leave for {target}"
        return None

    def _send_away(self, ranks: Iterable[int]) -> None:
        """These are not wanted any more: members depart in order, all others go at once."""
        leaving = set(ranks)
        for row in self._ranks:
            if row.rank not in leaving:
                continue
            self._deadlines.disarm(Wait.RANK_RESTART, row.rank)
            self._ordered.discard(row.rank)
            self._left_out.pop(row.rank, None)
            self._no_gpu.discard(row.rank)
            if row.state not in IN_GROUP and row.state is not RankState.RETIRED:
                if self._is_alive(row.rank):
                    self._deadlines.disarm(Wait.RANK_START, row.rank)
                    self._emit(p.KillRank(row.rank, row.incarnation, "not wanted any more", doubtful=False))
                self._columns.pop(row.rank, None)
                self._ranks.move(row.rank, RankState.RETIRED, self._now)
                self._gpus.forget(row.rank)
        if members := [row for row in self._group if row.rank in leaving]:
            self._start_departure(members, "scaled down by an operator", RankState.RETIRED)

    def _start_departure(self, rows: list[Rank], cause: str, after: RankState) -> None:
        assert self._operation is not None
        forced = self._operation.undoing is not None
        deadline = self._now + self._policy.drain_timeout_s if forced else None
        self._depart(rows, Departure(frozenset(row.identity for row in rows), cause, after, forced), deadline)

    def _review(self, operation: Operation) -> None:
        """How far is it?"""
        extra = {row.rank for row in self._group} - self._wanted
        if operation.undoing is not None:
            if not extra and self._departure is None:
                self._end(*operation.undoing)
            elif self._departure is None:  # a loss meanwhile: they cannot be spared, somebody else can
                self._want_no_more_than(operation.previous)
            return
        if self._departure is not None:
            return
        serving = {row.rank for row in self._group}
        if operation.kind is OperationKind.DRAIN:
            if not serving & set(operation.ranks):
                return self._end(OperationState.DONE, f"rank {operation.ranks[0]} has left until it is released")
            return self._undo(OperationState.ROLLED_BACK, self._too_few(1))
        if extra:
            return self._undo(OperationState.ROLLED_BACK, self._too_few(len(extra)))
        if serving >= self._wanted:
            return self._end(OperationState.DONE, f"serving with {len(serving)} ranks")
        for rank in operation.ranks:
            if rank in self._left_out:
                return self._undo(OperationState.ROLLED_BACK, f"rank {rank} {self._left_out[rank]}")
            if rank in self._no_gpu and not self._gpus.room_for({rank}):
                return self._undo(OperationState.ROLLED_BACK, f"rank {rank} {self._start_trouble(rank)}")

    def _undo(self, state: OperationState, why: str) -> None:
        """Back to what was wanted before. Who has joined meanwhile departs again."""
        operation = self._operation
        assert operation is not None
        operation.undoing = (state, f"{why}; {operation.previous} ranks are wanted as before")
        operation.phase = "rolling back"
        if self._departure is not None:
            self._stay()
        self._left_out = {r: why for r, why in self._left_out.items() if r not in operation.ranks or self._is_out(r)}
        self._wanted |= operation.wanted_before
        self._want_no_more_than(operation.previous)
        self._review(operation)  # nobody may have to leave

    def _want_no_more_than(self, count: int) -> None:
        """Who serves is worth more than who was meant to."""
        self._wanted |= {row.rank for row in self._group}
        leaving = victims(self._ranks, frozenset(self._wanted), len(self._wanted) - count)
        self._wanted -= set(leaving)
        self._send_away(leaving)

    def _is_out(self, rank: int) -> bool:
        return not self._is_alive(rank)

    def _operation_overdue(self) -> None:
        operation = self._operation
        assert operation is not None
        if operation.begun and self._phase not in (Phase.SERVING, Phase.UNAVAILABLE):
            # The group is changing, in bounded time: first see what comes of it.
            return self._deadlines.arm(Wait.OPERATION, self._now + self._policy.join_delay_s)
        why = f"not done within {operation.timeout_s:g} s, while {operation.phase}"
        if not operation.begun:
            return self._end(OperationState.TIMED_OUT, f"{why}; nothing was changed")
        if operation.undoing is None:
            self._undo(OperationState.TIMED_OUT, why)

    def _show(self, operation: Operation) -> None:
        if operation.undoing is None and operation.begun:
            if self._departure is not None:
                operation.phase = self._departure.step.value
            elif self._phase is not Phase.SERVING:
                operation.phase = self._phase.value
            else:
                operation.phase = "starting ranks"
        if operation.phase != operation.reported:
            operation.reported = operation.phase
            self._record("operation_phase", operation=operation.id, phase=operation.phase)
            self._emit(p.OperationChanged(operation.report()))
