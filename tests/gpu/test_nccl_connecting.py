"""A member dies while NCCL connects: the others leave, and connect without it. Real NCCL, on one GPU that all share."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from bench.gpu.members import Member, start
from elastic_daemon.engine import nccl_meeting
from elastic_daemon.engine.nccl_abort import NcclAbort
from elastic_daemon.errors import PeerLost
from tests import proc

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from elastic_daemon.engine import nccl

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ENVIRONMENT = {**nccl.RANK_ENVIRONMENT, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_CUMEM_ENABLE": "0"}
SURVIVORS = 2
BEFORE, MADE = "before it connects", "between the communicator and its first collectives"
AT_S = (0.02, 0.1, 0.3, 0.6)
"""After the victim has begun to connect: wherever that is."""
STARTED_S, STOPPED_S, LEFT_S, MET_S = 120.0, 20.0, 1.0, 20.0


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_at(point: str | float) -> None:
    if point == BEFORE:
        stop_self()
    elif point == MADE:
        made = nccl_meeting.Meeting.made

        def made_and_stopped(meeting: Any, group: Any) -> None:
            made(meeting, group)
            stop_self()

        nccl_meeting.Meeting.made = made_and_stopped  # type: ignore[method-assign,assignment]
    elif isinstance(point, float):
        threading.Timer(point, stop_self).start()


def connect_all(orders: Connection, void: Any, port: int) -> None:
    """A member: meets whom it is told to meet, and says what came of it."""
    device = torch.device("cuda", 0)
    torch.ones(1, device=device)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    orders.send("ready")
    while (order := orders.recv()) is not None:
        prefix, position, members, point, adds = order
        stop_at(point)
        began = time.monotonic()
        try:
            group = nccl.NcclProcessGroup(PrefixStore(prefix, store), position, members, device, void.is_set)
        except PeerLost:
            orders.send({"met": False, "seconds": time.monotonic() - began})
            continue
        summed = torch.full((8,), float(position + 1), device=device)
        if adds:  # else one of the members may be stopped by now
            group.allreduce([summed]).wait()
            group.synchronize()
        met = {"met": True, "seconds": time.monotonic() - began, "sum": summed[0].item()}
        group.close()
        orders.send(met)
    for abort in NcclAbort.running():
        abort.wait(5.0)
    orders.send([thread.name for thread in threading.enumerate()])


@pytest.fixture(scope="module")
def members() -> Iterator[list[Member]]:
    """The survivors first, and a victim for each case behind them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ENVIRONMENT.items():
            patched.setenv(name, value)
        started = [start(connect_all, store.port) for _ in range(SURVIVORS + 2 * (2 + len(AT_S)))]
    try:
        for member in started:
            assert member.said(STARTED_S) == "ready"
        yield started
    finally:
        for member in started:
            member.kill()


@pytest.mark.parametrize("first", [False, True], ids=["a-later-member", "position-0"])
@pytest.mark.parametrize("point", [BEFORE, MADE, *AT_S])
def test_survivors_leave_and_connect_without_it(members: list[Member], point: str | float, first: bool) -> None:
    survivors, victim = members[:SURVIVORS], members.pop()
    everyone = [victim, *survivors] if first else [*survivors, victim]
    for position, member in enumerate(everyone):
        member.orders.send((f"{point}/{first}", position, len(everyone), point if member is victim else None, False))
    _wait_until_stopped(victim)
    victim.kill()
    for survivor in survivors:
        survivor.void.set()
    left = [survivor.said(LEFT_S) for survivor in survivors]
    assert isinstance(point, float) or not any(said["met"] for said in left)
    for survivor in survivors:
        survivor.void.clear()
    for position, survivor in enumerate(survivors):
        survivor.orders.send((f"{point}/{first}/again", position, SURVIVORS, None, True))
    again = [survivor.said(MET_S) for survivor in survivors]
    print(f"{point}, first {first}: left {left}, again {again}")
    assert [said.get("sum") for said in again] == [3.0, 3.0]


def _wait_until_stopped(victim: Member) -> None:
    deadline = time.monotonic() + STOPPED_S
    while proc.state(victim.pid) not in ("T", "t"):
        assert time.monotonic() < deadline, "the victim never got there"
        time.sleep(0.005)


def test_nothing_is_left_but_threads_without_a_communicator(members: list[Member]) -> None:
    """After all others. A thread that was left before there was a communicator goes on, as docs/gpu.md says."""
    for survivor in members[:SURVIVORS]:
        survivor.orders.send(None)
        names = survivor.said(20.0)
        print(f"threads of {survivor.pid}: {names}")
        assert "nccl-abort" not in names
