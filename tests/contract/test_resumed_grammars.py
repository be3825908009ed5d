"""A grammar goes on where it was, in vLLM's real schedulers and with its real grammars, without a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.utils import choice_as_grammar

from elastic_daemon.config import BUNDLED_MODEL
from elastic_daemon.engine.resume import restore_output, resuming_params
from elastic_daemon.engine.scheduler import ElasticAsyncScheduler, ElasticScheduler

pytestmark = pytest.mark.contract

BLOCK = 16
PROMPT = list(range(20, 20 + 2 * BLOCK))
GRAMMAR = {"regex": "([0-9]{3};){40}"}
SCHEMA = {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 9}}
CHOICE = {"choice": ["abcabd", "abcdab"]}
SHORT = {"regex": "[0-9]{2}"}

CASES = [
    ("xgrammar", GRAMMAR, "123;456"),
    ("xgrammar", GRAMMAR, "123;4"),
    ("xgrammar", SCHEMA, "[1,23,4"),
    ("xgrammar", {"grammar": choice_as_grammar(CHOICE["choice"])}, "abc"),  # as vLLM's front end hands it on
    ("xgrammar", SHORT, "12<eos>ab"),
    ("outlines", GRAMMAR, "123;4"),
    ("outlines", SCHEMA, "[1,23,4"),
    ("outlines", CHOICE, "abc"),
    ("outlines", SHORT, "12<eos>ab"),
]
"""Of the other backends, one does not know the bundled model's tokenizer, and one does not know this vLLM."""

KINDS = [ElasticScheduler, ElasticAsyncScheduler]


