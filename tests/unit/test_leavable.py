"""Work that can be left, wherever it waits."""

from __future__ import annotations

import threading

import pytest

from elastic_daemon.engine.leavable import never, run_leavable
from elastic_daemon.errors import PeerLost


def test_what_is_made_is_returned_and_what_is_raised_is_raised() -> None:
    assert run_leavable(lambda: 7, never, "seven") == 7
    with pytest.raises(ZeroDivisionError):
        run_leavable(lambda: 1 / 0, never, "fails")


def test_nothing_is_begun_that_is_void_already() -> None:
    with pytest.raises(PeerLost, match="void before"):
        run_leavable(lambda: pytest.fail("it was begun"), lambda: True, "void")


def test_what_is_made_after_it_was_left_is_discarded() -> None:
    go_on, discarded = threading.Event(), threading.Event()
    begun = threading.Event()

    def work() -> str:
        begun.set()
        go_on.wait(10)
        return "late"

    with pytest.raises(PeerLost, match="left"):
        run_leavable(work, begun.is_set, "late", lambda made: discarded.set() if made == "late" else None)
    assert not discarded.is_set()
    go_on.set()
    assert discarded.wait(5)
