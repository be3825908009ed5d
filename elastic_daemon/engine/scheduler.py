"""vLLM's schedulers, able to take back steps that never finished."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import structlog
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from elastic_daemon.engine.resume import remember_output, restore_with_grammar

log = structlog.get_logger(__name__)


class ElasticScheduler(Scheduler):
    """One step at a time: at most one is in flight, so at most one is void."""

    def void_steps(self) -> int:
        """Return all requests to their last completed step and queue them for recomputation.

        The prefix cache keeps what was computed. Blocks that void steps registered when they were scheduled hold
        nothing and leave the cache, or a later request would read garbage. Returns the number of requests kept.
        """
        now = time.monotonic()
        self.kv_cache_manager.evict_blocks(self._blocks_of_void_steps())
        while self.running:
            self._preempt_request(self.running.pop(), now, drop_stale_output=True)
        for request in self.requests.values():
            self._start_over(request)
        self.prev_step_scheduled_req_ids.clear()
        self.finished_req_ids.clear()
        self.reset_preempted_req_ids.clear()
        return len(self.requests)

    def _blocks_of_void_steps(self) -> set[int]:
        return set().union(*map(self._blocks_in_flight, self.running))

    def _blocks_in_flight(self, request: Request) -> set[int]:
        """Blocks of a request that hold, in part at least, what steps in flight are to compute."""
        # Below 0 where it has been preempted since: of such a request more is in flight than it counts as computed.
        computed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        groups = self.kv_cache_manager.get_block_ids(request.request_id)
        return {block for blocks in groups for block in blocks[computed // self.block_size :]}

    def _start_over(self, request: Request) -> None:
        # The worker forgets all requests, so each is new to it: it comes back with its output as output.
        if request.status == RequestStatus.PREEMPTED:
            request.status = RequestStatus.WAITING
        remember_output(request)
        request.num_in_flight_tokens = 0
        request.num_stale_output_tokens = 0
        request.num_output_placeholders = 0
        request.drop_stale_output = False

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """A request that came with output gets it as soon as its grammar is compiled, and never again: when it starts
        over, it keeps the grammar that has followed it so far."""
        compiling = request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        ready: bool = super()._handle_blocked_waiting_request(request)
        if ready and compiling and not restore_with_grammar(request, self.structured_output_manager):
            log.error("grammar_rejects_output", request=request.request_id, accepted=request.num_output_tokens - 1)
            _spoil_grammar(request)
            ready = super()._handle_blocked_waiting_request(request)
        return ready


def _spoil_grammar(request: Request) -> None:
    """Let vLLM end it as a request whose grammar could not be compiled."""
    assert request.structured_output_request is not None
    spoilt: Future[Any] = Future()
    spoilt.set_exception(ValueError("the grammar rejects the output that the request came with"))
    request.structured_output_request.grammar = spoilt
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


class ElasticAsyncScheduler(ElasticScheduler, AsyncScheduler):
    """Plans a step before the output of the one before is there: several may be in flight, and all are void then.

    A request may lose its blocks while a step that fills them is in flight: it was aborted, or preempted. The cache
    goes on offering them; so those that a void step was to fill have to be known after the request has gone.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._planned = self._completed = 0
        self._given_up: deque[tuple[int, set[int]]] = deque()
        """Blocks given up while they were in flight, with the number of steps that were planned by then."""

    def schedule(self, *arguments: Any, **options: Any) -> SchedulerOutput:
        self._planned += 1
        return super().schedule(*arguments, **options)

    def update_from_output(self, *arguments: Any, **options: Any) -> Any:
        self._completed += 1
        while self._given_up and self._given_up[0][0] <= self._completed:
            self._given_up.popleft()
        return super().update_from_output(*arguments, **options)

    def _free_request_blocks(self, request: Request) -> None:
        if request.num_in_flight_tokens > 0:
            self._given_up.append((self._planned, self._blocks_in_flight(request)))
        super()._free_request_blocks(request)

    def _blocks_of_void_steps(self) -> set[int]:
        void = super()._blocks_of_void_steps().union(*(blocks for _, blocks in self._given_up))
        self._given_up.clear()
        self._completed = self._planned
        return void
