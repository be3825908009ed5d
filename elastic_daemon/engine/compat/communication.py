"""What is relied on of groups and collectives."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_GROUPS = "vllm.distributed.parallel_state"
_TORCH = "torch._C._distributed_c10d"

COMMUNICATION = (
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
    ReliedOn(
        f"{_GROUPS}.GroupCoordinator.graph_capture",
        "overridden: vLLM's wants a communicator of its own, and none of ours is in a graph",
        ("self", "graph_capture_context"),
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
