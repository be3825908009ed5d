"""Ranks of a real gloo group that hold expert weights, step together, and move experts as an engine core does."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import ParallelConfig
from vllm.distributed import parallel_state
from vllm.distributed.eplb.eplb_state import EplbModelState

from elastic_daemon.engine.background import Background
from elastic_daemon.engine.eplb import ElasticEplbState
from elastic_daemon.engine.groups import EpochTransfers
from elastic_daemon.engine.heartbeat import NoPage, Steps
from elastic_daemon.engine.plan import RankPlan
from elastic_daemon.engine.respread import sync
from elastic_daemon.placement import IntArray, Placement
from elastic_daemon.processes.messages import Message
from tests.contract.group_ranks import GroupRank

EPOCH = 1
PARAMETERS = ((6,), (2, 3))
"""Shapes of one expert's parameters."""


def weights_of(layer: int, expert: int) -> list[torch.Tensor]:
    """No two experts have the same."""
    return [torch.full(shape, float(1000 * layer + 10 * expert + i)) for i, shape in enumerate(PARAMETERS)]


class ServingRank(GroupRank):
    def __init__(self, store: tuple[str, int]) -> None:
        super().__init__(store)
        self._orders: deque[Message] = deque()
        self.sent: list[Message] = []
        self.steps = 0
        self._busy = True
        self._balanced: tuple[int, IntArray] | None = None

    def hold_experts(self, placement: Placement) -> None:
        """Load this rank's column of `placement` and set up balancing over it."""
        self._rank = placement.ranks[self._groups.ep.rank_in_group]
        column = placement.columns[self._rank]
        self._weights = [
            [torch.stack(parts) for parts in zip(*(weights_of(layer, int(e)) for e in row), strict=True)]
            for layer, row in enumerate(column)
        ]
        parallel_state._EP = self._groups.ep
        self._slots = column.shape[1]
        self._eplb = ElasticEplbState(ParallelConfig(), torch.device("cpu"))
        self._eplb.model_states["model"] = self._model_state(placement)
        worker: Any = SimpleNamespace(
            vllm_config=SimpleNamespace(additional_config=RankPlan(self._rank, placement.ranks, self._slots, "")),
            model_runner=SimpleNamespace(eplb_state=self._eplb, expert_slots=None),
            column=self._column,
        )
        send = lambda type_, **rest: self.sent.append({"type": type_, **rest})  # noqa: E731
        self._background = Background(worker, None, Steps(NoPage()), send, lambda: None)
        self._background.begin_epoch(EPOCH)

    def _model_state(self, placement: Placement) -> EplbModelState:
        layers, physical = (table := torch.from_numpy(placement.physical_to_logical())).shape
        model: Any = SimpleNamespace(expert_weights=self._weights, num_moe_layers=layers)
        load = torch.zeros((layers, physical), dtype=torch.int32)
        return EplbModelState(
            physical_to_logical_map=table.clone(),
            physical_to_logical_map_buffer=table,
            logical_to_physical_map=torch.full((layers, placement.experts, physical), -1),
            logical_replica_count=torch.zeros((layers, placement.experts), dtype=torch.int64),
            expert_load_pass=load,
            expert_load_pass_buffer=load,
            expert_load_window=torch.ones((4, layers, physical), dtype=torch.int32),
            last_expert_load=load,
            model_name="",
            model=model,
            expert_buffer=[torch.zeros_like(part) for part in self._weights[0]],
            rebalanced=False,
            eplb_stats=None,
            device_index=None,
            communicator=EpochTransfers(self._groups.ep),
        )

    def _column(self) -> IntArray:
        return self._eplb.column(self._groups.ep.rank_in_group, self._slots)

    def order(self, message: Message) -> None:
        self._orders.append(message)

    def finish_requests(self) -> None:
        self._busy = False

    def balance_in_step(self, step: int, placement: Placement) -> None:
        """In that step balancing comes to `placement`, as on all ranks."""
        self._balanced = (step, placement.physical_to_logical())

    def serve(self) -> int:
        """Step until no rank has a reason to go on, as the busy loop of an engine. Returns the number of steps."""
        while self._step():
            pass
        return self.steps

    def serve_steps(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> bool:
        while self._orders:
            self._background.take(self._orders.popleft())
        self.gather()
        self.steps += 1
        if self._balanced is not None and self._balanced[0] == self.steps:
            assert self._eplb.on_plan is not None
            self._eplb.on_plan(self._balanced[1])
        self._background.advance()
        running = self._background.sync(self._groups.dp.cpu_group, self._busy, False).running
        return running

    def sync_as_vllm(self, unfinished: bool, pausing: bool) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
        """(running, paused) as vLLM finds them, and as we do."""
        group = self._groups.dp.cpu_group
        ours = sync(group, unfinished, pausing, 0)
        return ParallelConfig.sync_dp_state(group, unfinished, pausing), (ours.running, ours.paused)

    def sync_quiescing(self, quiescing: bool) -> tuple[bool, bool]:
        """(running, quiet) of a rank without requests."""
        found = sync(self._groups.dp.cpu_group, False, False, 0, quiescing)
        return found.running, found.quiet

    def state(self) -> dict[str, Any]:
        """What this rank says it holds, whether its weights agree, and what it has sent."""
        column = self._column()
        right = [
            all(torch.equal(part[slot], want) for part, want in zip(layer, weights_of(index, int(e)), strict=True))
            for index, layer in enumerate(self._weights)
            for slot, e in enumerate(column[index])
        ]
        (state,) = self._eplb.model_states.values()
        return {
            "column": column.tolist(),
            "table": state.physical_to_logical_map.tolist(),
            "right": all(right),
            "sent": self.sent,
            "window": int(state.expert_load_window.sum()),
            "postponed": self._eplb.postponed,
            "steps": self.steps,
        }

    def void(self) -> None:
        self._background.void()
