"""NCCL's sockets are found among those of this process, and are woken; others are left alone."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from bench.gpu.nccl_wake import service_sockets, wake

LENGTH = 108
"""Of `sun_path`: NCCL binds all of it."""


def address(name: str) -> bytes:
    return f"\0tmp/{name}".encode().ljust(LENGTH, b"\0")


@pytest.fixture
def service() -> Iterator[socket.socket]:
    """As NCCL makes it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(address(f"nccl-socket-3-{os.getpid():x}"))
        yield bound


def test_a_service_is_found_and_woken(service: socket.socket) -> None:
    found = service_sockets()
    assert found == {address(f"nccl-socket-3-{os.getpid():x}")}
    assert not select.select([service], [], [], 0)[0]
    wake(found)
    assert select.select([service], [], [], 5)[0]


def test_others_are_not_taken_for_one(service: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(address("other"))
        assert len(service_sockets()) == 1
    service.close()
    assert service_sockets() == frozenset()


def test_one_of_another_process_is_not_ours(service: socket.socket) -> None:
    if (pid := os.fork()) == 0:
        service.close()
        os._exit(len(service_sockets()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(service_sockets()) == 1


def test_a_service_that_has_gone_is_passed_over(service: socket.socket) -> None:
    found = service_sockets()
    service.close()
    wake(found)


def test_a_service_that_reads_nothing_holds_up_nobody(service: socket.socket) -> None:
    for _ in range(1000):
        wake(service_sockets())
