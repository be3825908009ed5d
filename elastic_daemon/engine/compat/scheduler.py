"""What is relied on of the scheduler and its requests."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_SCHED = "vllm.v1.core.sched"

SCHEDULER = (
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler",
        "base of ElasticScheduler, which takes back steps",
        attributes=(
            "block_size",
            "finished_req_ids",
            "kv_cache_manager",
            "prev_step_scheduled_req_ids",
            "requests",
            "reset_preempted_req_ids",
            "running",
            "structured_output_manager",
        ),
    ),
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler._handle_blocked_waiting_request",
        "extended: promotes a request whose grammar is compiled, fails one whose grammar is an exception",
        ("self", "request"),
    ),
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler._preempt_request",
        "queues a running request for recomputation",
        ("self", "request", "timestamp", "drop_stale_output"),
    ),
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler._free_request_blocks",
        "overridden: a request gives up its blocks, maybe while a step in flight fills them",
        ("self", "request"),
    ),
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler.schedule",
        "overridden: plans a step, and update_from_output is called once for each",
        ("self", "throttle_prefills"),
    ),
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler.update_from_output",
        "overridden: a step is complete",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    ReliedOn(f"{_SCHED}.async_scheduler.AsyncScheduler", "base of ElasticAsyncScheduler"),
    ReliedOn(
        "vllm.v1.core.kv_cache_manager.KVCacheManager.evict_blocks",
        "blocks that a void step registered hold nothing",
        ("self", "block_ids"),
    ),
    ReliedOn(
        "vllm.v1.core.kv_cache_manager.KVCacheManager.get_block_ids", "blocks of a void step", ("self", "request_id")
    ),
    ReliedOn(
        "vllm.v1.request.Request",
        "its counters go back to the last completed step",
        attributes=(
            "drop_stale_output",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_output_placeholders",
            "num_output_tokens",
            "num_preemptions",
            "num_stale_output_tokens",
            "output_token_ids",
            "prefill_stats",
            "request_id",
            "sampling_params",
            "status",
            "structured_output_request",
            "use_structured_output",
        ),
    ),
    ReliedOn(
        "vllm.v1.request.Request.append_output_token_ids",
        "admits a request with the output it already has",
        ("self", "token_ids"),
    ),
    ReliedOn("vllm.v1.request.RequestStatus.PREEMPTED", "comes back as WAITING"),
    ReliedOn("vllm.v1.request.RequestStatus.WAITING", "comes back as WAITING"),
    ReliedOn(
        "vllm.v1.request.RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR",
        "the status of a request once only: before its grammar is compiled",
    ),
    ReliedOn(
        "vllm.v1.structured_output.StructuredOutputManager.accept_tokens",
        "leads a grammar through the output of a resumed request",
        ("self", "request", "new_token_ids"),
    ),
    ReliedOn(
        "vllm.v1.structured_output.request.StructuredOutputRequest",
        "may be given a future with an exception in place of its grammar",
        attributes=("grammar",),
    ),
    ReliedOn(
        "vllm.sampling_params.SamplingParams", "carries the output of a resumed request", attributes=("extra_args",)
    ),
    ReliedOn("vllm.sampling_params.SamplingParams.clone", "carries the output of a resumed request", ("self",)),
    ReliedOn(
        f"{_SCHED}.output.SchedulerOutput",
        "an empty one makes the worker forget its requests; tells prefill from decode",
        attributes=(
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_new_reqs",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    ReliedOn(f"{_SCHED}.output.SchedulerOutput.make_empty", "makes the worker forget its requests", ("cls",)),
)
