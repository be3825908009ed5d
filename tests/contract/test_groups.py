"""Groups of real processes: what a death does to them, what frees the survivors, and that they go on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from elastic_daemon.engine import gloo, groups
from elastic_daemon.engine.gloo import CONNECT_TIMEOUT
from elastic_daemon.engine.links import Links
from elastic_daemon.errors import PeerLost
from elastic_daemon.processes.store import RendezvousStore
from tests.contract.group_ranks import RankProcess, Ranks, all_do, build, checked, running
from tests.timing import SLACK_S

pytestmark = pytest.mark.contract

FREED_WITHIN_S = 0.5 + SLACK_S
"""A survivor whose connections are broken must be back within this time: a collective's own timeout is ten minutes."""


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with running() as started:
        yield started


def until_in_collectives(ranks: list[RankProcess]) -> None:
    """Start an endless loop of collectives in all, and wait until each has been through some."""
    for rank in ranks:
        rank.start("gather_for_ever")
    for rank in ranks:
        deadline = time.monotonic() + 60
        while checked(rank.ask_meanwhile("get_rounds")) < 20:
            assert time.monotonic() < deadline


def test_a_death_in_a_collective_leaves_survivors_blocked_until_their_connections_are_broken(ranks: Ranks) -> None:
    members = ranks.spawn(4)
    build(members, "epoch/1")
    until_in_collectives(members)
    dead, far = members[1], members[3]
    killed = dead.kill()

    neighbours = [members[0], members[2]]
    for rank in neighbours:
        answer = rank.answer()
        assert answer.error is not None and answer.peer_fault
        assert answer.ended - killed < FREED_WITHIN_S
    assert not far.answers_within(0.5), "no neighbour of the dead: gloo tells it nothing"

    aborted = far.ask_meanwhile("abort")
    freed = far.answer()
    assert checked(aborted) >= 2
    assert freed.command == "gather_for_ever"
    assert freed.error is not None and freed.peer_fault
    assert freed.ended - aborted.started < FREED_WITHIN_S

    survivors = [members[0], members[2], members[3]]
    all_do(survivors, "release")
    build(survivors, "epoch/2")
    assert all_do(survivors, "gather") == [[0.0, 1.0, 2.0]] * 3
    assert all_do(survivors, "reduce", 2.0) == [6.0] * 3


def test_abort_frees_a_rank_whose_peer_hangs(ranks: Ranks) -> None:
    hung, waiting = ranks.spawn(2)
    build([hung, waiting], "epoch/1")
    waiting.start("gather")  # the other never enters
    assert not waiting.answers_within(0.3)
    aborted = waiting.ask_meanwhile("abort")
    freed = waiting.answer()
    assert freed.peer_fault
    assert freed.ended - aborted.started < FREED_WITHIN_S
    again = waiting.ask_meanwhile("abort")
    assert again.error is None, "aborting twice is fine"


def test_abort_when_idle_makes_the_next_collective_fail(ranks: Ranks) -> None:
    members = ranks.spawn(2)
    build(members, "epoch/1")
    checked(members[0].ask_meanwhile("abort"))
    for rank in members:
        rank.start("gather")
    assert all(rank.answer().peer_fault for rank in members)


def test_a_slow_peer_is_waited_for_longer_than_for_a_meeting(ranks: Ranks) -> None:
    members = ranks.spawn(3)
    build(members, "epoch/1")
    for rank in members[:2]:
        rank.start("gather")
    assert not members[0].answers_within(CONNECT_TIMEOUT.total_seconds() + 0.5)
    members[2].start("gather")
    assert [checked(rank.answer()) for rank in members] == [[0.0, 1.0, 2.0]] * 3


def test_a_member_that_never_comes_is_lost_after_the_timeout(ranks: Ranks) -> None:
    (alone,) = ranks.spawn(1)
    alone.start("build", "epoch/1", 0, 2)
    answer = alone.answer()
    assert answer.error is not None and answer.error.startswith("PeerLost: ")
    assert answer.peer_fault
    timeout = CONNECT_TIMEOUT.total_seconds()
    assert timeout == 2.0
    assert timeout <= answer.seconds < timeout + SLACK_S
    build([alone], "epoch/2")
    assert all_do([alone], "gather") == [[0.0]]


def test_a_death_while_a_group_is_built(ranks: Ranks) -> None:
    first, second, dead = ranks.spawn(3)
    build([first, second, dead], "epoch/1")
    all_do([first, second, dead], "release")
    dead.kill()
    for position, rank in enumerate((first, second)):
        rank.start("build", "epoch/2", position, 3)
    assert [rank.answer().peer_fault for rank in (first, second)] == [True, True]
    build([first, second], "epoch/3")
    assert all_do([first, second], "gather") == [[0.0, 1.0]] * 2


def test_rebuilding_leaves_nothing_behind(ranks: Ranks) -> None:
    members = ranks.spawn(2)

    def rebuild(epochs: range) -> None:
        for epoch in epochs:
            build(members, f"epoch/{epoch}")
            assert all_do(members, "gather") == [[0.0, 1.0]] * 2
            all_do(members, "release")

    rebuild(range(3))
    before = all_do(members, "settled_resources")
    rebuild(range(3, 23))
    deadline = time.monotonic() + 10
    while (after := all_do(members, "resources")) != before and time.monotonic() < deadline:
        time.sleep(0.05)  # a group's thread ends a moment after the group
    assert after == before


