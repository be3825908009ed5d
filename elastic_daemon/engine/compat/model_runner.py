"""What is relied on of workers and model runners."""

from __future__ import annotations

from elastic_daemon.engine.compat.relied_on import ReliedOn

_WORKER = "vllm.v1.worker"

MODEL_RUNNER = (
    ReliedOn(
        f"{_WORKER}.gpu_model_runner.CachedRequestState",
        "patched: a resumed request starts with its output",
        attributes=("generator", "output_token_ids", "sampling_params"),
    ),
    ReliedOn(f"{_WORKER}.gpu_input_batch.CachedRequestState.__post_init__", "extended", ("self",)),
    ReliedOn(
        f"{_WORKER}.gpu_model_runner.GPUModelRunner._update_states",
        "called to forget all requests; extended: builds CachedRequestState, with a fresh generator",
        ("self", "scheduler_output"),
    ),
    ReliedOn(
        f"{_WORKER}.gpu_model_runner.GPUModelRunner.sample_tokens",
        "extended: draws from the generators of the batch",
        ("self", "grammar_output"),
    ),
    ReliedOn(
        f"{_WORKER}.gpu_model_runner.GPUModelRunner",
        "tells which tokens will be thrown away",
        attributes=("discard_request_mask",),
    ),
    ReliedOn(
        f"{_WORKER}.gpu_input_batch.InputBatch",
        "forgets what a step in flight was to sample; has the generators of its rows",
        attributes=(
            "async_copy_ready_event",
            "generators",
            "num_reqs",
            "prev_req_id_to_index",
            "prev_sampled_token_ids",
            "sampled_token_ids_cpu",
        ),
    ),
    ReliedOn(
        f"{_WORKER}.cpu_model_runner.CPUModelRunner",
        "base of ElasticCPUModelRunner",
        attributes=(
            "device",
            "eplb_state",
            "execute_model_state",
            "input_batch",
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
    ReliedOn(
        "vllm.v1.sample.sampler.batched_count_greater_than",
        "replaced by what it compiles: not within a step",
        ("x", "values"),
    ),
    ReliedOn(
        "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu",
        "takes one integer from a generator for a token, or noise in float64",
        ("self", "logits", "generators", "k", "p"),
    ),
    ReliedOn(
        "vllm.v1.sample.ops.topk_topp_sampler.random_sample",
        "takes exponential noise from a generator, one value for each entry of the vocabulary",
        ("probs", "generators", "use_fp64_gumbel"),
    ),
    ReliedOn("vllm.config.ModelConfig", "what a draw for a token is", attributes=("get_vocab_size", "use_fp64_gumbel")),
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
