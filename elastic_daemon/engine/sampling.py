"""Sampling without compilation inside a step.

vLLM compiles two small functions of model runner V1 when a request first needs them: one that asks for logprobs, or, on
CPU, one that samples without a seed. With a cold cache that takes seconds, within a step that all peers wait for: the
watchdog would take them for hung, and a fence would not be answered. They run as they are written instead.
"""

from __future__ import annotations

import inspect

from vllm.v1.sample import sampler
from vllm.v1.sample.ops import topk_topp_sampler


def enable_sampling_without_compilation() -> None:
    """Replace both in this process. Idempotent."""
    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)
    topk_topp_sampler.compiled_random_sample = inspect.unwrap(topk_topp_sampler.compiled_random_sample)
