"""Processes that form a gloo group as ranks do, driven step by step by a test.

They are forked from a server that has imported vLLM, as the daemon's are. Each has a main thread, which may be blocked
in a collective, and a control thread, which takes commands meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore
from vllm import forward_context

from elastic_daemon.engine.gloo import GlooGroup, peer_fault
from elastic_daemon.engine.groups import EpochGroup, EpochGroups
from elastic_daemon.engine.heartbeat import NoPage, Page, open_page
from elastic_daemon.errors import PeerLost
from elastic_daemon.processes.store import RendezvousStore

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload([__name__])

ANSWER_TIMEOUT_S = 30.0
BOOT_TIMEOUT_S = 120.0  # the first process of all imports vLLM


@dataclass(frozen=True)
class Answer:
    """What a command came to. Times are of the monotonic clock, which all processes share."""

    command: str
    result: Any
    error: str | None
    peer_fault: bool
    started: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class GroupRank:
    """Lives in the process."""

    def __init__(self, store: tuple[str, int]) -> None:
        self._store = TCPStore(*store, is_master=False, wait_for_workers=False)
        self._groups = EpochGroups(*(EpochGroup(name, 0, 1, torch.device("cpu")) for name in ("dp", "ep", "eplb")))
        self._page: Page = NoPage()
        self.rounds = 0

    def watch(self, directory: str, rank: int) -> None:
        """Write a heartbeat from the next group on."""
        self._page = open_page({"heartbeat_dir": directory, "rank": rank, "incarnation": rank + 1})
        self._page.begin_epoch(1)

    def build(self, prefix: str, position: int, members: int) -> int:
        self._groups.bind(GlooGroup(self._store, prefix, position, members, page=self._page))
        return self._groups.ep.world_size

    def abort(self) -> int:
        return self._groups.abort()

    def release(self) -> None:
        self._groups.release()

    def gather(self) -> list[float]:
        """One all_gather."""
        communicator, group = self._groups.ep.device_communicator, self._groups.ep
        own = torch.full((1, 1), float(group.rank_in_group))
        (everyone,) = communicator.all_gatherv([own], [1] * group.world_size)
        return [float(value) for value in everyone.flatten()]

    def gather_for_ever(self) -> None:
        self.rounds = 0
        while True:
            self.gather()
            self.rounds += 1

    def gather_and_leave(self) -> dict[str, int]:
        """A collective that fails, and the group dropped while its error is still being handled, as a rank does."""
        try:
            self.gather()
        except PeerLost as error:
            traceback.clear_frames(error.__traceback__)
            self._groups.release()
            deadline = time.monotonic() + 10
            while self.resources() != self.before and time.monotonic() < deadline:
                time.sleep(0.01)  # a group's threads end a moment after the group
            return self.resources()
        raise AssertionError("did not fail")

    def settled_resources(self) -> dict[str, int]:
        """The least of half a second: a group's threads end a moment after the group."""
        seen = []
        for _ in range(25):
            seen.append(self.resources())
            time.sleep(0.02)
        self.before = {kind: min(one[kind] for one in seen) for kind in seen[0]}
        return self.before

    def get_rounds(self) -> int:
        return self.rounds

    def reduce(self, value: float) -> float:
        return float(self._groups.ep.device_communicator.all_reduce(torch.tensor([value])))

    def exchange(self, counts: list[int], inputs: list[torch.Tensor], experts: Callable[..., torch.Tensor]) -> Any:
        """Dispatch, compute something from all tokens, combine: what an expert-parallel layer does."""
        metadata = forward_context.DPMetadata(torch.tensor(counts))
        context = forward_context.ForwardContext({}, {}, {}, dp_metadata=metadata)
        with forward_context.override_forward_context(context), metadata.sp_local_sizes(1):
            dispatched = self._groups.ep.dispatch(*inputs)
            combined = self._groups.ep.combine(experts(self._groups.ep.rank_in_group, *dispatched))
        return dispatched, combined

    def resources(self) -> dict[str, int]:
        return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def _run(rank: GroupRank, connection: Connection, lock: threading.Lock, name: str, arguments: tuple[Any, ...]) -> None:
    started = time.monotonic()
    result, error, peer_lost = None, None, False
    try:
        result = getattr(rank, name)(*arguments)
    except Exception as caught:
        error, peer_lost = f"{type(caught).__name__}: {caught}", peer_fault(caught) is not None
    answer = Answer(name, result, error, peer_lost, started, time.monotonic())
    with lock:
        connection.send(answer)


