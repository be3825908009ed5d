"""The front end's side of the engines: routes requests to ranks and survives any rank's death.

Speaks vLLM's ZMQ protocol to engine cores that others start, in place of vLLM's client, engine manager and coordinator.
Identities are incarnations, not ranks: what a dead process still has in a socket buffer is never taken for its
replacement's.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import itertools
import time
import weakref
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

import structlog
import zmq
import zmq.asyncio
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_fixed
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, _process_utility_output
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from elastic_daemon.engine.core import WAVES_PER_EPOCH
from elastic_daemon.engine.group_view import Applied, Membership
from elastic_daemon.engine.request_watch import RequestWatch
from elastic_daemon.engine.resume import disown_output, resuming_params
from elastic_daemon.requests import Entry, Handover, Ledger
from elastic_daemon.telemetry.trace_settings import ABORTED, GIVEN_UP, MOVED, RANK_LOST

log = structlog.get_logger(__name__)

NOBODY = 0xFFFF
"""An engine index that no incarnation has: START_DP_WAVE then excludes nobody."""

CONNECT_TIMEOUT_S = 5.0


class NotServed(GracefulHTTPError):
    """A request could not be served within the hold timeout, or was given up. vLLM's handlers make a 503 of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this request could not be served: {reason}", HTTPStatus.SERVICE_UNAVAILABLE)


