"""What `elastic-watchdog status` prints of ranks and of children that are stuck."""

from __future__ import annotations

from typing import Any

import pytest

from watchdog.status import render

STATUS: dict[str, Any] = {
    "age_s": 0.0, "pid": 1, "mode": "act", "epoch": 1, "gpus": [],
    "driver": {"version": "1", "trouble": "", "stuck": {}}, "daemon": {"reachable": True},
}  # fmt: skip
RANK: dict[str, Any] = {
    "rank": 2, "incarnation": 12, "finding": "hung", "phase": "decode", "step": 7, "silent_s": 1.5,
    "verdict": "restart-rank", "reason": "it stands still", "held": None, "nccl_error": None,
}  # fmt: skip


def test_every_child_that_is_stuck() -> None:
    driver = {"version": "1", "trouble": "", "stuck": {"GPU-a": [7, 9], "poll": [8]}}
    assert [line.strip() for line in render({**STATUS, "ranks": [], "driver": driver}).splitlines()[2:5]] == [
        "process 7 is stuck in the kernel (GPU-a)",
        "process 9 is stuck in the kernel (GPU-a)",
        "process 8 is stuck in the kernel (poll)",
    ]


@pytest.mark.parametrize(
    ("rank", "end"),
    [
        ({}, "restart-rank: it stands still"),
        ({"held": "observe mode"}, "restart-rank: it stands still [held: observe mode]"),
        ({"nccl_error": "remote error"}, "restart-rank: it stands still [its NCCL: remote error]"),
    ],
)
def test_a_rank_and_what_keeps_it(rank: dict[str, Any], end: str) -> None:
    line = render({**STATUS, "ranks": [{**RANK, **rank}]}).splitlines()[-1]
    assert line.split() == ["2", "12", "hung", "decode", "7", "1.5", "s", *end.split()]
