"""An abort that nobody waits for: once, in the background, and never while somebody asks the communicator."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from elastic_daemon.engine.nccl_abort import NcclAbort


class Communicator:
    """Its abort lasts until `let_go`, as NCCL's does while memory is given back."""

    def __init__(self) -> None:
        self.aborts = 0
        self.aborting = threading.Event()
        self.let_go = threading.Event()

    def abort(self) -> None:
        self.aborts += 1
        self.aborting.set()
        self.let_go.wait(10)


@pytest.fixture
def communicator() -> Iterator[Communicator]:
    communicator = Communicator()
    yield communicator
    communicator.let_go.set()


def test_begin_does_not_wait(communicator: Communicator) -> None:
    abort = NcclAbort(communicator.abort)
    assert not abort.is_void
    assert abort.begin()
    assert abort.is_void
    assert communicator.aborting.wait(5)
    assert not abort.wait(0.01)
    communicator.let_go.set()
    assert abort.wait(5)


def test_it_is_aborted_once(communicator: Communicator) -> None:
    abort = NcclAbort(communicator.abort)
    communicator.let_go.set()
    first: list[bool] = []
    threads = [threading.Thread(target=lambda: first.append(abort.begin())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert abort.wait(5)
    assert (first.count(True), communicator.aborts) == (1, 1)


def test_what_was_never_begun_is_not_over() -> None:
    abort = NcclAbort(lambda: None)
    abort.void()
    assert abort.is_void
    assert not abort.wait(0.0)


def test_nobody_asks_a_communicator_that_is_void(communicator: Communicator) -> None:
    abort = NcclAbort(communicator.abort)
    assert abort.unless_void(lambda: 6) == 6
    abort.void()
    assert abort.unless_void(lambda: 6) is None
    abort.begin()
    assert communicator.aborting.wait(5)
    assert abort.unless_void(lambda: 6) is None, "and the question does not wait for the abort"


def test_an_abort_waits_for_who_asks(communicator: Communicator) -> None:
    abort = NcclAbort(communicator.abort)
    asking, answer = threading.Event(), threading.Event()
    said: list[int | None] = []

    def ask() -> int:
        asking.set()
        answer.wait(10)
        return 0

    asker = threading.Thread(target=lambda: said.append(abort.unless_void(ask)))
    asker.start()
    assert asking.wait(5)
    abort.begin()
    assert not communicator.aborting.wait(0.05), "freed under the thread that asks it"
    answer.set()
    assert communicator.aborting.wait(5)
    asker.join(5)
    assert said == [0]


def test_an_abort_that_fails_is_over_and_told() -> None:
    def fail() -> None:
        raise RuntimeError("communicator is gone")

    abort = NcclAbort(fail)
    with capture_logs() as said:
        assert abort.begin()
        assert abort.wait(5)
    assert [(one["event"], one.get("error")) for one in said][:1] == [("nccl_abort_failed", "communicator is gone")]
