"""Nothing accumulates: not over many regroups, and nothing outlives a daemon."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from tests import proc
from tests.e2e.cluster import Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

WARM_UP, REGROUPS = 30, 50

GROWTH_KIB = 16 * 1024
"""What 50 regroups may add to a rank: 3 to 11 MiB were seen, less and less, in what malloc keeps between its blocks.
What is in use stays the same, to 0.1 MB over 180 regroups (mallinfo2)."""

BOUNDED_CACHES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 10),
}
"""oneDNN keeps a compiled kernel for each shape of a batch it has seen, up to 1024 of them, and malloc keeps what was
freed. Both grow with the variety of batches, regroup or not, until they are full: here they are full after the warm-up.
"""


KEPT = {"state", "nvml-simulator.state", "watchdog.lock"}
"""What the watchdog leaves in the runtime directory for the next life."""


@dataclass(frozen=True)
class Usage:
    """What a process holds; memory is its own, without what it shares with the zygote."""

    descriptors: int
    threads: int
    private_kib: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_Dirty"))
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), private)


def _settled(pid: int) -> Usage:
    """The least of a second: threads of the last group end a moment after it, and so do connections of a caller."""
    seen = []
    for _ in range(10):
        seen.append(Usage.of(pid))
        time.sleep(0.1)
    return Usage(*(min(getattr(usage, field.name) for usage in seen) for field in fields(Usage)))


@pytest.mark.timeout(900)
def test_many_regroups_leave_memory_descriptors_and_threads_flat(tmp_path: Path) -> None:
    """A rank whose connections break again and again: faults without a death, the same members regroup each time."""
    fault = {"ELASTIC_FAULT_LINKS": json.dumps({"rank": 1, "every_s": 0.005, "after_steps": 20})}
    with Cluster(tmp_path / "run", env=fault | BOUNDED_CACHES) as cluster:
        reference = run_streams(cluster, max_tokens=60)
        pids = [cluster.pid(rank) for rank in range(4)]

        def regroup_until(epoch: int) -> list[Usage]:
            while cluster.health()["epoch"] < epoch:
                assert_same(run_streams(cluster, max_tokens=60), reference)
            return [_settled(pid) for pid in pids]

        before = regroup_until(WARM_UP)
        after = regroup_until(cluster.health()["epoch"] + REGROUPS)
        assert not cluster.events("rank_excluded")
        # Now and then gloo never ends a collective that was cut; such a group is left behind, and said so.
        abandoned = Counter(map(int, re.findall(r'"position": (\d), "abandoned": \d+, "event": "group_', cluster.log)))
    for rank, (then, now) in enumerate(zip(before, after, strict=True)):
        assert now.descriptors <= then.descriptors + 4 + 16 * abandoned[rank], (then, now)
        assert now.threads <= then.threads + 1 + 4 * abandoned[rank], (then, now)
        assert now.private_kib <= then.private_kib + GROWTH_KIB, (then, now)


def test_kills_and_restarts_leave_nothing_behind(tmp_path: Path) -> None:
    """Twenty kills in three lives, which end by a drain, a SIGKILL of the supervisor, and a drain.

    No process, descriptor, thread, socket, file or shared memory is left, neither while they live nor afterwards.
    """
    shared = set(os.listdir("/dev/shm"))
    runtime_dir, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    options = ("--data-parallel-size", "6", "--survive-losses", "5", "--restore", "off")
    kills = 0
    for ending in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with Cluster(runtime_dir, *options, env={"TMPDIR": str(temporary)}) as cluster:
            kills += _kill_all_but_one(cluster)
            pids = [cluster.process.pid, *cluster.descendants()]
            cluster.process.send_signal(ending)
            assert cluster.process.wait(20) == (0 if ending == signal.SIGTERM else -signal.SIGKILL)
            _wait_gone(pids)
            if ending == signal.SIGTERM:
                assert {path.name for path in runtime_dir.iterdir()} <= KEPT
    assert kills >= 20
    left = [path.name for path in temporary.iterdir()]
    assert not [name for name in left if not name.startswith("torchinductor_")], "all but torch's cache, one for all"
    assert not set(os.listdir("/dev/shm")) - shared


def _kill_all_but_one(cluster: Cluster) -> int:
    """Kill five of six ranks, and the front end twice, one after the other. Returns the number of kills."""
    keepers = [cluster.process.pid, *cluster.titled("zygote")]
    run_streams(cluster, max_tokens=5)
    before, processes = [_settled(pid) for pid in keepers], len(cluster.descendants())
    victims = (3, None, 0, 5, None, 1, 4)
    for victim in victims:
        restarts = len(cluster.events("frontend_ready"))
        if victim is None:
            [frontend] = cluster.titled("front end")
            os.kill(frontend, signal.SIGKILL)
            cluster.wait_for(lambda restarts=restarts: len(cluster.events("frontend_ready")) > restarts, 60)
        else:
            cluster.kill(victim)
            cluster.wait_for(lambda victim=victim: victim not in cluster.active())
        cluster.wait_for(lambda: cluster.health()["status"] == "degraded")
    run_streams(cluster, max_tokens=5)
    killed_ranks = sum(victim is not None for victim in victims)
    cluster.wait_for(lambda: len(cluster.descendants()) <= processes - killed_ranks, 30)  # a zombie would count
    for then, now in zip(before, map(_settled, keepers), strict=True):
        assert now.descriptors <= then.descriptors, (then, now)
        assert now.threads <= then.threads, (then, now)
    return len(victims)


def test_death_of_the_zygote_ends_the_daemon(tmp_path: Path) -> None:
    """Nothing can be started or reaped without it, so a service manager must start over."""
    with Cluster(tmp_path / "run") as cluster:
        pids = cluster.descendants()
        [zygote] = cluster.titled("zygote")
        os.kill(zygote, signal.SIGKILL)
        assert cluster.process.wait(10) == 1
        _wait_gone(pids)


def _wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while (left := proc.alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
