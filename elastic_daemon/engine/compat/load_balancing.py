"""What is relied on of load balancing of experts."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_EPLB = "vllm.distributed.eplb"

LOAD_BALANCING = (
    ReliedOn(
        f"{_EPLB}.eplb_state.EplbState",
        "base of ElasticEplbState",
        attributes=(
            "device",
            "expert_load_window_size",
            "expert_load_window_step",
            "expert_rearrangement_step",
            "is_async",
            "model_states",
            "parallel_config",
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
)
