"""What a rank is told before it exists, and how core and worker of a rank share one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor


@dataclass(frozen=True)
class RankPlan:
    """Where a rank will be, and which expert slots it fills at its start.

    `gpu`: index of its device among those that its process sees, 0 on CPU.

    It travels as vLLM's `additional_config`.
    """

    rank: int
    members: tuple[int, ...]
    slots: int
    scratch_dir: str
    gpu: int = 0

    @property
    def position(self) -> int:
        return self.members.index(self.rank)

    def compute_hash(self) -> str:
        """For vLLM's cache of compiled code, which ranks share: nothing that is compiled depends on the plan."""
        return "elastic"


def rank_plan(config: VllmConfig) -> RankPlan:
    plan = config.additional_config
    assert isinstance(plan, RankPlan)
    return plan


class LocalExecutor(UniProcExecutor):
    """Core and worker in one process. The rank's own torch group meets in a file: nothing listens on TCP.

    `before_step`: called with what a step is to compute, before it does.
    """

    before_step: Callable[[SchedulerOutput], None] | None = None

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        if self.before_step is not None:
            self.before_step(scheduler_output)
        return super().execute_model(scheduler_output, non_block)

    def _distributed_args(self) -> tuple[str, int, int]:
        path = Path(rank_plan(self.vllm_config).scratch_dir, f"torch-{os.getpid()}")
        return f"file://{path}", 0, 0
