"""From vLLM flags to a configuration for ranks and front end."""

from __future__ import annotations

import copy
import io
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from elastic_daemon.engine.plan import LocalExecutor, RankPlan
from elastic_daemon.errors import ConfigError
from elastic_daemon.placement import PlacementError, slots_per_rank
from elastic_daemon.settings.flags import refusals
from elastic_daemon.telemetry.trace_settings import traces_endpoint

CPU_KV_CACHE_BYTES = 256 << 20
"""Default KV cache of a CPU rank. vLLM's own default takes most of the machine's memory, for each rank."""

SHARED_GPU_KV_CACHE_BYTES = 1 << 30
"""Default KV cache of a rank that shares its GPU: what is free cannot be measured while others allocate."""

EXPERT_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")
"""What an expert layer is in a compiled model, dispatch and combine included."""

DP_SYNC_INTERVAL = 4
"""Steps between two agreements of the engines where `--dp-sync-interval` is not given; vLLM's 16 would keep a rank that
is to join or leave waiting for as many. One costs an all-reduce of eight numbers among hosts."""

WORKERS = {
    "cpu": "elastic_daemon.engine.cpu_worker.ElasticCPUWorker",
    "cuda": "elastic_daemon.engine.gpu_worker.ElasticGPUWorker",
}


@dataclass(frozen=True)
class Deployment:
    """A validated deployment: what the supervisor needs to know about a model without importing vLLM."""

    args: Namespace
    config: VllmConfig
    model: str
    experts: int
    slots: int
    ranks_per_gpu: int
    """0 without GPUs."""

    def gpu(self, rank: int) -> int:
        """Index of a rank's device, among those that all see, where its GPU is not known by UUID."""
        return rank // self.ranks_per_gpu if self.ranks_per_gpu else 0


def configure(
    arguments: Sequence[str],
    ranks: int,
    survive_losses: int,
    device: str,
    ranks_per_gpu: int = 1,
    max_ranks: int | None = None,
) -> Deployment:
    """Parse vLLM flags, refuse what cannot work, and size the expert slots for `ranks`; `max_ranks` may come to serve.

    Raises:
        ConfigError: with one line that names the flag or model and what to do.
    """
    if current_platform.device_type != device:
        raise ConfigError(
            f"--device {device}: the vLLM in this environment, or this machine, serves on "
            f"{current_platform.device_type or 'no device'}; install the build for {device}, or change --device"
        )
    args = parse_flags(arguments)
    if args.model_tag is not None:
        raise ConfigError(f"unexpected argument {args.model_tag!r}: MODEL comes right after `serve`, before all flags")
    if problems := refusals(vars(args), device):
        raise ConfigError("; ".join(problems))
    if not Path(args.model).is_dir() and Path(args.model).is_absolute():
        raise ConfigError(f"no such model directory: {args.model}")
    args.use_tqdm_on_load = False  # four progress bars at once, in a log
    args.otlp_traces_endpoint = args.otlp_traces_endpoint or traces_endpoint(os.environ)
    if device == "cpu":
        args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or CPU_KV_CACHE_BYTES
    elif ranks_per_gpu > 1:
        args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or SHARED_GPU_KV_CACHE_BYTES
        args.gpu_memory_utilization /= ranks_per_gpu
    if device == "cpu":
        args.enforce_eager = True
    if not args.enforce_eager:
        _keep_collectives_out_of_graphs(args.compilation_config)
    redundant = args.eplb_config.num_redundant_experts
    args.eplb_config.num_redundant_experts = 0  # vLLM checks it against balancing that it believes CPUs cannot do
    args.enable_eplb = args.enable_expert_parallel = False  # always on here, likewise
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # by vLLM, transformers, pydantic, of any kind: they are about what the user gave
        raise ConfigError(f"model {args.model} cannot be served: {_first_line(error)}") from error
    experts = config.model_config.get_num_experts()
    if not config.model_config.is_moe or experts < 2:
        raise ConfigError(f"{args.model} is a dense model: without experts there is nothing to shrink")
    _check_quantization(config, device)
    slots = _slots(experts, ranks, survive_losses, redundant)
    _make_elastic(config, ranks, max_ranks or ranks, slots * ranks - experts, device)
    name = args.served_model_name[0] if args.served_model_name else args.model
    return Deployment(args, config, name, experts, slots, 0 if device == "cpu" else ranks_per_gpu)


