"""Experts move while the group serves: all ranks agree on a plan, then move one layer after each step, in lockstep.

A plan reaches the ranks at different moments, and a layer moves in a collective: all have to begin at the same step. So
each says in the sync of vLLM's data-parallel engines which plan it holds, and learns in the same collective whether
all hold the same. From then on each step of the group, also one without requests, is followed by one layer. Weights
and table of a layer change together: a fence may come after any layer, and what ranks say they hold is true.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
import torch
from torch.distributed import ProcessGroup, ReduceOp

from elastic_daemon.placement import IntArray, Placement
from elastic_daemon.processes.messages import Message

log = structlog.get_logger(__name__)

NO_PLAN = 0
"""Serials of plans start at 1."""


@dataclass(frozen=True)
class Sync:
    """What the ranks of a group have told each other after a step.

    `running`: some rank has reason to go on. `paused`: all want to pause. `agreed`: the plan that all hold, or NO_PLAN.
    `quiet`: all were told to quiesce, and know it of each other: this step was the last one.
    """

    running: bool
    paused: bool
    agreed: int
    quiet: bool = False


def sync(group: ProcessGroup, unfinished: bool, pausing: bool, serial: int, quiescing: bool = False) -> Sync:
    """vLLM's `ParallelConfig.sync_dp_state` with two questions more, in as many collectives: one.

    `serial`: of the plan that this rank holds and has not begun, or NO_PLAN. Who holds one that others have not read
    yet keeps all running: they read it between two steps. So does who was told to quiesce.
    """
    said = (int(unfinished), int(pausing), serial, int(quiescing))
    extremes = torch.tensor([*said, *(-value for value in said)], dtype=torch.int64)
    torch.distributed.all_reduce(extremes, op=ReduceOp.MAX, group=group)
    any_unfinished, any_pausing, highest, any_quiescing, _, least_pausing, lowest, least_quiescing = extremes.tolist()
    paused = least_pausing == -1
    undecided = any_pausing == 1 and not paused
    agreed = highest if highest == -lowest else NO_PLAN
    running = any_unfinished == 1 or undecided or highest > NO_PLAN or any_quiescing == 1
    return Sync(running, paused, agreed, least_quiescing == -1)


class Mover(Protocol):
    """What is asked of `ElasticEplbState`."""

    postponed: bool

    def layers_unlike(self, table: IntArray) -> tuple[int, ...]: ...
    def move(self, layer: int, row: IntArray) -> int: ...
    def forget_load(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """`serial` is NO_PLAN for one that the ranks have computed themselves."""

    epoch: int
    serial: int
    table: IntArray
    """[layers, N * S]"""

    @classmethod
    def from_message(cls, message: Message) -> Plan:
        placement = Placement.from_json(message["placement"])
        return cls(message["epoch"], message["serial"], placement.physical_to_logical())


@dataclass
class _Progress:
    plan: Plan
    layers: deque[int]
    moved: int = 0
    bytes: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0


class Respreading:
    """One rank's part. `send`: to the supervisor; `column`: what this rank holds, [layers, S]."""

    def __init__(self, rank: int, mover: Mover, send: Callable[..., None], column: Callable[[], IntArray]) -> None:
        self._rank = rank
        self._mover = mover
        self._send = send
        self._column = column
        self._held: Plan | None = None
        self._progress: _Progress | None = None

    @property
    def serial(self) -> int:
        """Of the plan that waits for the others to hold it."""
        return self._held.serial if self._held is not None else NO_PLAN

    @property
    def is_moving(self) -> bool:
        """The same on all ranks between two steps."""
        return self._progress is not None

    def hold(self, plan: Plan) -> None:
        """Begin `plan` as soon as all ranks hold it. It replaces one that has not begun, and follows one that has.

        Raises ValueError when its table is not one of this group.
        """
        self._mover.layers_unlike(plan.table)
        self._held = plan

    def void(self) -> None:
        """The group has ended. What has been moved stays where it is."""
        if self._held is not None or self._progress is not None:
            moving = self._progress
            begun, left = (moving.plan.serial, len(moving.layers)) if moving is not None else (NO_PLAN, 0)
            log.info("respread_void", rank=self._rank, begun=begun, layers_left=left, waiting=self.serial)
        self._held = self._progress = None
        self._mover.postponed = False

    def begin(self, serial: int) -> None:
        """All ranks hold plan `serial`. Nothing yet while they are on another, nor for NO_PLAN."""
        if serial == NO_PLAN or self.is_moving:
            return
        plan, self._held = self._held, None
        assert plan is not None and plan.serial == serial
        self._start(plan)

    def balance(self, epoch: int, table: IntArray) -> None:
        """All ranks have come to `table` at this step, and none is moving: they begin without asking."""
        self._start(Plan(epoch, NO_PLAN, table))

    def _start(self, plan: Plan) -> None:
        self._progress = _Progress(plan, deque(self._mover.layers_unlike(plan.table)))
        self._mover.postponed = True

    def advance(self) -> None:
        """Called on all ranks after each step: moves the next layer, or does nothing. Raises PeerLost."""
        progress = self._progress
        if progress is None:
            return
        if progress.layers:
            self._move(progress, progress.layers[0])
            progress.layers.popleft()
        if not progress.layers:
            self._progress = None
            self._mover.postponed = False
            if progress.moved:
                self._mover.forget_load()
            self._report(progress)

    def _move(self, progress: _Progress, layer: int) -> None:
        started = time.monotonic()
        progress.bytes += self._mover.move(layer, progress.plan.table[layer])
        taken = time.monotonic() - started
        progress.moved += 1
        progress.seconds += taken
        progress.longest_s = max(progress.longest_s, taken)

    def _report(self, progress: _Progress) -> None:
        plan, seconds = progress.plan, progress.seconds
        log.info(
            "experts_rearranged" if plan.serial == NO_PLAN else "experts_respread",
            rank=self._rank,
            epoch=plan.epoch,
            serial=plan.serial,
            layers=progress.moved,
            bytes=progress.bytes,
            seconds=round(seconds, 4),
            longest_s=round(progress.longest_s, 4),
            gb_per_s=gb_per_s(progress.bytes, seconds),
        )
        column = self._column().tolist()
        if plan.serial == NO_PLAN:
            self._send("column", epoch=plan.epoch, column=column)
            return
        done: dict[str, Any] = {"epoch": plan.epoch, "serial": plan.serial, "seconds": seconds}
        self._send("respread_done", **done, column=column, bytes=progress.bytes)


def gb_per_s(size: int, seconds: float) -> float:
    """For the log."""
    return round(size / seconds / 1e9, 3) if seconds > 0 else 0.0
