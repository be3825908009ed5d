"""What stock vLLM 0.32 lacks to run expert parallelism on CPU at all, as a vLLM general plugin, and nothing more.

`CpuCommunicator` has no `all_gatherv` and no `reduce_scatterv`, and `CPUUnquantizedExperts.apply` ignores `expert_map`.
vLLM loads general plugins in each of its processes, so that `python -m vllm.entrypoints.openai.api_server` itself stays
as it is; `plugin_directory` makes one for PYTHONPATH.

`python -m bench.stock_shim ARGUMENTS` is that server in a process that imports all it needs, prints `ready` and goes on
when it reads a line: a restart at its best. Its engines and workers are forked, and so have imported everything too.
(It is never killed here: forked processes hold each other's pipes open, so that the death of an engine goes unnoticed.)
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

READY = "ready"
PLUGIN = "stock_cpu_expert_parallelism"

PREIMPORTED = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
)


def plugin_directory(parent: Path) -> Path:
    """A directory that, on PYTHONPATH, offers `register` to vLLM as an installed distribution would."""
    info = parent / f"{PLUGIN}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN} = bench.stock_shim:register\n")
    return parent


def register() -> None:
    """Install all replacements in this process. Idempotent."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    stock_apply = CPUUnquantizedExperts.apply
    if getattr(stock_apply, "knows_expert_map", False):
        return

    def apply(self: Any, *args: Any, **kwargs: Any) -> None:
        if (expert_map := kwargs["expert_map"]) is not None:
            local = expert_map[kwargs["topk_ids"].long()]
            elsewhere = local < 0
            kwargs["topk_ids"] = local.masked_fill(elsewhere, 0).to(kwargs["topk_ids"].dtype)
            kwargs["topk_weights"] = kwargs["topk_weights"].masked_fill(elsewhere, 0.0)
        stock_apply(self, *args, **kwargs)

    apply.knows_expert_map = True  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = apply


def all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate every rank's rows; `sizes` are the rows of each rank, None where all have as many."""
    assert dim == 0
    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, sizes) for tensor in input_]
    return _all_gatherv(self, input_, sizes)


def _all_gatherv(self: Any, tensor: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    import torch

    if sizes is None:
        sizes = [tensor.shape[0]] * self.world_size
    rows = max(sizes)
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = tensor.new_empty((self.world_size * rows, *tensor.shape[1:]))
    torch.distributed.all_gather_into_tensor(gathered, padded, group=self.device_group)
    if all(size == rows for size in sizes):
        return gathered
    return torch.cat([gathered[n * rows : n * rows + size] for n, size in enumerate(sizes)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """Sum over ranks; returns this rank's rows. gloo has no reduce_scatter: reduce everywhere and cut."""
    import torch

    assert dim == 0
    summed = input_.contiguous().clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    if sizes is None:
        sizes = [summed.shape[0] // self.world_size] * self.world_size
    start = sum(sizes[: self.rank_in_group])
    return summed[start : start + sizes[self.rank_in_group]].contiguous()


def _fork_all_children() -> None:
    """vLLM's CPU platform asks for fresh interpreters, which would import everything again: fork instead."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def main() -> None:
    for name in PREIMPORTED:
        importlib.import_module(name)
    register()
    _fork_all_children()
    print(READY, flush=True)
    if not sys.stdin.readline():
        return  # who started this has ended
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
