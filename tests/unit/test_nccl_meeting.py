"""Meeting over NCCL: left by who is fenced, wherever it waits, and what there is of a communicator is aborted once."""

from __future__ import annotations

import threading
import time

import pytest

from elastic_daemon.engine.nccl_meeting import Meeting, meet
from elastic_daemon.errors import PeerLost


class Group:
    def __init__(self) -> None:
        self.aborts = 0
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborts += 1
        self.aborted.set()


class Connecting:
    """A connect that waits, before there is a communicator or after, until it is let go on."""

    def __init__(self, *, made_first: bool) -> None:
        self.group, self._made_first = Group(), made_first
        self.waits, self.go_on = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, meeting: Meeting[Group]) -> Group:
        self.thread = threading.current_thread()
        if self._made_first:
            meeting.made(self.group)
        self.waits.set()
        self.go_on.wait(10)
        if not self._made_first:
            meeting.made(self.group)
        return self.group


def test_a_group_that_is_complete() -> None:
    connecting = Connecting(made_first=True)
    asked = 0

    def later() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4:
            connecting.go_on.set()
        return False

    group, abort = meet(connecting, later)
    assert group is connecting.group and asked >= 4, "it waited for the first collectives"
    assert not abort.is_void and not group.aborted.is_set()
    abort.begin()
    assert group.aborted.wait(5)


def test_left_while_members_connect() -> None:
    connecting = Connecting(made_first=False)
    with pytest.raises(PeerLost, match="left before it was complete"):
        meet(connecting, connecting.waits.is_set)
    assert connecting.thread not in (None, threading.current_thread())
    assert not connecting.group.aborted.is_set(), "there is no communicator yet"
    connecting.go_on.set()
    assert connecting.group.aborted.wait(5), "its kernels would wait on the device for ever"


def test_left_during_the_first_collectives() -> None:
    connecting = Connecting(made_first=True)
    with pytest.raises(PeerLost, match="left before it was complete"):
        meet(connecting, connecting.waits.is_set)
    assert connecting.group.aborted.wait(5), "the thread waits in them, and gets out by that alone"
    connecting.go_on.set()
    assert connecting.thread is not None
    connecting.thread.join(5)
    assert connecting.group.aborts == 1


def test_nccl_fails_while_members_connect() -> None:
    group = Group()

    def connect(meeting: Meeting[Group]) -> Group:
        try:
            raise RuntimeError("remote process exited")
        finally:
            meeting.made(group)

    with pytest.raises(RuntimeError, match="remote process exited"):
        meet(connect, lambda: False)
    assert group.aborted.wait(5)


def test_the_device_fails_in_the_first_collectives() -> None:
    group = Group()

    def connect(meeting: Meeting[Group]) -> Group:
        meeting.made(group)
        raise RuntimeError("unspecified launch failure")

    with pytest.raises(RuntimeError, match="launch failure"):
        meet(connect, lambda: False)
    assert group.aborted.wait(5)


def test_a_failure_after_it_was_left_concerns_nobody() -> None:
    begun, failed = threading.Event(), threading.Event()
    ended: list[threading.Thread] = []

    def connect(meeting: Meeting[Group]) -> Group:
        ended.append(threading.current_thread())
        begun.set()
        failed.wait(10)
        raise RuntimeError("remote process exited")

    with pytest.raises(PeerLost):
        meet(connect, begun.is_set)
    failed.set()
    ended[0].join(5)
    assert not ended[0].is_alive()


def test_nothing_is_begun_in_an_epoch_that_is_void() -> None:
    started = time.monotonic()
    with pytest.raises(PeerLost, match="void before"):
        meet(lambda meeting: pytest.fail("it was begun"), lambda: True)
    assert time.monotonic() - started < 5
