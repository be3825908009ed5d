"""A rank whose group is fenced counts nothing, be the message under way or not."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_daemon.engine.core import ElasticEngineCore, Parking
from elastic_daemon.errors import Fenced, PeerLost
from elastic_daemon.processes.fence_word import FenceWord

pytestmark = pytest.mark.contract


@pytest.fixture
def word(tmp_path: Path) -> FenceWord:
    return FenceWord(tmp_path / "fence", writer=True)


@pytest.fixture
def core(word: FenceWord, tmp_path: Path) -> Any:
    """In epoch 4, with nothing but what a fence concerns."""
    core: Any = object.__new__(ElasticEngineCore)
    core._fence, core.epoch, core._told_fence = FenceWord(tmp_path / "fence"), 4, 0
    core.plan, core._instructions = SimpleNamespace(rank=1), queue.SimpleQueue()
    core._steps = SimpleNamespace(land=lambda: pytest.fail("the step counted"))
    word.fence(4)
    assert not core.is_fenced
    return core


def test_the_output_of_a_step_is_dropped_once_the_word_is_written(core: Any, word: FenceWord) -> None:
    word.fence(5)
    for leave in (core._process_aborts_queue, core._process_input_queue):
        with pytest.raises(Fenced, match="5"):
            leave()


def test_connections_are_broken_when_the_message_comes_and_once(core: Any, word: FenceWord) -> None:
    aborts: list[int] = []

    def abort() -> int:
        aborts.append(word.epoch)
        return 3

    core.worker = SimpleNamespace(groups=SimpleNamespace(abort=abort))
    word.fence(5)
    assert aborts == []
    for epoch in (5, 5, 4):
        core._break_free(epoch)
    assert aborts == [5]
    word.fence(6)
    core._break_free(6)
    assert aborts == [5, 6]


def test_who_loses_a_peer_keeps_its_connections_until_the_epoch_is_void(core: Any, word: FenceWord) -> None:
    """An abort before would hand rubbish to peers that nothing tells to drop it."""
    told: list[tuple[str, int]] = []
    core._page = SimpleNamespace(set_phase=lambda phase: None, beat=lambda: None)
    core._control = SimpleNamespace(send=lambda type_, **fields: told.append((type_, word.epoch)))
    core._answer_call = lambda message, phase: told.append((message["name"], word.epoch))
    core.leave, core.park = lambda error: told.append(("left", word.epoch)), lambda: told.append(("parked", word.epoch))

    def fence() -> None:
        word.fence(5)
        core._instructions.put({"type": "fence", "epoch": 5})

    for message in ({"type": "call", "name": "column"}, {"type": "respread", "epoch": 4}):
        core._instructions.put(message)
    timer = threading.Timer(0.3, fence)
    timer.start()
    Parking(core).on_fault(PeerLost("a connection broke"))
    timer.join()
    assert told == [("fault", 4), ("column", 4), ("left", 5), ("parked", 5)]
    assert core._instructions.get_nowait() == {"type": "fence", "epoch": 5}, "it is answered when it is parked"
    assert core._instructions.empty()


def test_a_defect_of_its_own_ends_a_rank_unless_it_is_fenced(core: Any, word: FenceWord) -> None:
    left: list[Exception] = []
    core.leave, core.park = left.append, lambda: None
    with pytest.raises(ZeroDivisionError):
        Parking(core).on_fault(ZeroDivisionError())
    word.fence(5)
    Parking(core).on_fault(error := ZeroDivisionError())
    assert left == [error], "what a step trips over that was cut"


def test_instructions_of_an_epoch_that_is_void_are_dropped(core: Any, word: FenceWord) -> None:
    answered: list[tuple[str, dict[str, Any]]] = []
    core._page = SimpleNamespace(set_phase=lambda phase: None, beat=lambda: None)
    core._control = SimpleNamespace(send=lambda type_, **fields: answered.append((type_, fields)))
    column = SimpleNamespace(tolist=lambda: [[0, 1]])
    core.worker = SimpleNamespace(groups=SimpleNamespace(release=lambda: None), column=lambda: column)
    started: list[int] = []
    core._start_epoch, core._regroup = started.append, lambda message, epoch: True
    word.fence(6)
    for message in (
        {"type": "regroup", "epoch": 5},
        {"type": "resume", "epoch": 5},
        {"type": "fence", "epoch": 5},
        {"type": "fence", "epoch": 6},
        {"type": "regroup", "epoch": 6},
        {"type": "resume", "epoch": 6},
    ):
        core._instructions.put(message)
    core.park()
    assert answered == [("fenced", {"epoch": 6, "column": [[0, 1]]})]
    assert started == [6]
