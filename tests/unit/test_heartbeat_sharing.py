"""Ranks that share a GPU are not compared, from the pages and bindings to what the watchdog says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from watchdog.bindings import Binding, Bindings
from watchdog.heartbeat.layout import Granularity
from watchdog.heartbeat.page import HeartbeatWriter
from watchdog.heartbeats import Heartbeats
from watchdog.verdict import RankView


class Told:
    def __init__(self) -> None:
        self.views: dict[int, RankView] = {}
        self.slow: set[int] = set()

    def see_rank(self, binding: Binding, signal: str, holds: bool, now: float, **detail: Any) -> None:
        if signal == "straggler" and holds:
            self.slow.add(binding.rank)


@pytest.mark.parametrize(
    ("gpus", "slow"),
    [
        (("GPU-a", "GPU-b", "GPU-c"), {1}),
        ((None, None, None), {1}),
        (("GPU-a", "GPU-b", "GPU-b"), set()),
        (("GPU-a", "GPU-a", "GPU-b"), set()),
    ],
)
def test_who_is_told_of(tmp_path: Path, gpus: tuple[str | None, ...], slow: set[int]) -> None:
    writers = [HeartbeatWriter(tmp_path, rank, 10 + rank, lambda _: Granularity.DEVICE) for rank in range(3)]
    bindings = Bindings(
        1, tuple(Binding(rank, 10 + rank, gpu, (), writers[rank].path) for rank, gpu in enumerate(gpus))
    )
    heartbeats, told = Heartbeats(), Told()
    for writer in writers:
        writer.begin_epoch(1)
    for tick in range(150):
        for rank, writer in enumerate(writers):
            writer.add_times(4_000_000 if rank == 1 else 1_000_000, 0, 0, 4)
        heartbeats.observe(bindings, told, 100.0 + tick / 10)
    assert told.slow == slow
    heartbeats.close()
    for writer in writers:
        writer.close()
