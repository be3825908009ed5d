"""vLLM's scheduler, able to take back a step that never finished."""

from __future__ import annotations

import time

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from elastic_daemon.engine.resume import remember_output


class ElasticScheduler(Scheduler):
    """Scheduler for synchronous scheduling: at most one step is in flight, so at most one is void."""

    def void_step(self) -> int:
        """Return all requests to their last completed step and queue them for recomputation.

        The prefix cache keeps what was computed. Blocks that the void step registered when it was scheduled hold
        nothing and leave the cache, or a later request would read garbage. Returns the number of requests kept.
        """
        now = time.monotonic()
        self.kv_cache_manager.evict_blocks(self._blocks_of_void_step())
        while self.running:
            self._preempt_request(self.running.pop(), now, drop_stale_output=True)
        for request in self.requests.values():
            self._start_over(request)
        self.prev_step_scheduled_req_ids.clear()
        self.finished_req_ids.clear()
        self.reset_preempted_req_ids.clear()
        return len(self.requests)

    def _blocks_of_void_step(self) -> set[int]:
        void: set[int] = set()
        for request in self.running:
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            for blocks in self.kv_cache_manager.get_block_ids(request.request_id):
                void.update(blocks[computed // self.block_size :])
        return void

    def _start_over(self, request: Request) -> None:
        # The worker forgets all requests, so each is new to it: it comes back with its output as output.
        if request.status == RequestStatus.PREEMPTED:
            request.status = RequestStatus.WAITING
        remember_output(request)
        request.num_in_flight_tokens = 0
        request.num_stale_output_tokens = 0
        request.num_output_placeholders = 0
        request.drop_stale_output = False
