"""An abort that nobody waits for: once, in the background, and never while somebody calls NCCL, unless stuck there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from elastic_daemon.engine import nccl_abort
from elastic_daemon.engine.nccl_abort import NcclAbort
from elastic_daemon.errors import PeerLost


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


def test_nobody_uses_a_communicator_that_is_void(communicator: Communicator) -> None:
    abort = NcclAbort(communicator.abort)
    with abort.in_use():
        pass
    abort.void()
    with pytest.raises(PeerLost), abort.in_use():
        pytest.fail("it was used")
    abort.begin()
    assert communicator.aborting.wait(5)
    with pytest.raises(PeerLost), abort.in_use():  # it does not wait for the abort, which is still going on
        pytest.fail("it was used")
    assert not abort.wait(0.0)


def test_who_asks_does_not_wait_for_who_is_stuck_there(communicator: Communicator) -> None:
    """NCCL may know why."""
    abort = NcclAbort(communicator.abort)
    with abort.in_use():
        assert abort.unless_void(lambda: 6) == 6
    abort.void()
    assert abort.unless_void(lambda: 6) is None


def test_those_that_run_are_known(communicator: Communicator) -> None:
    """They hold memory that the next group may need."""
    abort = NcclAbort(communicator.abort)
    abort.void()
    assert abort not in NcclAbort.running()
    abort.begin()
    assert abort in NcclAbort.running()
    communicator.let_go.set()
    assert abort.wait(5)
    assert abort not in NcclAbort.running()


def test_an_abort_waits_for_who_uses_it(communicator: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_abort, "USE_PATIENCE_S", 10.0)
    abort = NcclAbort(communicator.abort)
    with abort.in_use():
        abort.begin()
        assert not communicator.aborting.wait(0.05), "freed under the thread that uses it"
    assert communicator.aborting.wait(5)


def test_an_abort_does_not_wait_for_who_is_stuck_there(communicator: Communicator) -> None:
    abort = NcclAbort(communicator.abort)
    with abort.in_use():
        abort.begin()
        assert communicator.aborting.wait(5), "who is stuck in NCCL gets out by the abort alone"


def test_an_abort_that_fails_is_over_and_told() -> None:
    def fail() -> None:
        raise RuntimeError("communicator is gone")

    abort = NcclAbort(fail)
    with capture_logs() as said:
        assert abort.begin()
        assert abort.wait(5)
    assert ("nccl_abort_failed", "communicator is gone") in [(one["event"], one.get("error")) for one in said]