def _main(connection: Connection, store: tuple[str, int], body: type[GroupRank]) -> None:
    torch.set_num_threads(1)
    rank, lock = body(store), threading.Lock()
    work: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()

    def control() -> None:
        with contextlib.suppress(EOFError):
            while True:
                name, arguments, out_of_band = connection.recv()
                if out_of_band:
                    _run(rank, connection, lock, name, arguments)
                else:
                    work.put((name, arguments))
        os._exit(0)

    threading.Thread(target=control, daemon=True).start()
    while True:
        name, arguments = work.get()
        _run(rank, connection, lock, name, arguments)


class RankProcess:
    """The test's handle on one process."""

    def __init__(self, store: RendezvousStore, body: type[GroupRank]) -> None:
        self._connection, theirs = SPAWN.Pipe()
        self._early: list[Answer] = []
        self.process = SPAWN.Process(target=_main, args=(theirs, (store.host, store.port), body), daemon=True)
        self.process.start()
        theirs.close()

    def boot(self) -> None:
        self._connection.send(("resources", (), True))
        checked(self._receive(BOOT_TIMEOUT_S))

    def start(self, name: str, *arguments: Any) -> None:
        """Begin a command in the main thread."""
        self._connection.send((name, arguments, False))

    def ask_meanwhile(self, name: str, *arguments: Any) -> Answer:
        """Run a command in the control thread, while the main thread may be blocked.

        What that says first, being freed by this command, say, is kept for `answer`.
        """
        self._connection.send((name, arguments, True))
        while (answer := self._receive()).command != name:
            self._early.append(answer)
        return answer

    def answers_within(self, seconds: float) -> bool:
        return bool(self._early) or self._connection.poll(seconds)

    def answer(self) -> Answer:
        """The main thread's next one."""
        return self._early.pop(0) if self._early else self._receive()

    def _receive(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        assert self._connection.poll(timeout_s), "no answer"
        answer: Answer = self._connection.recv()
        return answer

    def kill(self) -> float:
        """Returns when."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        self.process.join()
        return killed

    def close(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.join()


class Ranks:
    """A store and some processes."""

    def __init__(self) -> None:
        self.store = RendezvousStore()
        self._all: list[RankProcess] = []

    def spawn(self, count: int, body: type[GroupRank] = GroupRank) -> list[RankProcess]:
        self._all += (new := [RankProcess(self.store, body) for _ in range(count)])
        for rank in new:
            rank.boot()  # gloo waits two seconds for a member, however long it boots
        return new

    def close(self) -> None:
        for rank in self._all:
            rank.close()


@contextlib.contextmanager
def running() -> Iterator[Ranks]:
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()


def all_do(ranks: list[RankProcess], name: str, *arguments: Any) -> list[Any]:
    """Run a command in all of them at once, and return their results."""
    for rank in ranks:
        rank.start(name, *arguments)
    return [checked(rank.answer()) for rank in ranks]


def build(ranks: list[RankProcess], prefix: str) -> None:
    for position, rank in enumerate(ranks):
        rank.start("build", prefix, position, len(ranks))
    assert [checked(rank.answer()) for rank in ranks] == [len(ranks)] * len(ranks)


def checked(answer: Answer) -> Any:
    assert answer.error is None, answer.error
    return answer.result
