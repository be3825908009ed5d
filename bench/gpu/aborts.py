"""What the end of a broken NCCL group costs those who survive it, by what they do meanwhile.

    python -m bench.gpu.aborts [--members 4] [--trials 5] [--per-gpu 4] [--json FILE] [--device cpu]

Processes compute in lockstep, as layers of experts do: an all-gather, a product, an all-to-all. One is killed; the
others abort, make a group without it and go on. Policies, in turn:

    beside  the next group is made at once, while the abort goes on in its thread, as the daemon does
    after   the abort is waited for first

`wait` is what a client would have waited: the longest time without a step, from just before the kill to the end. No
vLLM, no daemon. --device cpu tries the script itself, over gloo, and says nothing about NCCL.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed import PrefixStore, Store, TCPStore

from bench.command import check_json_path, positive, say, write_json
from bench.gpu.members import Member, start
from bench.tables import figures_table
from elastic_daemon.engine.gloo import GlooGroup
from elastic_daemon.engine.leavable import never
from elastic_daemon.errors import PeerLost
from elastic_daemon.processes.launcher import CHILD_ENVIRONMENT

POLICIES = ("beside", "after")
LAYERS, ROWS, WIDTH = 8, 8, 256
STEPS = 40
"""After the new group has met. Four processes that share a GPU take 0.1 s for each; an abort has ended long before."""
WARM_S = 1.0
PATIENCE_S, ANSWER_S = 5.0, 60.0


class Group:
    """Members who compute the layers of a step together. `connections`: theirs; `ended`: whether the abort of these is
    over within so many seconds."""

    def __init__(
        self,
        connections: Any,
        collectives: Any,
        members: int,
        device: torch.device,
        synchronize: Callable[[], None],
        ended: Callable[[float], bool],
    ) -> None:
        self.abort: Callable[[], object] = connections.abort
        self.close: Callable[[], None] = connections.close
        self.ended = ended
        self._collectives, self._members, self._synchronize = collectives, members, synchronize
        self._weights = torch.rand(WIDTH, WIDTH, device=device) / WIDTH
        self._tokens = torch.rand(ROWS, WIDTH, device=device)

    def step(self) -> None:
        """Raises PeerLost."""
        tokens, splits = self._tokens, [ROWS] * self._members
        for _ in range(LAYERS):
            gathered = tokens.new_zeros(self._members * ROWS, WIDTH)
            self._collectives._allgather_base(gathered, tokens).wait()
            mixed = gathered @ self._weights
            received = torch.zeros_like(mixed)
            self._collectives.alltoall_base(received, mixed, splits, splits).wait()
            tokens = received.view(self._members, ROWS, WIDTH).sum(0)
        self._synchronize()


def nccl_group(store: Store, prefix: str, position: int, members: int, is_void: Callable[[], bool]) -> Group:
    from elastic_daemon.engine.nccl import NcclProcessGroup  # torch for CPUs has none

    device = torch.device("cuda", 0)
    group = NcclProcessGroup(PrefixStore(prefix, store), position, members, device, is_void)
    return Group(group, group, members, device, group.synchronize, group.ended.wait)


def gloo_group(store: Store, prefix: str, position: int, members: int, is_void: Callable[[], bool]) -> Group:
    group = GlooGroup(store, prefix, position, members, is_void)
    return Group(group, group.host, members, torch.device("cpu"), lambda: None, lambda _: True)


@dataclass(frozen=True)
class Broken:
    """Times of the monotonic clock: a survivor's last step before the kill, when it was told, and when its kernels had
    ended."""

    last: float
    told: float
    freed: float


@dataclass(frozen=True)
class Survived:
    """Of one survivor, in seconds since it was told: until its kernels had ended, its abort was over, its next group
    had met and had done a step. `wait`: the longest time without a step."""

    freed: float
    ended: float
    met: float
    step: float
    wait: float


def member(orders: Connection, void: Any, port: int, device: str) -> None:
    """A process of the group. Says when it is ready, has met, and has survived."""
    make = nccl_group if device == "cuda" else gloo_group
    if device == "cuda":
        from elastic_daemon.engine.nccl import RANK_ENVIRONMENT

        os.environ.update(RANK_ENVIRONMENT)
        torch.ones(1, device="cuda")
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    orders.send("ready")
    while (order := orders.recv()) is not None:
        prefix, position, members, after, policy = order
        group = make(store, prefix, position, members, void.is_set)
        orders.send("met")
        broken = run_until_void(group, void)
        place: tuple[int, int] = orders.recv()  # of the next group: this position, so many members
        orders.send(survive(group, broken, policy, partial(make, store, after, *place, never)))


def run_until_void(group: Group, void: Any) -> Broken:
    """Steps; another thread aborts."""
    told: list[float] = []

    def listen() -> None:
        void.wait()
        told.append(time.monotonic())
        group.abort()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    last = time.monotonic()
    try:
        while True:
            group.step()
            last = time.monotonic()
    except PeerLost:
        freed = time.monotonic()
    listener.join()
    return Broken(last, told[0], freed)


def survive(group: Group, broken: Broken, policy: str, connect: Callable[[], Group]) -> Survived:
    ends: list[float] = []

    def watch() -> None:
        group.ended(PATIENCE_S)
        ends.append(time.monotonic())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    if policy == "after":
        group.ended(PATIENCE_S)
    group.close()
    following = connect()
    met = time.monotonic()
    times = [broken.last]
    for _ in range(STEPS):
        following.step()
        times.append(time.monotonic())
    watcher.join()
    following.abort()
    following.close()
    following.ended(PATIENCE_S)
    wait = max(later - earlier for earlier, later in itertools.pairwise(times))
    freed, ended, met, step = (at - broken.told for at in (broken.freed, ends[0], met, times[1]))
    return Survived(freed, ended, met, step, wait)


def start_on(gpu: int, port: int, device: str) -> Member:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # for the one that is spawned now
    return start(member, port, device)


def trial(number: int, policy: str, survivors: list[Member], victim: Member) -> list[Survived]:
    """The victim is the last but one of the group, so that a survivor changes its position."""
    group = [*survivors[:-1], victim, survivors[-1]]
    for position, one in enumerate(group):
        one.orders.send((f"{number}", position, len(group), f"{number}/after", policy))
    for one in group:
        assert one.said(ANSWER_S) == "met"
    time.sleep(WARM_S)
    victim.kill()
    for one in survivors:
        one.void.set()
    for position, one in enumerate(survivors):
        one.orders.send((position, len(survivors)))
    survived = [one.said(ANSWER_S) for one in survivors]
    for one in survivors:
        one.void.clear()
    return survived


def measure(options: argparse.Namespace) -> dict[str, list[Survived]]:
    os.environ.update({**CHILD_ENVIRONMENT, "NCCL_MULTI_RANK_GPU_ENABLE": "1"})
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    gpus = [number // options.per_gpu for number in range(options.members)]
    processes = [start_on(gpu, store.port, options.device) for gpu in gpus]
    victim_gpu = gpus[-2]
    found: dict[str, list[Survived]] = {policy: [] for policy in POLICIES}
    try:
        for one in processes:
            one.said(ANSWER_S)
        survivors, victim = [*processes[:-2], processes[-1]], processes[-2]
        for number, policy in enumerate(POLICIES * options.trials):
            processes.append(start_on(victim_gpu, store.port, options.device))
            processes[-1].said(ANSWER_S)  # the next victim, before this one: a start would disturb the others
            of_trial = trial(number, policy, survivors, victim)
            found[policy] += of_trial
            say(f"{policy}: {max(one.wait for one in of_trial):.3f} s without a step")
            victim = processes[-1]
    finally:
        for one in processes:
            one.kill()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.aborts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--members", type=positive, default=4, help="3 at least (default: 4)")
    parser.add_argument("--per-gpu", type=positive, default=4, help="that share a GPU (default: 4)")
    parser.add_argument("--trials", type=positive, default=5, help="of each policy (default: 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, too")
    options = parser.parse_args()
    check_json_path(parser, options.json)
    if options.members < 3:
        parser.error("--members: a group of two has no survivors who could meet")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the script itself")
    found = measure(options)
    columns = tuple(Survived.__dataclass_fields__)
    table = figures_table("ms since a survivor was told; median and worst", *columns)
    for policy, survived in found.items():
        rows = [[1000 * getattr(one, column) for one in survived] for column in columns]
        table.add_row(policy, *(f"{statistics.median(row):.0f}, {max(row):.0f}" for row in rows))
    Console().print(table)
    write_json(options.json, {policy: [asdict(one) for one in survived] for policy, survived in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
