"""What becomes of steps in flight when their group ends: vLLM's real schedulers and KV cache, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from elastic_daemon.engine.resume import resumed_output
from elastic_daemon.engine.scheduler import ElasticAsyncScheduler, ElasticScheduler

pytestmark = pytest.mark.contract

MODEL = Path(__file__).parents[2] / "elastic_daemon" / "models" / "tiny_moe"
BLOCK = 16
PROMPT = list(range(100, 100 + 3 * BLOCK + 1))


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    init_none_hash(sha256)
    arguments = EngineArgs(str(MODEL), block_size=BLOCK, max_model_len=512, enforce_eager=True)
    return arguments.create_engine_config()


def make(kind: type[ElasticScheduler], config: VllmConfig) -> ElasticScheduler:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)])
    config.cache_config.num_gpu_blocks = 64
    return kind(config, cache, StructuredOutputManager(config), BLOCK)


def request(name: str) -> Request:
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    return Request(name, PROMPT, params, None, block_hasher=hasher)


def complete(scheduler: ElasticScheduler, step: SchedulerOutput, token: int) -> None:
    """The output of a step comes back: one token for each request."""
    names = list(step.num_scheduled_tokens)
    output = ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, [[token] for _ in names])
    scheduler.update_from_output(step, output)


def cached_tokens(scheduler: ElasticScheduler) -> int:
    """How much of the prompt the cache offers to a request that comes now."""
    _, tokens, *_ = scheduler.kv_cache_manager.get_computed_blocks(request("probe"))
    return int(tokens)


@pytest.mark.parametrize(("kind", "in_flight"), [(ElasticScheduler, 1), (ElasticAsyncScheduler, 2)])
def test_requests_keep_what_came_back_and_nothing_else(
    kind: type[ElasticScheduler], in_flight: int, config: VllmConfig
) -> None:
    scheduler = make(kind, config)
    scheduler.add_request(kept := request("kept"))
    for token in (1, 2):
        complete(scheduler, scheduler.schedule(), token)
    for _ in range(in_flight):
        assert scheduler.schedule().total_num_scheduled_tokens == 1
    assert kept.num_in_flight_tokens == in_flight

    assert scheduler.void_steps() == 1
    assert list(kept.output_token_ids) == [1, 2]
    assert (kept.status, kept.num_computed_tokens) == (RequestStatus.WAITING, 0)
    assert (kept.num_in_flight_tokens, kept.num_output_placeholders, kept.num_stale_output_tokens) == (0, 0, 0)

    again = scheduler.schedule()
    (admitted,) = again.scheduled_new_reqs
    assert resumed_output(admitted.sampling_params) == [1, 2]
    complete(scheduler, again, 3)
    assert list(kept.output_token_ids) == [1, 2, 3]


@pytest.mark.parametrize("kind", [ElasticScheduler, ElasticAsyncScheduler])
def test_the_cache_offers_nothing_of_a_void_prefill(kind: type[ElasticScheduler], config: VllmConfig) -> None:
    scheduler = make(kind, config)
    scheduler.add_request(request("void"))
    scheduler.schedule()
    assert cached_tokens(scheduler) == 3 * BLOCK, "vLLM offers blocks as soon as they are planned"
    scheduler.void_steps()
    assert cached_tokens(scheduler) == 0


@pytest.mark.parametrize("completes", [False, True])
def test_blocks_of_a_request_that_was_aborted_in_flight(completes: bool, config: VllmConfig) -> None:
    scheduler = make(ElasticAsyncScheduler, config)
    scheduler.add_request(request("aborted"))
    prefill = scheduler.schedule()
    scheduler.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    assert cached_tokens(scheduler) == 3 * BLOCK, "given up, and offered all the same"
    if completes:
        complete(scheduler, prefill, 1)
    scheduler.void_steps()
    assert cached_tokens(scheduler) == (3 * BLOCK if completes else 0)


def test_a_request_preempted_in_flight_and_taken_up_again(config: VllmConfig) -> None:
    """More of it is in flight than it counts as computed."""
    scheduler = make(ElasticAsyncScheduler, config)
    scheduler.add_request(kept := request("kept"))
    complete(scheduler, scheduler.schedule(), 1)
    scheduler.schedule()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.schedule()
    assert kept.num_in_flight_tokens > kept.num_computed_tokens
    scheduler.void_steps()
    assert (list(kept.output_token_ids), kept.num_in_flight_tokens) == ([1], 0)
    assert cached_tokens(scheduler) == 0
