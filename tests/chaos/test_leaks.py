"""Nothing accumulates: not over many regroups, and nothing outlives a daemon."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

REGROUPS = 50


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


def test_many_regroups_leave_memory_descriptors_and_threads_flat(tmp_path: Path) -> None:
    """A rank whose connections break again and again: faults without a death, the same members regroup each time."""
    fault = {"rank": 1, "every_s": 0.9}
    with Cluster(tmp_path / "run", env={"ELASTIC_FAULT_LINKS": json.dumps(fault)}) as cluster:
        reference = run_streams(cluster, max_tokens=60)
        pids = [cluster.pid(rank) for rank in cluster.active()]
        first = cluster.health()["epoch"]
        before = [Usage.of(pid) for pid in pids]
        while cluster.health()["epoch"] - first < REGROUPS:
            assert_same(run_streams(cluster, max_tokens=60), reference)
        after = [Usage.of(pid) for pid in pids]
        assert not cluster.events("rank_excluded")
        # Now and then gloo never ends a collective that was cut; such a group is left behind, and said so.
        abandoned = cluster.log.count("group_abandoned")
    for then, now in zip(before, after, strict=True):
        assert now.descriptors <= then.descriptors + 4 + 16 * abandoned, (then, now)
        assert now.threads <= then.threads + 1 + 4 * abandoned, (then, now)
        assert now.private_kib <= then.private_kib + 64 * 1024, (then, now)


def test_nothing_outlives_a_daemon(tmp_path: Path) -> None:
    """Two deaths and a drain, then a SIGKILL of the supervisor: no process, socket, file or shared memory is left."""
    shared = set(os.listdir("/dev/shm"))
    runtime_dir = tmp_path / "run"
    with Cluster(runtime_dir) as cluster:
        pids = [cluster.process.pid, *cluster.descendants()]
        cluster.kill(0)
        cluster.wait_for(lambda: cluster.health()["status"] == "degraded")
        cluster.kill(1)
        cluster.wait_for(lambda: len(cluster.active()) == 2 and cluster.health()["status"] == "degraded")
    assert cluster.process.returncode == 0
    assert not _alive(pids)
    assert [path.name for path in runtime_dir.iterdir() if path.name != "daemon.lock"] == []

    with Cluster(runtime_dir) as cluster:
        pids = [cluster.process.pid, *cluster.descendants()]
        os.kill(cluster.process.pid, signal.SIGKILL)
        cluster.process.wait()
        _wait_gone(pids)

    with Cluster(runtime_dir) as cluster:  # what the killed one left behind is no obstacle
        run_streams(cluster, max_tokens=5)
    assert set(os.listdir("/dev/shm")) == shared


def test_death_of_the_zygote_ends_the_daemon(tmp_path: Path) -> None:
    """Nothing can be started or reaped without it, so a service manager must start over."""
    with Cluster(tmp_path / "run") as cluster:
        pids = cluster.descendants()
        (zygote,) = [pid for pid in pids if "zygote" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(zygote, signal.SIGKILL)
        assert cluster.process.wait(10) == 1
        _wait_gone(pids)


def _alive(pids: list[int]) -> list[int]:
    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return [pid for pid in pids if running(pid)]


def _wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while (left := _alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