class ElasticClient(AsyncMPClient):
    """An engine client whose set of engines changes while requests are in flight."""

    def __init__(self, config: VllmConfig, input_address: str, output_address: str, hold_timeout_s: float) -> None:
        # Not MPClient.__init__: it starts engines, waits for a fixed set of them and ends with the first that dies.
        self.vllm_config = config
        self._renderer = None
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources: dict[Any, Any] = {}
        context = zmq.Context(io_threads=2)
        self.ctx = zmq.asyncio.Context(context)
        self.resources = BackgroundResources(ctx=context)
        self._finalizer = weakref.finalize(self, self.resources)
        self.input_socket = make_zmq_socket(self.ctx, input_address, zmq.ROUTER, bind=True)
        self.input_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.resources.input_socket = self.input_socket
        self.resources.output_socket = make_zmq_socket(self.ctx, output_address, zmq.PULL)
        self.encoder, self.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self.client_count, self.client_index = 1, 0
        self.stats_update_address = None
        self.engines_running = False
        self.current_wave = 0
        self.engine_ranks_managed = list(range(config.parallel_config.elastic_ep_max_dp_size))
        self.core_engines: list[bytes] = []
        self.utility_results: dict[int, Any] = {}
        self._utilities_of: dict[int, set[int]] = {}
        self._call_ids = itertools.count(1)
        self._background: set[asyncio.Future[None]] = set()
        self.outputs_queue: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._engine_status: dict[Any, Any] = {}
        self.hold_timeout_s = hold_timeout_s
        self._membership = Membership(0, False, True, "starting", {}, {})
        self._serving = asyncio.Event()
        self._served_epoch = 0
        self._handover = Handover(0, (), ())
        self._waiting = 0
        self.ledger: Ledger[EngineCoreRequest] = Ledger()
        self.watch = RequestWatch()

    @property
    def in_flight(self) -> int:
        return len(self.ledger) + self._waiting

    def in_flight_by_rank(self) -> dict[int, int]:
        return {rank: self.ledger.load(incarnation) for incarnation, rank in self._membership.ranks.items()}

    async def apply(self, membership: Membership) -> Applied:
        """Follow a change of the group, or of who drains in it."""
        if membership.epoch < self._membership.epoch:
            return Applied()
        gone = self._membership.ranks.keys() - membership.ranks.keys()
        for incarnation in membership.ranks.keys() - self._membership.ranks.keys():
            self._apply_ready_response(base64.b64decode(membership.ready[incarnation]))
        for incarnation in gone:
            self._show_idle(self._membership.ranks[incarnation])
        self._membership = membership
        self.core_engines = [_identity(incarnation) for incarnation in membership.ranks]
        if self.core_engines:
            self.core_engine = self.core_engines[0]
        given_up = self._void(gone) if gone else ()
        if not membership.serving:
            self._serving.clear()
            return Applied(given_up=given_up)
        begins = membership.epoch != self._served_epoch
        if begins:
            self._served_epoch = membership.epoch
            self.current_wave = membership.epoch * WAVES_PER_EPOCH
            self.engines_running = True
            self.watch.group_changed(self.ledger)
        moved = self._withdraw()
        orphans = self.ledger.orphans()
        self.watch.group_changed(orphans)
        for request_id in orphans:
            self._readmit(request_id)
        self._serving.set()
        return Applied(self._take_handover() if begins else None, moved, given_up)

    def _show_idle(self, rank: int) -> None:
        """vLLM's gauges would say for ever what the rank last did."""
        self.outputs_queue.put_nowait(EngineCoreOutputs(engine_index=rank, scheduler_stats=SchedulerStats()))

    def _void(self, gone: set[int]) -> tuple[str, ...]:
        """Returns the requests that are given up."""
        handover = self.ledger.void(gone)
        self.watch.ended(handover.given_up, GIVEN_UP)
        self.watch.attempts_over(handover.moved, RANK_LOST)
        for incarnation in gone:
            for call_id in self._utilities_of.pop(incarnation, set()):
                if (future := self.utility_results.pop(call_id, None)) is not None and not future.done():
                    future.set_exception(NotServed("the rank that was asked has died"))
        self._handover = Handover(
            0, self._handover.replayed + handover.replayed, self._handover.restarted + handover.restarted
        )
        return handover.given_up

    def _take_handover(self) -> Handover:
        handover, self._handover = self._handover, Handover(0, (), ())
        return Handover(len(self.ledger) - len(handover.moved), handover.replayed, handover.restarted)

    def _withdraw(self) -> dict[int, int] | None:
        """Take the requests of draining ranks away, which stop computing them. Returns how many, by rank."""
        membership = self._membership
        if not membership.draining or membership.draining.issuperset(membership.ranks):
            return None
        moved = {}
        for incarnation in membership.draining:
            if attempts := self.ledger.withdraw(incarnation):
                self.watch.attempts_over(self.ledger.orphans(), MOVED)
                self._in_background(self._send(EngineCoreRequestType.ABORT, list(attempts), incarnation))
            moved[membership.ranks[incarnation]] = len(attempts)
        return moved

    def _readmit(self, request_id: str) -> None:
        owner = self.ledger.least_loaded(self._membership.takers)
        entry = self.ledger.adopt(request_id, owner)
        self._trace_attempt(request_id, entry.request, owner, len(entry.output))
        log.info("request_readmitted", request=request_id, rank=self._membership.ranks[owner], tokens=len(entry.output))
        # The next change of membership must not wait for an engine that is dying just now.
        self._in_background(self._add(_attempt(entry), owner))

    async def until_serving(self) -> None:
        """Hold a new request while the group regroups or lacks capacity, for at most the hold timeout.

        Raises:
            NotServed: the time is over, or the supervisor has given up holding.
        """
        self._waiting += 1
        try:
            async with asyncio.timeout(self.hold_timeout_s):
                while not self._serving.is_set():  # again after each wait: it may have been cleared since
                    if not self._membership.hold:
                        raise NotServed(self._membership.reason)
                    await self._serving.wait()
        except TimeoutError as error:
            raise NotServed(self._membership.reason) from error
        finally:
            self._waiting -= 1

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        request.client_index = self.client_index
        disown_output(request.sampling_params)
        self.watch.queue.join(request.request_id)
        try:
            await self.until_serving()
        except BaseException:
            self.watch.queue.leave([request.request_id])
            raise
        owner = self.ledger.least_loaded(self._membership.takers)
        self.ledger.admit(request.request_id, request, owner)
        self._trace_attempt(request.request_id, request, owner, 0)
        await self._add(request, owner)

    def _trace_attempt(self, request_id: str, request: EngineCoreRequest, owner: int, tokens: int) -> None:
        self.watch.attempt(request_id, request, self._membership.ranks[owner], self._membership.epoch, tokens)

    async def _add(self, request: EngineCoreRequest, owner: int) -> None:
        """Send one attempt, unless its request is aborted or moves on before its turn comes."""
        attempt_id = request.request_id
        request.current_wave = self.current_wave
        await self._send(EngineCoreRequestType.ADD, request, owner, lambda: self.ledger.is_under_way(attempt_id))
        if not self.engines_running:
            await self._start_wave(NOBODY)

    async def _start_wave(self, awake: int) -> None:
        """Wake sleeping engines: all take part in each step of the one that has work."""
        self.engines_running = True
        for incarnation in tuple(self._membership.ranks):
            if incarnation != awake:
                await self._send(EngineCoreRequestType.START_DP_WAVE, (self.current_wave, awake), incarnation)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """A send that may have to wait for its receiver must not hold up everybody's outputs."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _send(
        self, kind: EngineCoreRequestType, message: Any, incarnation: int, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Send to one engine. One that cannot be reached and is no member any more is none of our business.

        `wanted` is asked before each try: an ADD that had to wait must not follow its own ABORT.
        """
        parts = (_identity(incarnation), kind.value, *self.encoder.encode(message))
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(
                    lambda error: self._unreachable(error) and incarnation in self._membership.ranks
                ),
                stop=stop_after_delay(CONNECT_TIMEOUT_S),
                wait=wait_fixed(0.005),
                reraise=True,
            ):
                with attempt:
                    if not wanted():
                        return
                    await self.input_socket.send_multipart(parts, copy=False)
        except zmq.ZMQError as error:
            if not self._unreachable(error):
                raise
            # Its requests stay in the ledger: the supervisor sees a process without connection die or hang.
            log.warning("engine_unreachable", incarnation=incarnation, message=kind.name)

    @staticmethod
    def _unreachable(error: BaseException) -> bool:
        return isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for owner, owned in self._forget(request_ids).items():
            await self._send(EngineCoreRequestType.ABORT, owned, owner)

    def give_up(self, request_ids: list[str]) -> None:
        """As an abort, without waiting for engines: the group may just be changing."""
        for owner, owned in self._forget(request_ids).items():
            self._in_background(self._send(EngineCoreRequestType.ABORT, owned, owner))

    def _forget(self, request_ids: list[str]) -> dict[int, list[str]]:
        """Strike them from the ledger. Returns the attempts under way by the incarnation that makes them."""
        self.watch.ended(request_ids, ABORTED)
        by_owner: dict[int, list[str]] = {}
        for request_id in request_ids:
            entry = self.ledger.forget(request_id)
            if entry is not None and entry.owner is not None:
                by_owner.setdefault(entry.owner, []).append(entry.attempt_id)
        return by_owner

    def _ensure_output_queue_task(self) -> None:
        if self.resources.output_queue_task is None:
            self.resources.output_queue_task = asyncio.create_task(self._receive(), name="engine-outputs")

    async def _receive(self) -> None:
        output_socket = self.resources.output_socket
        assert output_socket is not None
        try:
            while True:
                frames = await output_socket.recv_multipart(copy=False)
                await self._take(self.decoder.decode(frames))
        except Exception as error:  # whatever it is, AsyncLLM's handler of outputs must hear of it
            self.outputs_queue.put_nowait(error)

    async def _take(self, outputs: EngineCoreOutputs) -> None:
        incarnation = outputs.engine_index
        rank = self._membership.ranks.get(incarnation)
        if rank is None:
            return  # a message of a dead or fenced process, late
        if outputs.utility_output is not None:
            call_id = outputs.utility_output.call_id
            self._utilities_of.get(incarnation, set()).discard(call_id)
            if call_id in self.utility_results:
                _process_utility_output(outputs.utility_output, self.utility_results)
            return
        if outputs.start_wave is not None and outputs.start_wave >= self.current_wave:
            self.current_wave = outputs.start_wave
            self._in_background(self._start_wave(incarnation))
        if outputs.wave_complete is not None and outputs.wave_complete >= self.current_wave:
            self.current_wave = outputs.wave_complete + 1
            self.engines_running = False
        outputs.engine_index = rank
        self._drop_unknown(outputs.outputs, incarnation)
        now = time.monotonic()
        outputs.outputs = [output for output in outputs.outputs if self._deliver(output, incarnation, now)]
        if outputs.outputs or outputs.scheduler_stats:
            self.outputs_queue.put_nowait(outputs)

    def _drop_unknown(self, outputs: list[EngineCoreOutput], incarnation: int) -> None:
        """Nobody waits for these: a front end that died has left them. A rank computes them to their end otherwise."""
        unknown = [each.request_id for each in outputs if not each.finished]
        unknown = [attempt_id for attempt_id in unknown if not self.ledger.is_under_way(attempt_id)]
        if unknown:
            self._in_background(self._send(EngineCoreRequestType.ABORT, unknown, incarnation))

    def _deliver(self, output: EngineCoreOutput, incarnation: int, now: float) -> bool:
        """Whether it is for our clients. They know the request, not the attempt."""
        request_id = self.ledger.deliver(output.request_id, incarnation, output.new_token_ids, output.finished)
        if request_id is None:
            return False
        self.watch.delivered(request_id, output, now)
        output.request_id = request_id
        return True

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Ask all engines; the first answer counts, as in vLLM's load-balancing client."""
        await self.until_serving()
        return (await self.call_utility_all_async(method, *args))[0]

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        incarnation = int.from_bytes(engine, "little")
        call_id = next(self._call_ids)
        future = self.utility_results[call_id] = asyncio.get_running_loop().create_future()
        self._utilities_of.setdefault(incarnation, set()).add(call_id)
        await self._send(EngineCoreRequestType.UTILITY, (self.client_index, call_id, method, args), incarnation)
        return await future

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)


def _identity(incarnation: int) -> bytes:
    return incarnation.to_bytes(2, "little")


def _attempt(entry: Entry[EngineCoreRequest]) -> EngineCoreRequest:
    """The request as it goes to the owner of its current attempt, with the tokens it has as output."""
    request = copy.copy(entry.request)
    request.request_id = entry.attempt_id
    if request.sampling_params is not None and entry.output:
        request.sampling_params = resuming_params(request.sampling_params, entry.output)
    return request
