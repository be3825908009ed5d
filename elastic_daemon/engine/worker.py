"""The worker side of a rank on CPU: built alone, joined to a group by a regroup, parted from it by a fence."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_pcp_group, get_tp_group
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from elastic_daemon.engine.cpu import enable_expert_parallelism
from elastic_daemon.engine.eplb import ElasticEplbState
from elastic_daemon.engine.experts import ExpertSlots, column_slots, loading_into, moe_model, routed_layers
from elastic_daemon.engine.faults import transfer_fault
from elastic_daemon.engine.gloo import GlooGroup
from elastic_daemon.engine.groups import EpochGroups
from elastic_daemon.engine.resume import enable_resume
from elastic_daemon.placement import IntArray, Placement, initial

ELASTIC_CONFIG = "elastic"
"""Key of `RankPlan` in vLLM's `additional_config`."""


@dataclass(frozen=True)
class RankPlan:
    """What a rank is told before it exists: where it will be, and which expert slots it fills at its start."""

    rank: int
    members: tuple[int, ...]
    slots: int
    scratch_dir: str

    @property
    def position(self) -> int:
        return self.members.index(self.rank)


def rank_plan(config: VllmConfig) -> RankPlan:
    plan = config.additional_config[ELASTIC_CONFIG]
    assert isinstance(plan, RankPlan)
    return plan


class LocalExecutor(UniProcExecutor):
    """Core and worker in one process. The rank's own torch group meets in a file: nothing listens on TCP."""

    def _distributed_args(self) -> tuple[str, int, int]:
        path = Path(rank_plan(self.vllm_config).scratch_dir, f"torch-{os.getpid()}")
        return f"file://{path}", 0, 0


class ElasticCPUModelRunner(CPUModelRunner):
    """Model runner whose expert placement and group size change while it lives."""

    eplb_state: ElasticEplbState
    expert_slots: ExpertSlots

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the model with the experts of this rank's planned column, and set up load balancing over it."""
        plan = rank_plan(self.vllm_config)
        loader = get_model_loader(self.vllm_config.load_config)
        stock_load_weights = loader.load_weights

        def load_weights(model: torch.nn.Module, model_config: Any) -> None:
            layers = routed_layers(model)
            moe = moe_model(model)
            placed = initial(moe.num_logical_experts, len(layers), plan.members, plan.slots)
            self.initial_placement = placed
            with loading_into(layers, column_slots(placed.columns[plan.rank])):
                stock_load_weights(model, model_config)

        loader.load_weights = load_weights
        self.model = loader.load_model(vllm_config=self.vllm_config, model_config=self.model_config)
        self._moe_model = moe_model(self.model)
        self.expert_slots = ExpertSlots(self.model, self.model_config, self.vllm_config.load_config)
        self.eplb_state = ElasticEplbState(self.parallel_config, self.device)
        self.eplb_state.on_transfer = transfer_fault(plan.rank)
        self.eplb_state.adopt(self.model_config, self._moe_model, self.initial_placement.physical_to_logical())

    def forget_requests(self) -> None:
        """Drop all state of requests and of a step cut short. The scheduler admits all anew after a regroup."""
        self.execute_model_state = None
        for runner in self._moe_model.moe_layers:
            if runner.shared_experts is not None:  # computed before the dispatch that failed, and never fetched
                runner.shared_experts._output = [None] * len(runner.shared_experts._output)
        gone = SchedulerOutput.make_empty()
        gone.finished_req_ids = set(self.requests)
        self._update_states(gone)


class ElasticCPUWorker(CPUWorker):
    """vLLM's CPU worker with groups that belong to an epoch."""

    model_runner: ElasticCPUModelRunner

    def init_device(self) -> None:
        enable_expert_parallelism()
        enable_resume()
        self.device = torch.device("cpu")
        os.environ["VLLM_DIST_IDENT"] = f"elastic-{os.getpid()}"
        with _alone(self.parallel_config):
            init_worker_distributed_environment(
                self.vllm_config,
                self.rank,
                self.distributed_init_method,
                self.local_rank,
                current_platform.dist_backend,
            )
        plan = rank_plan(self.vllm_config)
        self.groups = EpochGroups.install(plan.position, len(plan.members))
        set_random_seed(self.model_config.seed)
        self.model_runner = ElasticCPUModelRunner(self.vllm_config, self.device)

    def column(self) -> IntArray:
        """Expert ids that this rank's slots hold now, [layers, slots]."""
        plan = rank_plan(self.vllm_config)
        return self.model_runner.eplb_state.column(self.groups.dp.rank_in_group, plan.slots)

    def leave_group(self) -> None:
        """After a fence: drop the broken group and all state of the step that it broke."""
        self.groups.release()
        self.model_runner.forget_requests()

    def join_group(self, group: GlooGroup, placement: Placement) -> None:
        """Adopt the group, size, rank and expert tables of a new epoch. Loads must be done before."""
        self.groups.bind(group)
        _set_data_parallel(self.parallel_config, group.process_group.size(), group.process_group.rank())
        with set_current_vllm_config(self.vllm_config):
            self._reconfigure_layers(placement)
            runner = self.model_runner
            runner.eplb_state.adopt(runner.model_config, runner._moe_model, placement.physical_to_logical())

    def _reconfigure_layers(self, placement: Placement) -> None:
        moe = self.model_runner._moe_model
        physical = placement.slots_per_rank * len(placement.ranks)
        self.parallel_config.eplb_config.num_redundant_experts = physical - moe.num_logical_experts
        for runner in moe.moe_layers:
            config = replace(
                runner.moe_config,
                num_experts=physical,
                moe_parallel_config=replace(self._moe_parallel_config(), use_ep=True),
            )
            config.hidden_dim = runner.moe_config.hidden_dim
            config.intermediate_size_per_partition = runner.moe_config.intermediate_size_per_partition
            runner._set_moe_config(config)
            maps = runner.routed_experts.expert_map_manager
            if maps._expert_map is None:  # a group of one has none, and vLLM's update wants one to start from
                maps._expert_map = torch.empty(0, dtype=torch.int32)
        moe.update_physical_experts_metadata(physical, placement.slots_per_rank)

    def _moe_parallel_config(self) -> FusedMoEParallelConfig:
        return FusedMoEParallelConfig.make(
            tp_size_=get_tp_group().world_size,
            pcp_size_=get_pcp_group().world_size,
            dp_size_=self.parallel_config.data_parallel_size,
            sp_size_=1,
            vllm_parallel_config=self.parallel_config,
        )


def _set_data_parallel(config: ParallelConfig, size: int, rank: int) -> None:
    config.data_parallel_size = size
    config.data_parallel_rank = rank
    config.data_parallel_index = rank


@contextlib.contextmanager
def _alone(config: ParallelConfig) -> Iterator[None]:
    """Let vLLM build its default groups for this rank only: one that spans ranks would be unusable after a death."""
    size, rank, index = config.data_parallel_size, config.data_parallel_rank, config.data_parallel_index
    _set_data_parallel(config, 1, 0)
    try:
        yield
    finally:
        _set_data_parallel(config, size, rank)
        config.data_parallel_index = index


def executor_worker(executor: UniProcExecutor) -> ElasticCPUWorker:
    """The worker object behind an executor that shares the process with the engine core."""
    worker = executor.driver_worker.worker
    assert isinstance(worker, ElasticCPUWorker)
    return worker
