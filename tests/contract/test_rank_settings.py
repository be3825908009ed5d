"""The real control thread of a rank, told of new settings."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_daemon.engine.core import ElasticEngineCore

pytestmark = pytest.mark.contract


class Over(Exception):
    """In place of the end of the process."""


def test_a_rank_logs_at_the_level_it_is_told_whatever_it_does_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []

    def messages() -> Iterator[dict[str, Any]]:
        yield {"type": "log_level", "level": "debug"}
        yield {"type": "resume", "epoch": 3}

    def leave(_: int) -> None:
        raise Over

    monkeypatch.setattr("elastic_daemon.engine.core.configure_logging", levels.append)
    monkeypatch.setattr(os, "_exit", leave)
    core: Any = object.__new__(ElasticEngineCore)
    core._control, core.plan = SimpleNamespace(messages=messages), SimpleNamespace(rank=0)
    core._instructions, core.input_queue = queue.SimpleQueue(), queue.Queue()
    with pytest.raises(Over):
        core.listen()
    assert levels == ["debug"]
    assert core._instructions.get_nowait() == {"type": "resume", "epoch": 3}, "only this one is for the main thread"
    assert core._instructions.empty()
