"""A rank rehearses the groups to come with vLLM's own model runner, and is as before afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

from elastic_daemon.config import BUNDLED_MODEL
from elastic_daemon.engine.rehearsal import ALIGNED, TOKENS, step_tokens

LIMIT_S = 180
CHOSEN = 2
"""Experts of a token of the bundled model."""


def test_a_rank_steps_as_in_smaller_groups_and_is_as_before(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.contract.rehearsing_rank", str(BUNDLED_MODEL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    expected = [
        [members, tokens, members * found["slots"]]
        for members in (4, 3, 2)
        for tokens in step_tokens(members, 256, members * found["slots"], CHOSEN)
    ]
    assert found["steps"] == expected
    assert found["unchanged"]


@pytest.mark.parametrize(
    ("members", "slots", "chosen"), [(4, 8, 2), (4, 6, 2), (4, 44, 8), (8, 36, 8), (16, 18, 8), (6, 10, 4)]
)
@pytest.mark.parametrize("quantized", [{"dtype": None}, {"dtype": "fp8_w8a8", "block_shape": [128, 128]}])
def test_no_step_after_a_loss_needs_a_kernel_for_the_first_time(
    members: int, slots: int, chosen: int, quantized: dict[str, Any]
) -> None:
    """Of whatever number of tokens, with vLLM's defaults, where it has no tuned table for the device."""
    sizes = (members, members - 1, members - 2)
    rehearsed = {
        kernel
        for size in sizes
        for tokens in step_tokens(size, TOKENS[-1], size * slots, chosen)
        for kernel in kernels(tokens, size * slots, chosen, quantized)
    }
    for size in sizes[1:]:
        for tokens in range(size, TOKENS[-1] + 1):
            needed = set(kernels(tokens, size * slots, chosen, quantized))
            assert needed <= rehearsed, f"{size} ranks with {tokens} tokens in all"


def kernels(tokens: int, experts: int, chosen: int, quantized: dict[str, Any]) -> list[tuple[object, ...]]:
    """What the two products of an expert layer are compiled for, as in vLLM's `invoke_fused_moe_triton_kernel`."""
    config = get_default_config(tokens, experts, N=64, K=128, topk=chosen, **quantized)
    block, rows = config["BLOCK_SIZE_M"], tokens * chosen
    padded = rows + experts * (block - 1)
    if rows < experts:
        padded = min(rows * block, padded)
    found: list[tuple[object, ...]] = []
    for given, each in ((tokens, chosen), (rows, 1)):
        launched = min(padded, given * each * block) if given < block else padded
        found.append((each > 1, *config.items(), rows % ALIGNED == 0, launched % ALIGNED == 0))
    return found
