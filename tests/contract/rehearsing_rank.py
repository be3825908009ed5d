"""A rank that vLLM builds on CPU, alone, and that rehearses the groups to come: `python -m ... MODEL SCRATCH_DIR`.

Prints one JSON object: the steps as [members, tokens of all of them, expert slots of the group], and whether it is as
it was before.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm.v1.engine.core import EngineCore

from elastic_daemon.engine.configure import configure, for_rank
from elastic_daemon.engine.plan import LocalExecutor, RankPlan
from elastic_daemon.engine.worker import executor_worker

RANKS, SURVIVE_LOSSES = 4, 2
FLAGS = ("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "256")


def main(model: str, scratch_dir: str) -> None:
    deployment = configure(["--model", model, *FLAGS], RANKS, SURVIVE_LOSSES, "cpu")
    plan = RankPlan(RANKS - 1, tuple(range(RANKS)), deployment.slots, scratch_dir)
    core = EngineCore(for_rank(deployment.config, plan), LocalExecutor, log_stats=False)
    executor: Any = core.model_executor
    worker = executor_worker(executor)
    steps: list[list[int]] = []
    communicator = worker.groups.ep.device_communicator
    stock_dummy_run, stock_dispatch = worker.model_runner._dummy_run, communicator.dispatch

    def dummy_run(tokens: int, **rest: Any) -> Any:
        (state,) = worker.model_runner.eplb_state.model_states.values()
        steps.append([worker.groups.ep.world_size, 0, state.physical_to_logical_map.shape[1]])
        return stock_dummy_run(tokens, **rest)

    def dispatch(*tensors: Any, **rest: Any) -> Any:
        dispatched = stock_dispatch(*tensors, **rest)
        steps[-1][1] = len(dispatched[0])
        return dispatched

    worker.model_runner._dummy_run, communicator.dispatch = dummy_run, dispatch
    before = _state(worker)
    worker.rehearse()
    print(json.dumps({"slots": deployment.slots, "steps": steps, "unchanged": _state(worker) == before}))


def _state(worker: Any) -> list[Any]:
    parallel, group = worker.parallel_config, worker.groups.ep
    weights = [float(part.float().sum()) for layer in worker.model_runner._moe_model.expert_weights for part in layer]
    return [
        [parallel.data_parallel_size, parallel.data_parallel_rank, group.world_size, group.rank_in_group],
        worker.column().tolist(),
        weights,
        [runner.moe_config.num_experts for runner in worker.model_runner._moe_model.moe_layers],
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
