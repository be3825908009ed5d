"""What is relied on of the front end's side of the engines."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_CLIENT = "vllm.v1.engine.core_client"

ENGINE_CLIENT = (
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
    ReliedOn(
        "vllm.v1.engine.output_processor.OutputProcessor.abort_requests",
        "forgets requests that were ended with an error, and says which",
        ("self", "request_ids", "internal"),
    ),
    ReliedOn(
        "vllm.v1.engine.output_processor.RequestState",
        "its queue takes the error; choices of one client share a parent",
        attributes=("queue", "parent_req"),
    ),
    ReliedOn("vllm.v1.engine.async_llm.AsyncLLM", "the front end", attributes=("engine_core", "output_processor")),
)