def test_a_broken_group_is_gone_while_its_error_is_still_handled(ranks: Ranks) -> None:
    survivor, dead = ranks.spawn(2)
    build([survivor, dead], "epoch/1")
    all_do([survivor, dead], "release")
    (before,) = all_do([survivor], "settled_resources")
    build([survivor, dead], "epoch/2")
    (during,) = all_do([survivor], "resources")
    assert during["fds"] > before["fds"] and during["threads"] > before["threads"]
    survivor.start("gather_and_leave")
    dead.kill()
    assert checked(survivor.answer()) == before


def test_a_failed_meeting_leaves_nothing_behind(ranks: Ranks) -> None:
    members = ranks.spawn(2)
    build(members, "epoch/1")
    all_do(members, "release")
    (before,) = all_do(members[:1], "settled_resources")
    members[0].start("build", "epoch/2", 0, 2)
    assert members[0].answer().peer_fault
    deadline = time.monotonic() + 10
    while all_do(members[:1], "resources") != [before] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all_do(members[:1], "resources") == [before]


def test_a_connection_with_the_number_of_an_old_one_is_broken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old group's connections are closed by its own thread, which may be while the new group is built."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        old = socket.create_connection(listener.getsockname())
        stack.enter_context(listener.accept()[0])
        number = old.fileno()

        def connect(**_: object) -> mock.MagicMock:
            old.close()
            new = socket.create_connection(listener.getsockname())
            if new.fileno() != number:  # a lower one came free
                os.dup2(new.fileno(), number)
                new.close()
                new = socket.socket(fileno=number)
            stack.enter_context(new)
            stack.enter_context(listener.accept()[0])
            return mock.MagicMock()

        monkeypatch.setattr(gloo, "init_gloo_process_group", connect)
        group = gloo.GlooGroup(HashStore(), "epoch/1", 0, 2)
        stack.callback(group.close)
        assert group.abort() == 2, "both ends of the new connection are in this process"


def test_a_rank_leaves_a_group_that_nobody_waits_for_any_more() -> None:
    """gloo itself waits for its whole timeout; and the next group can be built at once, at the same store."""
    store = RendezvousStore()
    client = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    void = threading.Event()
    threading.Timer(0.2, void.set).start()
    started = time.monotonic()
    with pytest.raises(PeerLost, match="group epoch/1 of 2 was not complete: left"):
        gloo.GlooGroup(client, "epoch/1", 0, 2, void.is_set)
    gloo.GlooGroup(client, "epoch/2", 0, 1).close()
    assert time.monotonic() - started < 0.2 + SLACK_S


def test_a_connection_that_closes_while_the_group_is_built_is_left_out() -> None:
    links = Links([(99_999, 1), (0, -1)])
    assert links.shutdown() == 0


HIDDEN, TOP_K = 5, 2


def partial_experts(rank: int, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A stand-in for the experts of one rank: linear, different on each rank, and sensitive to every input."""
    return (rank + 1) * hidden * weights.sum(dim=1, keepdim=True) + ids.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("counts", [[3, 1, 5], [2, 2, 2], [1, 1, 7], [3, 0, 2], [0, 0, 4], [0, 0, 0]], ids=str)
def test_dispatch_and_combine(ranks: Ranks, counts: list[int]) -> None:
    members = ranks.spawn(len(counts))
    build(members, "epoch/1")
    random = torch.Generator().manual_seed(1)
    inputs = [
        [
            torch.randn((count, HIDDEN), generator=random),
            torch.rand((count, TOP_K), generator=random),
            torch.randint(0, 99, (count, TOP_K), generator=random, dtype=torch.int32),
        ]
        for count in counts
    ]
    for rank, own in zip(members, inputs, strict=True):
        rank.start("exchange", counts, own, partial_experts)
    answers = [checked(rank.answer()) for rank in members]

    everything = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
    total = sum(partial_experts(rank, *everything) for rank in range(len(counts)))
    starts = [0, *accumulate(counts)]
    for position, (dispatched, combined) in enumerate(answers):
        assert all(torch.equal(got, want) for got, want in zip(dispatched, everything, strict=True))
        assert [tensor.dtype for tensor in dispatched] == [torch.float32, torch.float32, torch.int32]
        torch.testing.assert_close(combined, total[starts[position] : starts[position + 1]])


def test_expert_ids_that_a_broken_gather_has_left_are_ids_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device goes on with whatever is in the buffer; ids out of range would end its context."""
    monkeypatch.setattr(groups, "get_forward_context", lambda: SimpleNamespace(dp_metadata=None))
    group = groups.EpochGroup("ep", 0, 2, torch.device("cpu"))
    rubbish = groups.RehearsalProcessGroup(2, 0)
    group.bind(rubbish, rubbish)
    ids = torch.tensor([[3, 1 << 30], [-7, 4]], dtype=torch.int32)
    tensors = (torch.randn((2, HIDDEN)), torch.rand((2, TOP_K)), ids)
    assert torch.equal(group.device_communicator.dispatch(*tensors)[2], torch.cat([ids, ids])), "not known yet"
    group.experts = 4
    assert group.device_communicator.dispatch(*tensors)[2].tolist() == [[3, 3], [groups.NO_EXPERT, 3]] * 2
    assert ids.tolist() == [[3, 1 << 30], [-7, 4]], "those of its own tokens stay for the router"


def test_a_group_of_one_keeps_its_tokens(ranks: Ranks) -> None:
    (alone,) = ranks.spawn(1)
    build([alone], "epoch/1")
    own = [torch.randn((4, HIDDEN)), torch.rand((4, TOP_K)), torch.ones((4, TOP_K), dtype=torch.int32)]
    alone.start("exchange", [4], own, partial_experts)
    dispatched, combined = checked(alone.answer())
    assert all(torch.equal(got, want) for got, want in zip(dispatched, own, strict=True))
    torch.testing.assert_close(combined, partial_experts(0, *own))
