"""Meeting over NCCL: left by who is fenced, wherever it waits, and what is made afterwards is aborted."""

from __future__ import annotations

import threading

import pytest

from elastic_daemon.engine.nccl_meeting import meet
from elastic_daemon.errors import PeerLost


class Group:
    """A group whose first collective completes when `completed` says so."""

    def __init__(self) -> None:
        self.completed = self.queried = False
        self.failure: RuntimeError | None = None
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()

    def query(self) -> bool:
        self.queried = True
        if self.failure is not None:
            raise self.failure
        return self.completed


def test_a_group_that_is_complete() -> None:
    group = Group()
    asked: list[bool] = []

    def later() -> bool:
        asked.append(group.completed)
        group.completed = len(asked) >= 3
        return False

    met, abort = meet(lambda: (group, group), later)
    assert met is group and group.completed and len(asked) >= 3, "it waited for the first collective"
    assert not abort.is_void and not group.aborted.is_set()
    abort.begin()
    assert group.aborted.wait(5)


def test_left_while_members_connect() -> None:
    group, connected = Group(), threading.Event()
    connecting: list[threading.Thread] = []

    def connect() -> tuple[Group, Group]:
        connecting.append(threading.current_thread())
        connected.wait(10)
        return group, group

    with pytest.raises(PeerLost, match="left before it was complete"):
        meet(connect, lambda: bool(connecting))
    assert connecting[0] is not threading.current_thread() and connecting[0].is_alive()
    assert not group.aborted.is_set()
    connected.set()
    assert group.aborted.wait(5), "its kernel would wait on the device for ever"


def test_left_during_the_first_collective() -> None:
    group = Group()
    with pytest.raises(PeerLost, match="first collectives"):
        meet(lambda: (group, group), lambda: group.queried)
    assert group.aborted.wait(5)


def test_nccl_fails_while_members_connect() -> None:
    def connect() -> tuple[Group, Group]:
        raise RuntimeError("remote process exited")

    with pytest.raises(RuntimeError, match="remote process exited"):
        meet(connect, lambda: False)


def test_the_device_fails_in_the_first_collective() -> None:
    group = Group()
    group.failure = RuntimeError("unspecified launch failure")
    with pytest.raises(RuntimeError, match="launch failure"):
        meet(lambda: (group, group), lambda: False)
    assert group.aborted.wait(5)


def test_a_failure_after_it_was_left_concerns_nobody() -> None:
    failed = threading.Event()
    ended: list[threading.Thread] = []

    def connect() -> tuple[Group, Group]:
        ended.append(threading.current_thread())
        failed.wait(10)
        raise RuntimeError("remote process exited")

    with pytest.raises(PeerLost):
        meet(connect, lambda: bool(ended))
    failed.set()
    ended[0].join(5)
    assert not ended[0].is_alive()
