"""The worker side of a rank: built alone, joined to a group by a regroup, parted from it by a fence.

What is the same on every device; `cpu_worker` and `gpu_worker` derive from it and from vLLM's worker.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import structlog
import torch
from torch.distributed import Store
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_pcp_group, get_tp_group
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models.interfaces import MixtureOfExperts
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from elastic_daemon.engine.eplb import ElasticEplbState
from elastic_daemon.engine.experts import (
    ExpertSlots,
    SlotContent,
    column_slots,
    loading_into,
    moe_model,
    routed_layers,
)
from elastic_daemon.engine.faults import transfer_fault
from elastic_daemon.engine.graph_outputs import GraphOutputs
from elastic_daemon.engine.groups import EpochConnections, EpochGroups
from elastic_daemon.engine.heartbeat import Page
from elastic_daemon.engine.plan import rank_plan
from elastic_daemon.engine.rehearsal import group_sizes, step_tokens
from elastic_daemon.engine.stream_counters import StreamCounters
from elastic_daemon.placement import IntArray, Placement, initial

log = structlog.get_logger(__name__)


class ElasticModelRunner:
    """What a model runner of vLLM is given so that expert placement and group size can change while it lives."""

    vllm_config: VllmConfig
    parallel_config: ParallelConfig
    model_config: Any
    device: torch.device
    eplb_state: ElasticEplbState
    expert_slots: ExpertSlots
    _moe_model: MixtureOfExperts

    def load_elastic_model(self) -> torch.nn.Module:
        """The model with the experts of this rank's planned column."""
        plan = rank_plan(self.vllm_config)
        loader = get_model_loader(self.vllm_config.load_config)
        stock_load_weights = loader.load_weights

        def load_weights(model: torch.nn.Module, model_config: Any) -> None:
            layers = routed_layers(model)
            self._placed = initial(moe_model(model).num_logical_experts, len(layers), plan.members, plan.slots)
            with loading_into(layers, column_slots(self._placed.columns[plan.rank])):
                stock_load_weights(model, model_config)

        loader.load_weights = load_weights
        model: torch.nn.Module = loader.load_model(vllm_config=self.vllm_config, model_config=self.model_config)
        return model

    def balance(self, model: torch.nn.Module) -> None:
        """Set up expert slots and load balancing over a loaded model."""
        self._moe_model = moe_model(model)
        if largest_graph := self.vllm_config.compilation_config.max_cudagraph_capture_size:
            outputs = GraphOutputs(largest_graph)
            for number, layer in enumerate(self._moe_model.moe_layers):
                outputs.keep_of(number, layer)
        self.expert_slots = ExpertSlots(model, self.model_config, self.vllm_config.load_config)
        self.eplb_state = ElasticEplbState(self.parallel_config, self.device)
        self.eplb_state.on_transfer = transfer_fault(rank_plan(self.vllm_config).rank)
        self.eplb_state.adopt(self.model_config, self._moe_model, self._placed.physical_to_logical())

    def forget_requests(self) -> None:
        """Drop all state of requests and of a step cut short. The scheduler admits all anew after a regroup."""
        for runner in self._moe_model.moe_layers:
            if runner.shared_experts is not None:  # computed before the dispatch that failed, and never fetched
                runner.shared_experts._output = [None] * len(runner.shared_experts._output)
        self._forget_requests()

    def _forget_requests(self) -> None:
        """What depends on the generation of vLLM's model runner."""
        raise NotImplementedError


