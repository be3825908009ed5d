"""Sampling without compilation inside a step.

vLLM compiles a small function of model runner V1 when a request first asks for logprobs. With a cold cache that takes
seconds, within a step that all peers wait for: the watchdog would take them for hung, and a fence would not be
answered. It runs as it is written instead.
"""

from __future__ import annotations

import inspect

from vllm.v1.sample import sampler


def enable_sampling_without_compilation() -> None:
    """Replace it in this process. Idempotent."""
    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)
