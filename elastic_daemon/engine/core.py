"""The engine core of a rank: steps while its epoch lasts, parks when fenced, goes on in the next epoch.

Three threads matter. The main thread steps, or is parked and takes instructions. The control thread reads the
supervisor's messages and can interrupt the main thread wherever it is, also inside a collective. vLLM's input thread
keeps receiving requests meanwhile; they wait in its queue.
"""

from __future__ import annotations

import base64
import contextlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import structlog
from torch.distributed import Store
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logging_utils.dump_input import dump_engine_exception
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.request import Request

from elastic_daemon.engine.background import Background, open_copies
from elastic_daemon.engine.devices import uuid_of
from elastic_daemon.engine.experts import SlotContent
from elastic_daemon.engine.faults import break_links
from elastic_daemon.engine.gloo import AbortableProcessGroup, peer_fault
from elastic_daemon.engine.heartbeat import BeatingQueue, Page, Steps, get_beating
from elastic_daemon.engine.plan import LocalExecutor, rank_plan
from elastic_daemon.engine.resume import restore_output
from elastic_daemon.engine.scheduler import ElasticScheduler
from elastic_daemon.engine.stream_counters import StreamCounters
from elastic_daemon.engine.tiers import Loaded, load_slots
from elastic_daemon.engine.worker import executor_worker
from elastic_daemon.errors import Fenced, PeerLost
from elastic_daemon.placement import Placement
from elastic_daemon.processes.fence_word import FenceWord
from elastic_daemon.processes.messages import ControlClient, Message
from elastic_daemon.telemetry.logs import configure_logging
from watchdog.heartbeat.layout import Phase

log = structlog.get_logger(__name__)

WAVES_PER_EPOCH = 1_000_000
"""Waves of an epoch start here times its number, so that a late START_DP_WAVE of an old epoch starts nothing."""