class ElasticWorker:
    """What a worker of vLLM is given so that its groups belong to an epoch."""

    vllm_config: VllmConfig
    parallel_config: ParallelConfig
    model_runner: Any
    groups: EpochGroups
    counters: StreamCounters | None = None
    """Counts collectives on a device, where there is one."""

    def install_groups(self, device: torch.device) -> None:
        """Replace vLLM's groups of this rank alone by ones that an epoch can bind."""
        plan = rank_plan(self.vllm_config)
        set_data_parallel(self.parallel_config, len(plan.members), plan.position)
        self.groups = EpochGroups.install(plan.position, len(plan.members), device)
        self.groups.ep.experts = plan.slots * len(plan.members)

    def rehearse(self) -> None:
        """Run the model alone for this group and those after a loss or two. Experts stay where they are, so that what
        comes out is of no use. Needs the KV cache, and no connections; all is as before afterwards."""
        started = time.monotonic()
        plan, runner = rank_plan(self.vllm_config), self.model_runner
        experts, layers = runner._moe_model.num_logical_experts, len(runner._moe_model.moe_layers)
        chosen = runner._moe_model.moe_layers[0].moe_config.experts_per_token
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        sizes = group_sizes(len(plan.members), math.ceil(experts / plan.slots))
        for members in sizes:
            position = min(plan.position, members - 1)
            with self.groups.rehearsal(position, members):
                self.adopt_group(initial(experts, layers, range(members), plan.slots))
                for tokens in step_tokens(members, most, members * plan.slots, chosen):
                    own = math.ceil(tokens / members)
                    with self.groups.rehearsal(position, members, missing=own * members - tokens):
                        runner._dummy_run(own, skip_eplb=True)
        self.adopt_group(runner._placed)
        log.info("groups_rehearsed", rank=plan.rank, sizes=sizes, seconds=round(time.monotonic() - started, 3))

    def connect(
        self, store: Store, prefix: str, position: int, members: int, is_void: Callable[[], bool], page: Page
    ) -> EpochConnections:
        """Meet the other members of an epoch, while it is not void. `page`: this rank's heartbeat. Raises PeerLost."""
        raise NotImplementedError

    def column(self) -> IntArray:
        """Expert ids that this rank's slots hold now, [layers, slots]."""
        plan = rank_plan(self.vllm_config)
        state: ElasticEplbState = self.model_runner.eplb_state
        return state.column(self.groups.dp.rank_in_group, plan.slots)

    def loaded(self, contents: Iterable[SlotContent]) -> None:
        """Slots have been filled, outside a group."""
        state: ElasticEplbState = self.model_runner.eplb_state
        state.loaded(self.groups.dp.rank_in_group, rank_plan(self.vllm_config).slots, contents)

    def leave_group(self) -> None:
        """After a fence: drop the broken connections and all state of the step that they broke."""
        self.groups.release()
        self.model_runner.forget_requests()

    def join_group(self, connections: EpochConnections, placement: Placement) -> None:
        """Adopt the group, size, rank and expert tables of a new epoch. Loads must be done before."""
        self.groups.bind(connections)
        self.adopt_group(placement)

    def adopt_group(self, placement: Placement) -> None:
        """Give layers and tables the size and rank of the group that is bound now, and `placement`."""
        set_data_parallel(self.parallel_config, self.groups.dp.world_size, self.groups.dp.rank_in_group)
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
                maps._expert_map = torch.empty(0, dtype=torch.int32, device=self.model_runner.device)
        moe.update_physical_experts_metadata(physical, placement.slots_per_rank)
        self.groups.ep.experts = physical

    def _moe_parallel_config(self) -> FusedMoEParallelConfig:
        return FusedMoEParallelConfig.make(
            tp_size_=get_tp_group().world_size,
            pcp_size_=get_pcp_group().world_size,
            dp_size_=self.parallel_config.data_parallel_size,
            sp_size_=1,
            vllm_parallel_config=self.parallel_config,
        )


def set_data_parallel(config: ParallelConfig, size: int, rank: int) -> None:
    config.data_parallel_size = size
    config.data_parallel_rank = rank
    config.data_parallel_index = rank


@contextlib.contextmanager
def alone(config: ParallelConfig) -> Iterator[None]:
    """Let vLLM build its default groups for this rank only: one that spans ranks would be unusable after a death."""
    size, rank, index = config.data_parallel_size, config.data_parallel_rank, config.data_parallel_index
    set_data_parallel(config, 1, 0)
    try:
        yield
    finally:
        set_data_parallel(config, size, rank)
        config.data_parallel_index = index


def executor_worker(executor: UniProcExecutor) -> ElasticWorker:
    """The worker object behind an executor that shares the process with the engine core."""
    worker = executor.driver_worker.worker
    assert isinstance(worker, ElasticWorker)
    return worker
