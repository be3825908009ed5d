"""What is relied on of expert layers and the loading of their weights."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_MOE = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"
_INTERFACES = "vllm.model_executor.models.interfaces"

EXPERTS = (
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
        f"{_MOE}.moe_align_block_size.moe_align_block_size",
        "its numbers of rows are those that rehearsed steps are chosen by",
        (
            "topk_ids",
            "block_size",
            "num_experts",
            "expert_map",
            "pad_sorted_ids",
            "ignore_invalid_experts",
            "return_scatter_idx",
        ),
    ),
    ReliedOn(
        f"{_MOE}.runner.moe_runner.MoERunner._set_moe_config", "the group size of an epoch", ("self", "new_moe_config")
    ),
    ReliedOn(
        f"{_MOE}.runner.moe_runner._moe_forward",
        "is vllm::moe_forward in a compiled model, which is split there: dispatch and combine are never captured",
    ),
    ReliedOn(f"{_MOE}.runner.moe_runner._moe_forward_shared", "is vllm::moe_forward_shared, likewise"),
    ReliedOn(
        f"{_MOE}.runner.moe_runner.MoERunner._forward_impl",
        "is what both look up on the layer and call: what it returns is put where CUDA graphs read it",
    ),
    ReliedOn(
        f"{_MOE}.config.FusedMoEConfig",
        "replaced with every epoch; experts of a token decide which steps are rehearsed",
        attributes=(
            "experts_per_token",
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
