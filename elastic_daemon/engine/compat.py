"""The vLLM version that `engine/` is written against, and every symbol of it that is relied on without being public.

A new vLLM is adopted by raising `VLLM_VERSION`, running `tests/contract`, and mending what it names.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_daemon.errors import ConfigError, engine_missing

VLLM_VERSION = "0.32.0"


def check_version() -> None:
    """Raises ConfigError when the vLLM in this environment is missing or not the one we know."""
    try:
        from vllm import __version__ as found
    except ImportError as error:
        raise ConfigError(f"vLLM {VLLM_VERSION} is needed: {engine_missing(error)}") from error
    # Builds for one device carry it as a local version: 0.32.0+cpu.
    if found.partition("+")[0] != VLLM_VERSION:
        raise ConfigError(f"vLLM {VLLM_VERSION} is needed for its internals, this environment has {found}")


@dataclass(frozen=True)
class ReliedOn:
    """A symbol, why it matters, and what must stay as it is.

    `parameters`: names of its parameters, in order. `attributes`: instance attributes of a class that we read or set.
    """

    symbol: str
    why: str
    parameters: tuple[str, ...] | None = None
    attributes: tuple[str, ...] = ()


_CORE = "vllm.v1.engine.core"
_CLIENT = "vllm.v1.engine.core_client"
_GROUPS = "vllm.distributed.parallel_state"
_EPLB = "vllm.distributed.eplb"
_MOE = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"
_INTERFACES = "vllm.model_executor.models.interfaces"
_WORKER = "vllm.v1.worker"
_SCHED = "vllm.v1.core.sched"
_SERVE = "vllm.entrypoints"
_TORCH = "torch._C._distributed_c10d"

_ENGINE_CORE = (
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
            "current_wave",
            "dp_group",
            "dp_rank",
            "dp_size",
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
        "syncs when step_counter is 1 or a multiple of dp_sync_interval: all members start an epoch at 0",
        ("self", "local_unfinished"),
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

_ENGINE_CLIENT = (
    ReliedOn(
        f"{_CLIENT}.AsyncMPClient",
        "base of ElasticClient, which sets up all of this itself",
        attributes=(
            "_effective_attention_block_sizes",
            "_engine_status",
            "_finalizer",
            "_kv_event_sources",
            "_renderer",
            "client_count",
            "client_index",
            "core_engine",
            "core_engines",
            "ctx",
            "decoder",
            "encoder",
            "engine_ranks_managed",
            "engines_running",
            "input_socket",
            "outputs_queue",
            "resources",
            "stats_update_address",
            "utility_results",
            "vllm_config",
        ),
    ),
    ReliedOn(
        f"{_CLIENT}.MPClient.__init__",
        "not called: ElasticClient sets what it sets",
        ("self", "asyncio_mode", "vllm_config", "executor_class", "log_stats", "client_addresses", "renderer"),
    ),
    ReliedOn(
        f"{_CLIENT}.AsyncMPClient.__init__",
        "not called: ElasticClient sets what it sets",
        (
            "self",
            "vllm_config",
            "executor_class",
            "log_stats",
            "client_addresses",
            "client_count",
            "client_index",
            "renderer",
        ),
    ),
    ReliedOn(f"{_CLIENT}.MPClient._apply_ready_response", "takes what a rank says of its cache", ("self", "payload")),
    ReliedOn(f"{_CLIENT}.AsyncMPClient._ensure_output_queue_task", "overridden: our own receiver", ("self",)),
    ReliedOn(f"{_CLIENT}.AsyncMPClient.get_output_async", "starts the receiver and reads its queue", ("self",)),
    ReliedOn(f"{_CLIENT}.AsyncMPClient.add_request_async", "overridden: chooses the rank", ("self", "request")),
    ReliedOn(f"{_CLIENT}.AsyncMPClient.abort_requests_async", "overridden: asks the owners", ("self", "request_ids")),
    ReliedOn(f"{_CLIENT}.AsyncMPClient.call_utility_async", "overridden: asks all ranks", ("self", "method", "args")),
    ReliedOn(f"{_CLIENT}.AsyncMPClient.call_utility_all_async", "asks core_engines", ("self", "method", "args")),
    ReliedOn(
        f"{_CLIENT}.AsyncMPClient._call_utility_async",
        "overridden: a dead rank's calls must fail",
        ("self", "method", "args", "engine"),
    ),
    ReliedOn(f"{_CLIENT}.AsyncMPClient.get_supported_tasks_async", "overridden: known without asking", ("self",)),
    ReliedOn(
        f"{_CLIENT}.BackgroundResources",
        "holds the sockets and the receiver, and closes them",
        attributes=("ctx", "engine_dead", "input_socket", "output_queue_task", "output_socket"),
    ),
    ReliedOn(f"{_CLIENT}._process_utility_output", "resolves a call", ("output", "utility_results")),
    ReliedOn(
        f"{_CLIENT}.EngineCoreClient.make_async_mp_client",
        "patched while AsyncLLM is made: there is no hook for another client",
        ("vllm_config", "executor_class", "log_stats", "client_addresses", "client_count", "client_index", "renderer"),
    ),
    ReliedOn(
        "vllm.v1.engine.EngineCoreRequest",
        "what the ledger keeps and sends again",
        attributes=("client_index", "current_wave", "request_id", "sampling_params"),
    ),
    ReliedOn(
        "vllm.v1.engine.EngineCoreOutput",
        "what the ledger records",
        attributes=("finish_reason", "new_token_ids", "request_id"),
    ),
    ReliedOn(
        "vllm.v1.engine.EngineCoreOutputs",
        "what ranks send",
        attributes=(
            "engine_index",
            "outputs",
            "scheduler_stats",
            "start_wave",
            "utility_output",
            "wave_complete",
        ),
    ),
    ReliedOn("vllm.v1.serial_utils.MsgpackEncoder.encode", "messages to ranks", ("self", "obj")),
    ReliedOn("vllm.v1.serial_utils.MsgpackDecoder.decode", "messages of ranks", ("self", "bufs")),
    ReliedOn(
        "vllm.utils.network_utils.make_zmq_socket",
        "the front end's sockets",
        ("ctx", "path", "socket_type", "bind", "identity", "linger", "router_handover", "listener"),
    ),
    ReliedOn("vllm.exceptions.GracefulHTTPError.__init__", "a 503 with a reason", ("self", "message", "http_status")),
    ReliedOn(
        "vllm.v1.engine.output_processor.OutputProcessor",
        "requests in flight are ended with an error",
        attributes=("request_states",),
    ),
    ReliedOn("vllm.v1.engine.output_processor.RequestState", "its queue takes the error", attributes=("queue",)),
    ReliedOn("vllm.v1.engine.async_llm.AsyncLLM", "the front end", attributes=("engine_core", "output_processor")),
)

_SCHEDULER = (
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler",
        "base of ElasticScheduler, which takes back a step",
        attributes=(
            "block_size",
            "finished_req_ids",
            "kv_cache_manager",
            "prev_step_scheduled_req_ids",
            "requests",
            "reset_preempted_req_ids",
            "running",
        ),
    ),
    ReliedOn(
        f"{_SCHED}.scheduler.Scheduler._preempt_request",
        "queues a running request for recomputation",
        ("self", "request", "timestamp", "drop_stale_output"),
    ),
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

_MODEL_RUNNER = (
    ReliedOn(
        f"{_WORKER}.gpu_model_runner.CachedRequestState",
        "patched: a resumed request starts with its output",
        attributes=("output_token_ids", "sampling_params"),
    ),
    ReliedOn(f"{_WORKER}.gpu_input_batch.CachedRequestState.__post_init__", "extended", ("self",)),
    ReliedOn(
        f"{_WORKER}.gpu_model_runner.GPUModelRunner._update_states",
        "called to forget all requests; builds CachedRequestState",
        ("self", "scheduler_output"),
    ),
    ReliedOn(
        f"{_WORKER}.cpu_model_runner.CPUModelRunner",
        "base of ElasticCPUModelRunner",
        attributes=(
            "device",
            "eplb_state",
            "execute_model_state",
            "model",
            "model_config",
            "parallel_config",
            "requests",
        ),
    ),
    ReliedOn(
        f"{_WORKER}.cpu_model_runner.CPUModelRunner.load_model",
        "overridden: experts of the planned column, and load balancing",
        ("self", "load_dummy_weights"),
    ),
    ReliedOn(
        f"{_WORKER}.cpu_worker.CPUWorker",
        "base of ElasticCPUWorker",
        attributes=("distributed_init_method", "local_rank", "model_config", "model_runner", "parallel_config", "rank"),
    ),
    ReliedOn(f"{_WORKER}.cpu_worker.CPUWorker.init_device", "overridden: groups of this rank alone", ("self",)),
    ReliedOn(
        f"{_WORKER}.gpu_worker.init_worker_distributed_environment",
        "builds vLLM's own groups, for this rank alone",
        ("vllm_config", "rank", "distributed_init_method", "local_rank", "backend"),
    ),
    ReliedOn("vllm.utils.torch_utils.set_random_seed", "as in vLLM's worker", ("seed", "data_parallel_index")),
    ReliedOn("vllm.utils.torch_utils.set_default_torch_dtype", "as in vLLM's loader", ("dtype",)),
    ReliedOn(
        "vllm.config.ParallelConfig",
        "rewritten with every epoch",
        attributes=(
            "data_parallel_index",
            "data_parallel_rank",
            "data_parallel_rank_local",
            "data_parallel_size",
            "elastic_ep_max_dp_size",
            "enable_eplb",
            "enable_expert_parallel",
            "eplb_config",
        ),
    ),
)

_COMMUNICATION = (
    ReliedOn(
        f"{_GROUPS}._replace_active_groups",
        "installs our groups",
        ("world", "dp", "ep", "eplb", "node_count"),
    ),
    ReliedOn(f"{_GROUPS}.get_world_group", "stays local to the rank", ()),
    ReliedOn(f"{_GROUPS}.get_pcp_group", "of size one", ()),
    ReliedOn(f"{_GROUPS}.get_tp_group", "of size one", ()),
    ReliedOn(f"{_GROUPS}.get_ep_group", "ours", ()),
    ReliedOn(
        f"{_GROUPS}.GroupCoordinator",
        "base of EpochGroup, which sets all of this itself",
        attributes=(
            "cpu_group",
            "device",
            "device_communicator",
            "device_group",
            "local_rank",
            "mq_broadcaster",
            "rank",
            "rank_in_group",
            "ranks",
            "unique_name",
            "use_cpu_custom_send_recv",
            "use_custom_op_call",
            "world_size",
        ),
    ),
    ReliedOn(f"{_GROUPS}.GroupCoordinator.destroy", "overridden: the epoch's group owns what there is", ("self",)),
    ReliedOn(
        f"{_GROUPS}.GroupCoordinator.dispatch",
        "hands its arguments on by position to EpochCommunicator.dispatch",
        ("self", "hidden_states", "topk_weights", "topk_ids", "is_sequence_parallel", "extra_tensors"),
    ),
    ReliedOn(
        f"{_GROUPS}.GroupCoordinator.combine",
        "hands its arguments on by position to EpochCommunicator.combine",
        ("self", "hidden_states", "is_sequence_parallel"),
    ),
    ReliedOn(
        "vllm.distributed.utils.init_gloo_process_group",
        "a gloo group without torch's global state",
        ("prefix_store", "group_rank", "group_size", "timeout"),
    ),
    ReliedOn("vllm.forward_context.ForwardContext", "tokens of each rank", attributes=("dp_metadata",)),
    ReliedOn("vllm.forward_context.DPMetadata.get_chunk_sizes_across_dp_rank", "tokens of each rank", ("self",)),
    ReliedOn(f"{_TORCH}.ProcessGroup._get_backend", "the gloo backend of a group"),
    ReliedOn(f"{_TORCH}.ProcessGroup._allgather_base", "dispatch"),
    ReliedOn(f"{_TORCH}.ProcessGroup.alltoall_base", "combine"),
    ReliedOn(f"{_TORCH}.ProcessGroup.allreduce", "all_reduce"),
    ReliedOn(f"{_TORCH}.ProcessGroupGloo._set_default_timeout", "meeting is short, a collective may be long"),
)

_EXPERTS = (
    ReliedOn(
        f"{_MOE}.router.base_router.eplb_map_to_physical_and_record",
        "patched on CPU, where it is the identity",
        (
            "topk_ids",
            "expert_load_view",
            "logical_to_physical_map",
            "logical_replica_count",
            "record_enabled",
            "num_unpadded_tokens",
        ),
    ),
    ReliedOn(
        f"{_MOE}.router.base_router.BaseRouter._apply_eplb_mapping", "calls it by its global name", ("self", "topk_ids")
    ),
    ReliedOn(
        f"{_MOE}.experts.cpu_moe.CPUUnquantizedExperts.apply",
        "patched on CPU, where it ignores expert_map",
        (
            "self",
            "output",
            "hidden_states",
            "w1",
            "w2",
            "topk_weights",
            "topk_ids",
            "activation",
            "global_num_experts",
            "expert_map",
            "a1q_scale",
            "a2_scale",
            "workspace13",
            "workspace2",
            "expert_tokens_meta",
            "apply_router_weight_on_input",
        ),
    ),
    ReliedOn(
        f"{_MOE}.routed_experts.RoutedExperts",
        "its slots are loaded one by one",
        attributes=(
            "expert_map_manager",
            "hidden_size",
            "intermediate_size_per_partition",
            "layer_name",
            "local_num_experts",
            "moe_config",
            "params_dtype",
            "quant_config",
            "quant_method",
        ),
    ),
    ReliedOn(
        f"{_MOE}.routed_experts.RoutedExperts.load_weights",
        "loads one expert from its tensors of the checkpoint",
        ("self", "weights"),
    ),
    ReliedOn(
        f"{_MOE}.routed_experts.RoutedExperts.weight_loader",
        "given to the parameters of a scratch layer",
        ("self", "param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"),
    ),
    ReliedOn(
        f"{_MOE}.routed_experts.RoutedExperts._map_global_expert_id_to_local_expert_id",
        "shadowed on the instance while loading: says which slot an expert goes into",
        ("self", "expert_id"),
    ),
    ReliedOn(
        f"{_MOE}.routed_experts.RoutedExperts._get_quant_method",
        "the kernels of a scratch layer",
        ("self", "prefix", "quant_config", "moe_config"),
    ),
    ReliedOn(
        f"{_MOE}.fused_moe_method_base.FusedMoEMethodBase.create_weights",
        "the parameters of a scratch layer",
        (
            "self",
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
            "extra_weight_attrs",
        ),
    ),
    ReliedOn(
        f"{_MOE}.expert_map_manager.ExpertMapManager",
        "has no map in a group of one, and its update wants one",
        attributes=("_expert_map",),
    ),
    ReliedOn(
        f"{_MOE}.runner.moe_runner.MoERunner",
        "what moe_layers holds",
        attributes=("moe_config", "routed_experts"),
    ),
    ReliedOn(
        f"{_MOE}.runner.moe_runner.MoERunner._set_moe_config", "the group size of an epoch", ("self", "new_moe_config")
    ),
    ReliedOn(
        f"{_MOE}.config.FusedMoEConfig",
        "replaced with every epoch",
        attributes=(
            "hidden_dim",
            "hidden_dim_unpadded",
            "intermediate_size_per_partition",
            "moe_parallel_config",
            "num_experts",
            "num_local_experts",
        ),
    ),
    ReliedOn(
        f"{_MOE}.config.FusedMoEParallelConfig.make",
        "the group size of an epoch",
        ("tp_size_", "pcp_size_", "dp_size_", "sp_size_", "vllm_parallel_config"),
    ),
    ReliedOn(
        f"{_INTERFACES}.MixtureOfExperts",
        "all that we know of a model",
        attributes=(
            "expert_weights",
            "moe_layers",
            "num_expert_groups",
            "num_logical_experts",
            "num_moe_layers",
            "num_physical_experts",
        ),
    ),
    ReliedOn(
        f"{_INTERFACES}.MixtureOfExperts.set_eplb_state",
        "gives layers their tables",
        ("self", "expert_load_view", "logical_to_physical_map", "logical_replica_count"),
    ),
    ReliedOn(
        f"{_INTERFACES}.MixtureOfExperts.update_physical_experts_metadata",
        "the group size of an epoch",
        ("self", "num_physical_experts", "num_local_physical_experts"),
    ),
    ReliedOn(f"{_INTERFACES}.get_mixture_of_experts_model", "finds the MoE part of a model", ("model",)),
    ReliedOn(
        f"{_LOADER}.base_loader.BaseModelLoader.load_model",
        "calls self.load_weights, which is shadowed on the instance",
        ("self", "vllm_config", "model_config", "prefix"),
    ),
    ReliedOn(
        f"{_LOADER}.default_loader.DefaultModelLoader.load_weights", "shadowed", ("self", "model", "model_config")
    ),
    ReliedOn(
        f"{_LOADER}.default_loader.DefaultModelLoader._prepare_weights",
        "finds the files of a checkpoint",
        ("self", "model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides"),
    ),
)

_LOAD_BALANCING = (
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbState",
        "base of ElasticEplbState",
        attributes=(
            "device",
            "expert_load_window_size",
            "expert_load_window_step",
            "expert_rearrangement_step",
            "model_states",
            "parallel_config",
            "policy",
        ),
    ),
    ReliedOn(f"{_EPLB}.eplb_state.EplbState.__init__", "called", ("self", "parallel_config", "device")),
    ReliedOn(f"{_EPLB}.eplb_state.EplbState.add_model", "called once", ("self", "model", "model_config", "model_name")),
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbState.rearrange",
        "overridden: layer by layer",
        ("self", "is_profile", "rank_mapping", "use_last_expert_load"),
    ),
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbState.build_initial_global_physical_to_logical_map",
        "the first E physical ids are the logical ones: weight loaders ask for slots by them",
        ("num_routed_experts", "num_redundant_experts"),
    ),
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbState._propagate_shared_tensors",
        "layers share the recording flag and token counts",
        ("self", "model", "num_unpadded_tokens_tensors"),
    ),
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbState._update_layer_should_record", "sets the recording flag", ("self", "log_stats")
    ),
    ReliedOn(f"{_EPLB}.eplb_state.EplbState._allreduce_list", "sums loads over ranks", ("self", "tensor_list")),
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbModelState",
        "tables and counters are replaced when the group changes its size",
        attributes=(
            "communicator",
            "expert_buffer",
            "expert_load_pass",
            "expert_load_pass_buffer",
            "expert_load_window",
            "last_expert_load",
            "logical_replica_count",
            "logical_to_physical_map",
            "model",
            "num_unpadded_tokens_tensors",
            "physical_to_logical_map",
            "physical_to_logical_map_buffer",
        ),
    ),
    ReliedOn(
        f"{_EPLB}.eplb_state._commit_eplb_maps", "commits a placement", ("model_state", "new_physical_to_logical_map")
    ),
    ReliedOn(
        f"{_EPLB}.eplb_state._commit_eplb_maps_for_layer",
        "commits one layer with its weights",
        ("model_state", "new_physical_to_logical_map", "layer"),
    ),
    ReliedOn(
        f"{_EPLB}.rebalance_execute.move_to_buffer",
        "first half of a layer's transfer: writes buffers only",
        (
            "num_local_experts",
            "old_indices",
            "new_indices",
            "expert_weights",
            "expert_weights_buffers",
            "stream",
            "ep_rank",
            "communicator",
            "layer_idx",
            "enable_migration_batching",
            "migration_batches",
        ),
    ),
    ReliedOn(
        f"{_EPLB}.rebalance_execute.move_from_buffer",
        "second half: no communication, so it cannot be cut short by a peer",
        ("expert_weights", "expert_weights_buffers", "transfer_metadata", "new_indices", "ep_rank"),
    ),
    ReliedOn(
        f"{_EPLB}.policy.AbstractEplbPolicy.rebalance_experts",
        "called by position",
        ("cls", "weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices"),
    ),
)

_SERVER = (
    ReliedOn(f"{_SERVE}.launchers.cli_args.make_arg_parser", "vLLM's own flags", ("parser",)),
    ReliedOn(
        f"{_SERVE}.launchers.api_server.app_state.init_app_state",
        "vLLM's own handlers",
        ("engine_client", "state", "args", "supported_tasks"),
    ),
    ReliedOn(f"{_SERVE}.launchers.utils.server_utils.lifespan", "vLLM's own start and stop", ("app",)),
    ReliedOn(f"{_SERVE}.generate.api_router.register_generate_api_routers", "served routes", ("app",)),
    ReliedOn(f"{_SERVE}.openai.models.api_router.attach_router", "served routes", ("app",)),
    ReliedOn(f"{_SERVE}.serve.tokenize.api_router.attach_router", "served routes", ("app",)),
    ReliedOn(f"{_SERVE}.serve.exception_handling.register.init_exception_handler", "error bodies", ("app",)),
)

RELIED_ON: tuple[ReliedOn, ...] = (
    *_ENGINE_CORE,
    *_ENGINE_CLIENT,
    *_SCHEDULER,
    *_MODEL_RUNNER,
    *_COMMUNICATION,
    *_EXPERTS,
    *_LOAD_BALANCING,
    *_SERVER,
)
"""Checked symbol by symbol in tests/contract/test_vllm_symbols.py."""
