"""Work that can be left, and connections that are broken under who waits at them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from elastic_daemon.engine.leavable import never, run_leavable
from elastic_daemon.engine.links import Links, tcp_sockets
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


def test_who_waits_at_a_connection_or_for_one_is_freed() -> None:
    """As NCCL does while it connects: a member that is gone never comes, and nobody closes what is half made."""
    before = tcp_sockets(listening=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connected = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        ended: list[str] = []

        def waiting(name: str, wait: Callable[[], object]) -> threading.Thread:
            def run() -> None:
                try:
                    wait()
                except OSError:
                    pass
                ended.append(name)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            return thread

        threads = [waiting("accept", listener.accept), waiting("receive", lambda: accepted.recv(1))]
        opened = tcp_sockets(listening=True) - before
        assert len(opened) == 3 and len(tcp_sockets() - before) == 2
        links = Links(opened)
        assert links.shutdown() == 3
        links.close()
        for thread in threads:
            thread.join(5)
        assert sorted(ended) == ["accept", "receive"]
        connected.close()
        accepted.close()
