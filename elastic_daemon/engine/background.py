"""What a rank does with its experts while it serves: it moves them among ranks, and copies them to host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog
from torch.distributed import ProcessGroup

from elastic_daemon.engine.heartbeat import Steps
from elastic_daemon.engine.host_copies import HostCopies
from elastic_daemon.engine.plan import rank_plan
from elastic_daemon.engine.respread import Plan, Respreading, Sync, sync
from elastic_daemon.engine.storing import Storing
from elastic_daemon.engine.worker import ElasticWorker
from elastic_daemon.processes.messages import Message
from watchdog.heartbeat.layout import Phase

log = structlog.get_logger(__name__)


class Background:
    """Belongs to the main thread.

    `send`: to the supervisor; `wake`: has `stage` called soon, from any thread; `copies`: None without host copies.
    """

    def __init__(
        self,
        worker: ElasticWorker,
        copies: HostCopies | None,
        steps: Steps,
        send: Callable[..., None],
        wake: Callable[[], None],
    ) -> None:
        self._steps = steps
        self._rank = rank_plan(worker.vllm_config).rank
        self._epoch = 0
        self._send = send
        runner = worker.model_runner
        self._respreading = Respreading(self._rank, runner.eplb_state, send, worker.column)
        runner.eplb_state.on_plan = lambda table: self._respreading.balance(self._epoch, table)
        runner.eplb_state.on_change = lambda: send("column", epoch=self._epoch, column=worker.column().tolist())
        self._storing = (
            Storing(self._rank, runner.expert_slots, copies, worker.column, send, wake) if copies is not None else None
        )

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def void(self) -> None:
        """The epoch has ended."""
        self._respreading.void()
        if self._storing is not None:
            self._storing.void()

    def take(self, message: Message) -> bool:
        """Follow a `respread` or `store` of this epoch. Returns whether this rank has to step for it."""
        kind = message["type"]
        if message["epoch"] != self._epoch:
            log.info("instruction_dropped", rank=self._rank, kind=kind, epoch=message["epoch"])
        elif kind == "store" and self._storing is not None:
            self._storing.order(self._epoch, [(layer, expert) for layer, _, expert in message["experts"]])
        elif kind == "respread":
            return self._hold(message)
        return False

    def _hold(self, message: Message) -> bool:
        try:
            self._respreading.hold(Plan.from_message(message))
        except ValueError as error:
            log.error("respread_refused", rank=self._rank, serial=message["serial"], error=str(error))
            return False
        return True

    def stage(self) -> None:
        """Called between two steps, and when woken."""
        if self._storing is not None:
            self._storing.stage()

    def advance(self) -> None:
        """Called after each step: at most one layer moves. Raises PeerLost.

        It counts as a step in the heartbeat, the same for all: a rank that hangs before it can be told from its peers.
        """
        if self._respreading.is_moving:
            self._steps.begin(Phase.DECODE)
            self._respreading.advance()
            self._steps.end()

    def sync(self, group: ProcessGroup, unfinished: bool, pausing: bool, quiescing: bool = False) -> Sync:
        """Called at each sync of the engines; `running` if experts are moving, too. Raises PeerLost."""
        found = sync(group, unfinished, pausing, self._respreading.serial, quiescing)
        self._respreading.begin(found.agreed)
        return replace(found, running=found.running or self._respreading.is_moving)


def open_copies(directory: str | None, worker: ElasticWorker) -> HostCopies | None:
    """The host copies of the model that `worker` serves, in `directory`; None without one."""
    if directory is None:
        return None
    model = worker.vllm_config.model_config
    rank = rank_plan(worker.vllm_config).rank
    return HostCopies(Path(directory), f"{model.model} {model.revision} {model.dtype}", f"rank-{rank}")
