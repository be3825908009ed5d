"""Work that can be left: it has a thread of its own, since nothing interrupts it where it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from elastic_daemon.errors import PeerLost

LOOK_UP_S = 0.05
"""How often it is looked up whether somebody still waits for the work. Work that ends is taken up at once."""

T = TypeVar("T")


def never() -> bool:
    return False


def run_leavable(work: Callable[[], T], is_void: Callable[[], bool], name: str) -> T:
    """What `work` makes. What it makes, or raises, after it was left goes nowhere.

    `name`: of the thread. Raises what `work` raises, and PeerLost when `is_void()` says that nobody waits for it.
    """
    if is_void():
        raise PeerLost("void before it began")

    def run(outcome: Future[T]) -> None:
        try:
            made = work()
        except BaseException as error:
            outcome.set_exception(error.with_traceback(None))
        else:
            outcome.set_result(made)

    outcome: Future[T] = Future()
    threading.Thread(target=run, args=(outcome,), name=name, daemon=True).start()
    try:
        while True:
            try:
                return outcome.result(LOOK_UP_S)
            except TimeoutError:
                if is_void():
                    raise PeerLost("left before it was complete") from None
    finally:
        del outcome  # it holds the error whose traceback holds this frame: a cycle would keep sockets open
