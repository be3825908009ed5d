"""Work that can be left, wherever it waits."""

from __future__ import annotations

import gc
import threading
import weakref

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


def test_work_that_is_left_ends_by_itself_and_nobody_keeps_what_it_makes() -> None:
    begun, go_on = threading.Event(), threading.Event()
    made: list[weakref.ref[threading.Event]] = []
    threads: list[threading.Thread] = []

    def work() -> threading.Event:
        threads.append(threading.current_thread())
        begun.set()
        go_on.wait(10)
        late = threading.Event()
        made.append(weakref.ref(late))
        return late

    with pytest.raises(PeerLost, match="left"):
        run_leavable(work, begun.is_set, "late")
    assert threads[0].is_alive() and not made
    go_on.set()
    threads[0].join(5)
    gc.collect()
    assert not threads[0].is_alive() and made[0]() is None