def _keep_collectives_out_of_graphs(compilation: CompilationConfig) -> None:
    """CUDA graphs of everything between the expert layers: a graph that held a collective would end with its group.

    So graphs stay valid over a change of the group, and a rank can capture them before it has one.
    """
    mode = compilation.cudagraph_mode
    if mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif mode not in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
        raise ConfigError(
            f"--compilation-config cudagraph_mode {mode.name}: a full graph holds the collectives of its group, which "
            "end with it; use PIECEWISE, which is the default here, or --enforce-eager"
        )


def _split_at_experts(compilation: CompilationConfig) -> None:
    if compilation.splitting_ops:
        compilation.splitting_ops += [op for op in EXPERT_OPS if op not in compilation.splitting_ops]


def _check_quantization(config: VllmConfig, device: str) -> None:
    if (method := config.model_config.quantization) is None:
        return
    if method != "fp8" or device == "cpu":
        raise ConfigError(
            f"the model's weights are quantized ({method}): that its experts can be repaired is not proven"
        )
    # Ranks load alone, so that vLLM cannot agree on static scales; and one number per rank cannot be dispatched.
    if getattr(config.quant_config, "weight_block_size", None) is None:
        raise ConfigError(
            "the model's weights are quantized (fp8) with one scale for a whole tensor: use a checkpoint with a scale "
            "for each block (weight_block_size in its quantization_config)"
        )


def _slots(experts: int, ranks: int, survive_losses: int, redundant: int) -> int:
    """Expert slots per rank: from the losses to survive, or from vLLM's number of redundant experts where it is set."""
    if redundant:
        slots, rest = divmod(experts + redundant, ranks)
        if rest:
            raise ConfigError(
                f"--eplb-config num_redundant_experts {redundant}: {experts} + {redundant} experts do not divide among "
                f"{ranks} ranks; leave it out and use --survive-losses"
            )
        return slots
    try:
        return slots_per_rank(experts, ranks, survive_losses)
    except PlacementError as error:
        raise ConfigError(f"--data-parallel-size {ranks} with --survive-losses {survive_losses}: {error}") from error


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """vLLM's own flags, with our defaults where they differ. Raises ConfigError, with what its parser says."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="elastic-daemon serve"))
    parser.set_defaults(dp_sync_interval=DP_SYNC_INTERVAL)
    messages = io.StringIO()
    try:
        with redirect_stderr(messages), redirect_stdout(messages):
            return parser.parse_args(list(arguments))
    except SystemExit as error:
        said = messages.getvalue().strip().splitlines()
        raise ConfigError(said[-1] if said else "bad flags") from error
    except Exception as error:  # the parsers of single flags raise what they like
        raise ConfigError(_first_line(error)) from error


def _make_elastic(config: VllmConfig, ranks: int, max_ranks: int, redundant: int, device: str) -> None:
    # Set after validation: vLLM refuses load balancing on CPU, and reserves ports for groups that the daemon builds.
    _split_at_experts(config.compilation_config)
    parallel = config.parallel_config
    parallel.data_parallel_size = ranks
    parallel.elastic_ep_max_dp_size = max_ranks
    parallel.enable_expert_parallel = True
    parallel.enable_eplb = True
    parallel.eplb_config.num_redundant_experts = redundant
    parallel.eplb_config.communicator = "torch_nccl"  # never made: ours takes its place
    parallel.all2all_backend = "allgather_reducescatter"
    parallel.disable_nccl_for_dp_synchronization = True  # what hosts agree on stays off the device
    parallel.worker_cls = WORKERS[device]
    config.kernel_config.enable_flashinfer_autotune = False  # it tunes by timing, alone: never the same on two ranks
    parallel.distributed_executor_backend = LocalExecutor
    kind = "ElasticAsyncScheduler" if config.scheduler_config.async_scheduling else "ElasticScheduler"
    config.scheduler_config.scheduler_cls = f"elastic_daemon.engine.scheduler.{kind}"


def for_rank(config: VllmConfig, plan: RankPlan) -> VllmConfig:
    """The configuration of one rank, independent of all others."""
    own = copy.deepcopy(config)
    own.additional_config = plan
    own.parallel_config.data_parallel_rank = plan.position
    own.parallel_config.data_parallel_index = plan.position
    own.parallel_config.data_parallel_rank_local = plan.gpu
    own.parallel_config.data_parallel_size = len(plan.members)
    physical = plan.slots * len(plan.members)
    own.parallel_config.eplb_config.num_redundant_experts = physical - own.model_config.get_num_experts()
    return own


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    # pydantic puts the reason in the third line of its report
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("Value error,")), lines[0])
    return reason.removeprefix("Value error, ").split(" [type=")[0]