class Bench:
    """A scheduler, and the requests that are put into it."""

    def __init__(self, config: VllmConfig, kind: type[ElasticScheduler], backend: str = "xgrammar") -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config.cache_config.num_gpu_blocks = 64
        self.manager = StructuredOutputManager(config)
        cache = KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = kind(config, cache, self.manager, BLOCK)
        self._backend = backend

    def tokens(self, text: str) -> list[int]:
        return list(self.manager.tokenizer.encode(text, add_special_tokens=False))

    def admit(self, grammar: dict[str, Any], output: Sequence[int] = (), name: str = "request") -> Request:
        """As the engine core does, and wait for the grammar."""
        wanted = StructuredOutputsParams(**grammar)
        wanted._backend = self._backend
        params = SamplingParams(max_tokens=64, ignore_eos=True, structured_outputs=wanted)
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(
            name, PROMPT, resuming_params(params, output) if output else params, None, block_hasher=hasher
        )
        self.manager.grammar_init(request)
        restore_output(request)
        self.scheduler.add_request(request)
        assert request.structured_output_request is not None
        while not request.structured_output_request.is_grammar_ready:
            time.sleep(0.001)
        return request

    def step(self, token: int | None = None) -> tuple[SchedulerOutput, Any]:
        """One step of all requests, which is completed with a token for each unless there is none."""
        planned = self.scheduler.schedule()
        if token is None:
            return planned, None
        names = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, [[token] for _ in names])
        return planned, self.scheduler.update_from_output(planned, output)

    def lived(self, grammar: dict[str, Any], output: Sequence[int]) -> Request:
        """A request that has got this output here, token by token."""
        request = self.admit(grammar, name="lived")
        for token in output:
            self.step(token)
        assert list(request.output_token_ids) == list(output)
        return request

    def mask(self, request: Request) -> list[int]:
        """What the next token of a request may be, as bits."""
        found = self.manager.grammar_bitmask({request.request_id: request}, [request.request_id], {})
        assert found is not None
        return [int(word) for word in np.asarray(found)[0]]

    def allows(self, request: Request) -> str:
        words = self.mask(request)
        vocabulary = self.manager.tokenizer.get_vocab()
        return "".join(sorted(token for token, n in vocabulary.items() if words[n // 32] >> (n % 32) & 1))


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    init_none_hash(sha256)
    arguments = EngineArgs(str(BUNDLED_MODEL), block_size=BLOCK, max_model_len=512, enforce_eager=True)
    return arguments.create_engine_config()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "grammar", "text"), CASES)
def test_it_allows_what_it_would_have_allowed(
    config: VllmConfig, kind: type[ElasticScheduler], backend: str, grammar: dict[str, Any], text: str
) -> None:
    bench = Bench(config, kind, backend)
    output = bench.tokens(text)
    lived = bench.lived(grammar, output)
    resumed = bench.admit(grammar, output, "resumed")
    assert resumed.num_output_tokens == 0, "it waits for its grammar"
    planned, _ = bench.step()
    assert "resumed" in planned.num_scheduled_tokens
    assert list(resumed.output_token_ids) == output
    assert (resumed.num_preemptions, resumed.prefill_stats) == (1, None)
    assert bench.mask(resumed) == bench.mask(lived)


def test_the_mask_tells_where_it_is(config: VllmConfig) -> None:
    bench = Bench(config, ElasticScheduler)
    request = bench.admit(GRAMMAR, bench.tokens("123;456"))
    bench.step()
    assert bench.allows(request) == ";"


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_starts_over_is_not_fed_again(config: VllmConfig, kind: type[ElasticScheduler]) -> None:
    bench = Bench(config, kind)
    request = bench.admit(GRAMMAR, bench.tokens("12"))
    bench.step(bench.tokens("3")[0])
    for _ in range(2):
        bench.step()
        bench.scheduler.void_steps()
    planned, _ = bench.step()
    assert [one.req_id for one in planned.scheduled_new_reqs] == ["request"]
    assert list(request.output_token_ids) == bench.tokens("123")
    assert bench.allows(request) == ";"


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_starts_over_while_its_grammar_is_compiled(
    config: VllmConfig, kind: type[ElasticScheduler]
) -> None:
    bench = Bench(config, kind)
    request = bench.admit(GRAMMAR, bench.tokens("123"))
    wanted = request.structured_output_request
    assert wanted is not None
    compiled, compiling = wanted.grammar, Future[Any]()
    wanted.grammar = compiling
    assert not bench.step()[0].num_scheduled_tokens
    bench.scheduler.void_steps()
    assert not bench.step()[0].num_scheduled_tokens
    compiling.set_result(compiled)
    assert bench.step()[0].num_scheduled_tokens
    assert list(request.output_token_ids) == bench.tokens("123")
    assert bench.allows(request) == ";"


@pytest.mark.parametrize("kind", KINDS)
def test_output_that_the_grammar_rejects_ends_the_request(config: VllmConfig, kind: type[ElasticScheduler]) -> None:
    bench = Bench(config, kind)
    other = bench.admit(GRAMMAR, name="other")
    request = bench.admit(GRAMMAR, bench.tokens("12a4"))
    with capture_logs() as logs:
        bench.step()  # another may be planned before the output of the first is there
        if kind is ElasticScheduler:
            bench.scheduler.void_steps()
        _, outputs = bench.step(bench.tokens("5")[0])
    told = {"event": "grammar_rejects_output", "log_level": "error", "request": "request", "accepted": 2}
    assert logs == [told], "it is tried once"
    ended = [one for one in outputs[0].outputs if one.finish_reason is not None]
    assert [(one.request_id, one.finish_reason) for one in ended] == [("request", FinishReason.ERROR)]
    assert request.status == RequestStatus.FINISHED_ERROR
    assert list(bench.scheduler.requests) == ["other"]
    assert list(other.output_token_ids) == bench.tokens("5")


class Reasoner:
    """Ends its section with the first `~`."""

    def __init__(self, tokenizer: Any, **_: Any) -> None:
        (self._end,) = tokenizer.encode("~", add_special_tokens=False)

    def is_reasoning_end(self, token_ids: Sequence[int]) -> bool:
        return self._end in token_ids

    def is_reasoning_end_streaming(self, token_ids: Sequence[int], delta: Sequence[int]) -> bool:
        return self.is_reasoning_end(token_ids)


@pytest.mark.parametrize(("text", "ended"), [("abc", False), ("abc~", True), ("abc~123;4", True)])
def test_reasoning_is_no_part_of_it(config: VllmConfig, text: str, ended: bool) -> None:
    bench = Bench(config, ElasticScheduler)
    bench.manager.reasoner_cls = Reasoner
    output = bench.tokens(text)
    lived = bench.lived(GRAMMAR, output)
    resumed = bench.admit(GRAMMAR, output, "resumed")
    bench.step()
    assert bench.mask(resumed) == bench.mask(lived)
    assert (len(bench.allows(resumed)) == 10) is ended
