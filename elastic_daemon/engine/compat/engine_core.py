"""What is relied on of engine cores, which a rank is one of."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_CORE = "vllm.v1.engine.core"

ENGINE_CORE = (
    ReliedOn(
        f"{_CORE}.EngineCoreProc.__init__",
        "called by ElasticEngineCore in place of DPEngineCoreProc's, for an identity of our own",
        (
            "self",
            "vllm_config",
            "local_client",
            "handshake_address",
            "executor_class",
            "log_stats",
            "client_handshake_address",
            "tensor_queue",
            "engine_index",
        ),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc",
        "base of ElasticEngineCore",
        attributes=(
            "batch_queue",
            "current_wave",
            "dp_group",
            "dp_rank",
            "dp_size",
            "dp_sync_interval",
            "eep_scaling_state",
            "enable_fault_tolerance",
            "engines_running",
            "ft_sentinel",
            "ignore_start_dp_wave",
            "input_queue",
            "model_executor",
            "output_queue",
            "pending_pause",
            "scheduler",
            "step_counter",
            "vllm_config",
        ),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._perform_handshakes",
        "overridden: the addresses are known, there is nobody to shake hands with",
        ("self", "handshake_address", "identity", "local_client", "vllm_config", "client_handshake_address"),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._init_data_parallel",
        "overridden: the group comes with the first epoch; called after input_queue is made, before any thread uses it",
        ("self", "vllm_config"),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._process_input_queue",
        "overridden: a fence ends the step before and the wait in it; idle, it blocks in input_queue.get",
        ("self",),
    ),
    ReliedOn(f"{_CORE}.DPEngineCoreProc.has_work", "without it the main loop waits for requests: idle", ("self",)),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._process_aborts_queue",
        "overridden: called once per step, between its output and the scheduler's taking it in",
        ("self",),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc.execute_dummy_batch",
        "overridden: a step of a rank without requests, which the heartbeat counts",
        ("self",),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._initialize_kv_caches",
        "overridden: profiles, compiles and warms up, and the heartbeat says so",
        ("self", "vllm_config"),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._handle_client_request",
        "overridden: WAKEUP carries fences and calls to the main thread",
        ("self", "request_type", "request"),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc.preprocess_add_request",
        "overridden: gives a request the output it already has",
        ("self", "request"),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc.add_request",
        "overridden: tells the front end that the engines must wake",
        ("self", "request", "request_wave"),
    ),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc.log_error_detail",
        "overridden: the loss of a peer is no reason to dump the engine's state",
        ("self", "scheduler_output"),
    ),
    ReliedOn(f"{_CORE}.DPEngineCoreProc.run_busy_loop", "our main loop, wrapped for fault tolerance", ("self",)),
    ReliedOn(f"{_CORE}.DPEngineCoreProc._make_ready_response", "what the front end learns of a rank", ("self",)),
    ReliedOn(
        f"{_CORE}.DPEngineCoreProc._has_global_unfinished_reqs",
        "replaced: called on all ranks after each step; syncs when step_counter is 1 or a multiple of dp_sync_interval",
        ("self", "local_unfinished"),
    ),
    ReliedOn(
        "vllm.config.parallel.ParallelConfig.sync_dp_state",
        "answered alike by respread.sync, which asks for one thing more",
        ("dp_group", "has_unfinished", "pending_pause"),
    ),
    ReliedOn(
        "vllm.v1.fault_tolerance.fault_tolerant_wrapper",
        "calls ft_sentinel.on_fault and waits for ft_sentinel.resumed",
        ("busy_loop_func",),
    ),
    ReliedOn(
        "vllm.logging_utils.dump_input.dump_engine_exception",
        "called for errors that are our own",
        ("config", "scheduler_output", "scheduler_stats"),
    ),
    ReliedOn("vllm.v1.engine.utils.EngineZmqAddresses", "made by hand", attributes=("inputs", "outputs")),
    ReliedOn(
        "vllm.v1.executor.uniproc_executor.UniProcExecutor._distributed_args",
        "overridden: the rank's own torch group meets in a file",
        ("self",),
    ),
    ReliedOn(
        "vllm.v1.executor.uniproc_executor.UniProcExecutor.execute_model",
        "overridden: a step begins; with nothing scheduled there are no collectives, and a dummy batch follows",
        ("self", "scheduler_output", "non_block"),
    ),
    ReliedOn(
        "vllm.v1.executor.uniproc_executor.UniProcExecutor",
        "base of LocalExecutor",
        attributes=("driver_worker", "vllm_config"),
    ),
)
