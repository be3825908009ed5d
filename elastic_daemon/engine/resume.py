"""The boundary between prompt and output of a request that goes on elsewhere.

A request whose rank died is admitted on a survivor with the tokens that its client already has *as output*, as after a
preemption. Sent again as prompt they would restart penalties, grammars, seeds and token budgets.

The tokens travel in `SamplingParams.extra_args`, a public passage that reaches the scheduler and every worker
unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import CachedRequestState

RESUME_KEY = "elastic_output_token_ids"


def resuming_params(params: SamplingParams, output_token_ids: Sequence[int]) -> SamplingParams:
    """A copy of `params` that admits its request with `output_token_ids` already generated."""
    resumed = params.clone()
    resumed.extra_args = {**(params.extra_args or {}), RESUME_KEY: list(output_token_ids)}
    return resumed


def disown_output(params: SamplingParams | None) -> None:
    """Of a request as its client sends it: `extra_args` are the client's to set, output is not."""
    if params is not None and params.extra_args:
        params.extra_args.pop(RESUME_KEY, None)


def resumed_output(params: SamplingParams | None) -> list[int]:
    """The output tokens a request is admitted with; empty for a fresh one."""
    extra: dict[str, Any] = (params.extra_args if params is not None else None) or {}
    return list(extra.get(RESUME_KEY, ()))


def restore_output(request: Request) -> None:
    """Give a scheduler request the output tokens it was admitted with, as if it had been preempted after them.

    One with a grammar gets them later, see `restore_with_grammar`.
    """
    output = resumed_output(request.sampling_params)
    if output and not request.use_structured_output:
        _count_as_preempted(request)
        request.append_output_token_ids(output)


def restore_with_grammar(request: Request, manager: StructuredOutputManager) -> bool:
    """The same for a request whose grammar has just been compiled. Returns whether the grammar takes the tokens.

    It is fed with them as it was when they came, one by one and each after it became output: what ends a reasoning
    section, and what comes after the end of a grammar, depends on that.
    """
    output = resumed_output(request.sampling_params)
    if output:
        _count_as_preempted(request)
    for token in output:
        request.append_output_token_ids(token)
        if not manager.accept_tokens(request, [token]):
            return False
    return True


def _count_as_preempted(request: Request) -> None:
    """Its prefill has been counted where it ran first, and the prefix cache may hold more of it than its prompt: vLLM
    takes that for a defect in a request that was never preempted."""
    request.num_preemptions += 1
    request.prefill_stats = None


def remember_output(request: Request) -> None:
    """Let a request that has to start over in its own worker keep what it generated so far."""
    if request.sampling_params is not None and request.num_output_tokens:
        request.sampling_params = resuming_params(request.sampling_params, request.output_token_ids)


class ResumableRequestState(CachedRequestState):
    """Worker-side request state (model runner V1) that starts with the output tokens of its request.

    Without them the runner would not know the input ids beyond the prompt. Model runner V2 takes all token ids from the
    scheduler and needs nothing.
    """

    output_token_ids: list[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_token_ids:
            self.output_token_ids = resumed_output(self.sampling_params)


def enable_resume() -> None:
    """Make model runner V1 build `ResumableRequestState`. Idempotent."""
    gpu_model_runner.CachedRequestState = ResumableRequestState
