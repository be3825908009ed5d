"""From settings and a model to the policy that the controller starts with."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from elastic_daemon.config import Device, HostExpertCopies, Respread, Restore, Settings
from elastic_daemon.control.policy import Policy
from elastic_daemon.placement import minimum_ranks
from elastic_daemon.processes.launcher import Zygote
from elastic_daemon.state.target_store import load_target, start_target
from elastic_daemon.telemetry.events import EventLog

REGROUP_TIMEOUT_S = {Device.CPU: 3.0, Device.CUDA: 15.0}
"""NCCL connects in a third of a second when it is warm, and in seconds when ranks share a GPU and have just started."""


@dataclass(frozen=True)
class Configured:
    """`model`: its name for clients. `min_ranks`: below them some expert has no slot."""

    model: str
    min_ranks: int
    policy: Policy


async def configure(zygote: Zygote, settings: Settings, events: EventLog) -> Configured:
    """Have vLLM judge flags and model. Raises ElasticError."""
    started = time.monotonic()
    answer = await zygote.ask(
        "configure",
        arguments=settings.vllm_flags,
        ranks=settings.data_parallel_size,
        max_ranks=settings.most_ranks,
        survive_losses=settings.losses_to_survive,
        device=settings.device,
        ranks_per_gpu=settings.ranks_per_gpu,
    )
    experts, slots = answer["experts"], answer["slots"]
    seconds = round(time.monotonic() - started, 2)
    events.record(
        "configured",
        {
            "model": answer["model"],
            "experts": experts,
            "slots_per_rank": slots,
            "ranks": settings.data_parallel_size,
            "seconds": seconds,
        },
    )
    min_ranks = minimum_ranks(experts, slots)
    start = start_target(settings, load_target(settings), min_ranks, settings.most_ranks)
    if start.event is not None:
        events.record(start.event, start.fields)
    policy = Policy(
        target=start.target,
        max_ranks=settings.most_ranks,
        experts=experts,
        slots=slots,
        regroup_timeout_s=REGROUP_TIMEOUT_S[settings.device],
        host_copies=settings.host_expert_copies is HostExpertCopies.AUTO,
    )
    return Configured(answer["model"], min_ranks, with_settings(policy, settings))


def with_settings(policy: Policy, settings: Settings) -> Policy:
    """With what a reload may change as `settings` have it."""
    return replace(
        policy,
        start_timeout_s=settings.start_timeout,
        hold_timeout_s=settings.hold_timeout,
        restore=settings.restore is Restore.AUTO,
        respread=settings.respread is Respread.AUTO,
    )