class ElasticEngineCore(DPEngineCoreProc):
    """A data-parallel engine core without coordinator, whose group changes with every epoch."""

    scheduler: ElasticScheduler
    engines_running: bool

    def __init__(
        self,
        config: VllmConfig,
        incarnation: int,
        addresses: EngineZmqAddresses,
        control: ControlClient,
        fence: FenceWord,
        store: Store,
        page: Page,
        steps: Steps,
        counters: StreamCounters | None,
        host_copies_dir: str | None,
    ) -> None:
        self._addresses = addresses
        self._control = control
        self._fence = fence
        self._store = store
        self._instructions: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._page = page
        self._steps = steps
        self._told_fence = 0
        self._quiescing = False
        self.epoch = 0
        self.plan = rank_plan(config)
        # What DPEngineCoreProc.__init__ sets up; it takes the rank for the identity, and ours is the incarnation: a
        # message of a dead process can then never be taken for one of its replacement.
        self.prefill_schedule_interval = config.scheduler_config.prefill_schedule_interval
        self.dp_sync_interval = config.parallel_config.dp_sync_interval
        self.step_counter = 0
        self.current_wave = 0
        self.pending_pause = False
        self.ignore_start_dp_wave = False
        self.eep_scaling_state = None
        EngineCoreProc.__init__(self, config, True, "", LocalExecutor, log_stats=True, engine_index=incarnation)
        self.enable_fault_tolerance = True
        self.ft_sentinel = Parking(self)
        self.worker = executor_worker(self.model_executor)
        self.worker.counters = counters
        self.model_executor.before_step = steps.launch
        self._copies = open_copies(host_copies_dir, self.worker)
        self._background = Background(self.worker, self._copies, steps, control.send, self._wake)

    @contextlib.contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Iterator[EngineZmqAddresses]:
        yield self._addresses

    def _init_data_parallel(self, vllm_config: VllmConfig) -> None:
        self.dp_rank, self.dp_size = self.plan.position, len(self.plan.members)
        self.dp_group: AbortableProcessGroup | None = None
        # Here, between the making of vLLM's queue and the start of the thread that fills it.
        self.input_queue: queue.Queue[tuple[EngineCoreRequestType, Any]] = BeatingQueue(self._page.beat)

    def _initialize_kv_caches(self, vllm_config: VllmConfig) -> Any:
        """Profiles, compiles and warms up: long work, and announced as such."""
        self._page.set_phase(Phase.COMPILING)
        cache = super()._initialize_kv_caches(vllm_config)
        self._page.set_phase(Phase.LOADING)
        return cache

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        admitted, wave = super().preprocess_add_request(request)
        restore_output(admitted)
        return admitted, wave

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        super().add_request(request, request_wave)
        if not self.engines_running:
            # The others sleep. The front end wakes them: without a coordinator nobody else knows them all.
            self.engines_running = True
            self.output_queue.put_nowait((0, EngineCoreOutputs(start_wave=self.current_wave)))

    def _process_aborts_queue(self) -> None:
        """Called when the output of a step is there, before it counts: what a fenced step computed must not."""
        self._raise_if_fenced()
        self._steps.land()
        super()._process_aborts_queue()

    def execute_dummy_batch(self) -> None:
        """A step without requests, to keep step with the others. It counts as done when its collectives are."""
        self._steps.begin(Phase.DECODE)
        super().execute_dummy_batch()
        self.worker.groups.ep.device_group.synchronize()
        self._steps.end()

    def _process_input_queue(self) -> None:
        self._raise_if_fenced()
        if not self.has_work():
            self._page.set_phase(Phase.IDLE)
        super()._process_input_queue()
        self._raise_if_fenced()

    def _handle_client_request(self, request_type: EngineCoreRequestType, request: Any) -> None:
        super()._handle_client_request(request_type, request)
        if request_type == EngineCoreRequestType.WAKEUP:
            self._raise_if_fenced()
            self._follow_while_stepping()
            self._background.stage()

    def _has_global_unfinished_reqs(self, local_unfinished: bool) -> bool:
        """Called on all ranks after each step, in lockstep. As vLLM's, with what the background has to agree on."""
        self._background.advance()
        self.step_counter += 1
        if self.step_counter != 1 and self.step_counter % self.dp_sync_interval != 0:
            return True
        found = self._background.sync(self.dp_group, local_unfinished, self.pending_pause, self._quiescing)
        if found.paused:
            self.ignore_start_dp_wave = True
            self.pending_pause = False
        if found.quiet:
            self._stand_still()
        return found.running

    def _stand_still(self) -> None:
        """End the steps that are under way, begin none, and wait for the fence. Raises Fenced, or PeerLost."""
        while self.batch_queue:
            future, scheduled, executed = self.batch_queue.pop()
            with self.log_error_detail(scheduled):
                output = future.result() or executed.result()
            self._process_aborts_queue()
            for item in self.scheduler.update_from_output(scheduled, output).items():
                self.output_queue.put_nowait(item)
        self._page.set_phase(Phase.PARKED)
        self._control.send("quiesced", epoch=self.epoch)
        self.wait_for_fence()
        self._raise_if_fenced()

    def wait_for_fence(self) -> None:
        """Nothing more happens in this epoch, and its connections stay until it is void: who leaves a group before may
        have NCCL hand rubbish to its peers, which would count it."""
        while not self.is_fenced:
            message = get_beating(self._instructions, self._page.beat)
            if message["type"] == "call":
                self._answer_call(message, Phase.PARKED)
            elif message["type"] == "fence":
                self._instructions.put(message)  # `park` answers it

    @contextlib.contextmanager
    def log_error_detail(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        """vLLM dumps its whole state with any error of a step; the loss of a peer is not one of ours."""
        try:
            yield
        except Exception as error:
            if peer_fault(error) is None:
                dump_engine_exception(self.vllm_config, scheduler_output, self.scheduler.make_stats())
            raise

    @property
    def is_fenced(self) -> bool:
        """Whether steps of this epoch are void. The message that says so may still be under way."""
        return self._fence.epoch > self.epoch

    def _raise_if_fenced(self) -> None:
        if self.is_fenced:
            raise Fenced(self._fence.epoch)

    # In the control thread:

    def listen(self) -> None:
        """Body of the control thread. The process ends with the connection: without a supervisor nobody fences it."""
        for message in self._control.messages():
            if message["type"] == "log_level":
                configure_logging(message["level"])
                continue
            if message["type"] == "fence":
                # Before the message itself: its answer allows the next group, which this must not break.
                self._break_free(int(message["epoch"]))
            self._instructions.put(message)
            self._wake()
        log.warning("supervisor_gone", rank=self.plan.rank)
        os._exit(1)

    def _wake(self) -> None:
        """Have the main thread look at its instructions, from any thread."""
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def _break_free(self, epoch: int) -> None:
        if epoch <= self._told_fence:
            return
        self._told_fence = epoch
        broken = self.worker.groups.abort()
        log.info("fenced", rank=self.plan.rank, epoch=epoch, connections_broken=broken)

    # In the main thread:

    def serve(self) -> None:
        """Report what this rank holds, wait for the first epoch, then step until told otherwise."""
        threading.Thread(target=self.listen, name="control", daemon=True).start()
        break_links(self.plan.rank, self.worker.groups.abort, lambda: self.step_counter)
        ready = base64.b64encode(msgspec.msgpack.encode(self._make_ready_response())).decode()
        column = self.worker.column()
        gpu = uuid_of(self.worker.model_runner.device)
        self._control.send("ready", layers=len(column), column=column.tolist(), response=ready, gpu=gpu)
        self.park()
        self.run_busy_loop()

    def leave(self, error: BaseException) -> None:
        """End the current epoch here: nothing of a step in flight counts."""
        self._page.set_phase(Phase.PARKED)
        traceback.clear_frames(error.__traceback__)
        self._background.void()
        self.worker.leave_group()
        if self.batch_queue is not None:
            self.batch_queue.clear()
        kept = self.scheduler.void_steps()
        self.dp_group, self.step_counter = None, 0
        because = str(peer_fault(error) or error).splitlines()[0][:200]
        log.info("parked", rank=self.plan.rank, epoch=self.epoch, kept=kept, because=because)

    def park(self) -> None:
        """Follow the supervisor's instructions until it resumes the epoch that this rank has joined."""
        joined = 0
        self._page.set_phase(Phase.PARKED)
        while True:
            message = get_beating(self._instructions, self._page.beat)
            kind, epoch = message["type"], int(message.get("epoch", 0))
            if kind == "call":
                self._answer_call(message, Phase.IDLE if joined else Phase.PARKED)
            elif epoch < self._fence.epoch:
                log.info("instruction_dropped", rank=self.plan.rank, kind=kind, epoch=epoch)
            elif kind == "fence":
                joined = 0
                self._page.set_phase(Phase.PARKED)
                self.worker.groups.release()
                self._control.send("fenced", epoch=epoch, column=self.worker.column().tolist())
            elif kind == "regroup":
                joined = epoch if self._regroup(message, epoch) else 0
            elif kind == "resume" and epoch == joined:
                self._start_epoch(epoch)
                return

    def _regroup(self, message: Message, epoch: int) -> bool:
        try:
            started = time.monotonic()
            placement = Placement.from_json(message["placement"])
            loaded = self._load_slots(message["loads"])
            repaired = time.monotonic()
            self._page.set_phase(Phase.REGROUPING)
            position, members = placement.ranks.index(self.plan.rank), len(placement.ranks)
            connections = self.worker.connect(
                self._store, f"epoch/{epoch}", position, members, lambda: self._fence.epoch > epoch, self._page
            )
            self.worker.join_group(connections, placement)
            self.dp_group = connections.host
            self.dp_rank, self.dp_size = position, members
        except PeerLost as error:
            self._page.set_phase(Phase.PARKED)
            self.worker.groups.release()
            self._control.send("regroup_failed", epoch=epoch, error=str(error))
            return False
        self._steps.begin_epoch(epoch)  # from here on it answers for its part in this group, also before it steps
        seconds = {"repair": repaired - started, "group": time.monotonic() - repaired}
        tiers = {source: (tier.bytes, tier.seconds) for source, tier in loaded.tiers.items()}
        self._control.send("regrouped", epoch=epoch, seconds=seconds, loaded=tiers, unusable=loaded.unusable)
        return True

    def _load_slots(self, loads: list[Message]) -> Loaded:
        if not loads:
            return Loaded({}, [])
        self._page.set_phase(Phase.LOADING)
        with set_current_vllm_config(self.vllm_config):
            loaded = load_slots(self.plan.rank, self.worker.model_runner.expert_slots, self._copies, loads)
        self.worker.loaded(SlotContent(load["layer"], load["slot"], load["expert"]) for load in loads)
        return loaded

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self._quiescing = epoch, False
        self._background.begin_epoch(epoch)
        self.current_wave = epoch * WAVES_PER_EPOCH
        self.step_counter = 0
        self.pending_pause = self.ignore_start_dp_wave = False
        self.engines_running = True

    def _answer_call(self, message: Message, afterwards: Phase) -> None:
        """Run one of `_CALLS` here, in the main thread, and send its result or error back.

        It may take long and keep peers waiting, as compiling does. `afterwards`: the phase that follows.
        """
        self._page.set_phase(Phase.COMPILING)
        try:
            result, error = _CALLS[message["name"]](self), None
        except Exception as caught:
            log.exception("call_failed", rank=self.plan.rank, name=message["name"])
            result, error = None, f"{type(caught).__name__}: {caught}"
        self._page.set_phase(afterwards)
        self._control.send("reply", id=message["id"], result=result, error=error)

    def wrong_slots(self) -> list[list[int]]:
        """(layer, slot, expert) of slots whose weights are not those of the expert they stand for."""
        with set_current_vllm_config(self.vllm_config):
            wrong = self.worker.model_runner.expert_slots.wrong_slots(self.worker.column())
        return [[content.layer, content.slot, content.expert] for content in wrong]

    def _follow_while_stepping(self) -> None:
        """Serve what does not end the epoch; instructions of a recovery stay queued for `park`."""
        pending = [self._instructions.get() for _ in range(self._instructions.qsize())]
        for message in pending:
            if message["type"] == "call":
                self._answer_call(message, Phase.DECODE if self.has_work() else Phase.IDLE)
            elif message["type"] == "quiesce":
                self._quiescing = self.engines_running = message["epoch"] == self.epoch
            elif message["type"] not in ("respread", "store"):
                self._instructions.put(message)
            elif self._background.take(message):
                self.engines_running = True  # the others do the same: each gets the message


_CALLS: dict[str, Callable[[ElasticEngineCore], Any]] = {
    "wrong_slots": ElasticEngineCore.wrong_slots,
    "column": lambda core: core.worker.column().tolist(),
}


class Parking:
    """Takes the place of vLLM's fault sentinel: what happens when the busy loop of a rank is interrupted."""

    engine_recovery_timeout_sec = 0

    def __init__(self, core: ElasticEngineCore) -> None:
        self._core = core
        self.resumed = threading.Event()
        self.resumed.set()

    def on_fault(self, error: Exception) -> None:
        """Park after a fence or the loss of a peer. Any other error is this rank's own and ends it."""
        core = self._core
        if (lost := peer_fault(error)) is not None:
            core._page.set_phase(Phase.PARKED)
            core._control.send("fault", epoch=core.epoch, error=str(lost).splitlines()[0][:500])
            core.wait_for_fence()
        elif not core.is_fenced:  # what a step trips over once its collectives were cut is no defect of this rank
            raise error
        core.leave(error)
        core.park()
