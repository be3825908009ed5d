"""A real watchdog over simulated GPUs, beside a real deployment under load: no client may notice what it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests import proc
from tests.e2e.cluster import Cluster, Stream, assert_same, run_streams
from watchdog.status import read_status

pytestmark = pytest.mark.e2e

RANKS = 7


class Watched:
    """One cluster for many faults: with seven ranks and five to spare, each test may lose one."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.reference: list[Stream] = run_streams(cluster)

    def simulate(self, *words: str) -> None:
        command = [sys.executable, "-m", "watchdog.cli", "simulate", "--runtime-dir", str(self.cluster.runtime_dir)]
        subprocess.run([*command, *words], check=True, timeout=20, stdout=subprocess.DEVNULL)

    def under_load(self, fault: Callable[[], Any]) -> None:
        """Clients see what they saw undisturbed, whatever `fault` does."""
        assert_same(run_streams(self.cluster, during=fault), self.reference)

    def victim(self) -> int:
        """A rank that nothing is said against."""
        return max(self.cluster.active())

    def state(self, rank: int) -> str:
        state: str = self.cluster.health()["ranks"][rank]["state"]
        return state

    def until_lost(self, rank: int, timeout_s: float = 10.0) -> dict[str, Any]:
        """The recovery that took the rank out."""

        def report() -> dict[str, Any] | None:
            health = self.cluster.health()
            last = health["last_shrink"]
            return last if last and rank in last["ranks"] and health["status"] == "degraded" else None

        found: dict[str, Any] = self.cluster.wait_for(report, timeout_s)
        return found

    def watchdog(self, state: str, timeout_s: float = 15.0) -> dict[str, Any]:
        """What `/health` says of the watchdog once it is in this state."""

        def said() -> dict[str, Any] | None:
            watchdog: dict[str, Any] = self.cluster.health()["watchdog"]
            return watchdog if watchdog["state"] == state else None

        found: dict[str, Any] = self.cluster.wait_for(said, timeout_s)
        return found

    def until_watching(self) -> None:
        """It is alive, knows the ranks, and listens to the driver's events of all their GPUs."""

        def watching() -> bool:
            status = read_status(self.cluster.runtime_dir)
            fresh = status["pid"] == self.cluster.health()["watchdog"]["pid"] and status["age_s"] < 2
            health = self.cluster.health()
            bound = {row["gpu"] for row in health["ranks"] if row["state"] in ("active", "suspect")}
            return fresh and status["epoch"] == health["epoch"] and bound <= set(status["driver"]["listening"])

        self.watchdog("alive")
        self.cluster.wait_for(watching, 20)


def zombies(cluster: Cluster) -> list[int]:
    """Children of the supervisor that have ended and that nobody has waited for."""
    return [pid for pid in cluster.descendants() if proc.state(pid) == "Z"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    runtime_dir = tmp_path_factory.mktemp("wd", numbered=True) / "run"
    flags = "--max-exclusions 10 --exclusion-window 60"
    options = ("--data-parallel-size", str(RANKS), "--survive-losses", "5", "--spare-gpus", "1")
    with Cluster(runtime_dir, *options, f"--watchdog-flags={flags}") as cluster:
        cluster.wait_for(lambda: cluster.health()["watchdog"]["state"] == "alive", 30)
        watched = Watched(cluster)
        watched.until_watching()
        yield watched


def test_ranks_are_bound_to_gpus_and_tcp_knows_nothing_of_it(watched: Watched) -> None:
    cluster = watched.cluster
    rows = cluster.health()["ranks"]
    bound = [row["gpu"] for row in rows]
    bindings = cluster.control("/watchdog/bindings").json()
    assert [one["gpu"] for one in bindings["ranks"]] == bound
    assert [one["pids"] for one in bindings["ranks"]] == [row["pids"] for row in rows]
    assert bindings["min_ranks"] == 2
    listed = [gpu["uuid"] for gpu in read_status(cluster.runtime_dir)["gpus"]]
    assert listed[:RANKS] == bound
    assert len(listed) == RANKS + 1
    assert httpx.get(f"{cluster.url}/watchdog/bindings").status_code == 404
    assert httpx.put(f"{cluster.url}/watchdog/verdicts/1", json={}).status_code == 404


def test_nobody_but_the_watchdogs_children_sees_the_simulated_driver(watched: Watched) -> None:
    cluster = watched.cluster
    seeing = []
    for pid in [cluster.process.pid, *cluster.descendants()]:
        command = proc.read(pid, "cmdline").replace("\0", " ")
        if "libnvidia-ml" in proc.read(pid, "maps") or "ELASTIC_NVML_SIMULATOR" in proc.read(pid, "environ"):
            seeing.append(command)
    assert seeing
    assert all("watchdog.nvml_child" in command for command in seeing), seeing


def test_xid_79_under_load(watched: Watched) -> None:
    victim = watched.victim()
    watched.until_watching()
    watched.under_load(lambda: watched.simulate("xid", "--gpu", str(victim), "--code", "79"))
    report = watched.until_lost(victim)
    assert "xid 79" in report["cause"]
    assert report["requests"]["lost"] == 0
    assert report["requests"]["replayed"] > 0
    assert 0 < report["seconds"]["detect"] < 2
    (row,) = [row for row in watched.cluster.health()["ranks"] if row["rank"] == victim]
    assert (row["state"], row["pids"]) == ("excluded", [])
    assert "xid 79" in row["reason"]
    (verdict,) = [
        event for event in watched.cluster.events("verdict") if event.get("gpu") == row["gpu"] and event["act"]
    ]
    assert verdict["evidence"][0]["signal"] == "xid:79"
    metrics = watched.cluster.control("/metrics").text
    assert 'elastic_watchdog_verdicts_total{signal="xid:79",verdict="exclude"} 1.0' in metrics
    watched.cluster.verify_experts()


def test_the_watchdog_dies_and_hangs_and_a_rank_dies_meanwhile(watched: Watched) -> None:
    cluster = watched.cluster
    first = watched.watchdog("alive")["pid"]
    os.kill(first, signal.SIGKILL)

    def down() -> dict[str, Any] | None:
        health = cluster.health()
        return health if health["watchdog"]["state"] == "down" else None

    health = cluster.wait_for(down, 15)
    assert "SIGKILL" in health["watchdog"]["reason"] and "SIGKILL" in health["reason"]
    assert health["status"] == "degraded"
    watched.until_watching()
    second = watched.watchdog("alive")["pid"]
    assert second != first
    assert "watchdog" not in cluster.health()["reason"]

    os.kill(second, signal.SIGSTOP)
    watched.watchdog("down")
    assert "has not moved for 3 s" in [event["reason"] for event in cluster.events("watchdog_down")][-1]
    victim = watched.victim()
    watched.under_load(lambda: cluster.kill(victim))
    assert watched.until_lost(victim)["cause"] == f"rank {victim}: process ended"
    watched.until_watching()
    assert watched.watchdog("alive")["pid"] != second
    cluster.wait_for(lambda: not zombies(cluster))


def test_a_flapping_gpu_and_one_that_is_noisy(watched: Watched) -> None:
    """Noise on one GPU is shown and costs nothing; the one that comes and goes is removed, once."""
    cluster = watched.cluster
    epoch, (noisy, victim) = cluster.health()["epoch"], cluster.active()[-2:]
    watched.until_watching()

    def disturb() -> None:
        watched.simulate("throttle", "--gpu", str(noisy), "--reason", "thermal")
        watched.simulate("ecc", "--gpu", str(noisy), "--corrected", "--count", "3")
        watched.simulate("xid", "--gpu", str(noisy), "--code", "13")
        watched.simulate("flap", "--gpu", str(victim), "--period", "1")

    watched.under_load(disturb)
    report = watched.until_lost(victim)
    assert report["ranks"] == [victim]
    assert watched.state(noisy) == "suspect"
    doubts = cluster.health()["ranks"][noisy]["reason"]
    assert "thermal" in doubts or "corrected ECC" in doubts  # whichever came to the daemon first
    time.sleep(1.5)  # more of its turns change nothing
    assert (cluster.health()["epoch"], watched.state(noisy)) == (epoch + 1, "suspect")
    watched.simulate("heal", "--gpu", str(noisy))
    watched.simulate("lose", "--gpu", str(victim))  # for good: each turn has the driver opened anew
    cluster.verify_experts()


def test_a_gpu_that_goes_bad_is_drained(watched: Watched) -> None:
    """One NVLink error is a doubt; a second one confirms it. Requests go on elsewhere with what they have."""
    victim = watched.victim()
    watched.until_watching()

    def fail_twice() -> None:
        watched.simulate("xid", "--gpu", str(victim), "--code", "74")
        watched.cluster.wait_for(lambda: watched.state(victim) == "suspect")
        watched.simulate("xid", "--gpu", str(victim), "--code", "74")

    watched.under_load(fail_twice)
    report = watched.until_lost(victim)
    assert "xid 74" in report["cause"]
    assert report["requests"]["lost"] == 0
    assert [event["verdict"] for event in watched.cluster.events("verdict") if event["act"]][-1] == "drain"


def test_a_wedged_driver(watched: Watched) -> None:
    victim = watched.victim()
    watched.under_load(lambda: watched.simulate("hang", "--gpu", str(victim)))
    report = watched.until_lost(victim)
    assert "driver_wedged" in report["cause"]
    assert report["requests"]["lost"] == 0


def test_the_last_ranks_that_hold_every_expert_are_never_excluded(watched: Watched) -> None:
    """The bound of the daemon itself: the watchdog's own may be looser, or its bindings old."""
    cluster = watched.cluster
    kept = [rank for rank in range(RANKS) if watched.state(rank) in ("active", "suspect")]
    assert len(kept) == 2
    watched.simulate("lose", "--gpu", str(kept[1]))
    gpu = cluster.health()["ranks"][kept[1]]["gpu"]
    held = cluster.wait_for(lambda: [v for v in cluster.events("verdict") if v.get("gpu") == gpu and v.get("held")])
    assert "2 must stay" in held[-1]["held"]
    verdict = {"id": "by-hand-1", "gpu": gpu, "epoch": cluster.health()["epoch"], "verdict": "exclude"}
    verdict |= {"signal": "lost", "reason": "it is lost", "act": True, "at": time.time()}
    transport = httpx.HTTPTransport(uds=str(cluster.runtime_dir / "http.sock"))
    with httpx.Client(transport=transport, base_url="http://daemon") as client:
        assert client.put("/watchdog/verdicts/by-hand-1", json=verdict).status_code == 204
    assert "2 ranks are needed" in cluster.events("verdict_refused")[-1]["why"]
    health = cluster.health()
    assert (health["status"], health["data_parallel_size"]["active"]) == ("degraded", 2)
    assert "kept: 2 ranks are needed" in health["reason"]
    assert health["ranks"][kept[1]]["state"] == "suspect"
    assert_same(run_streams(cluster), watched.reference)
