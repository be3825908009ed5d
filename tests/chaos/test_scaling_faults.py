"""Faults in the middle of an operator's order, and many orders and losses in a row: clients notice none of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import PROMPTS, Cluster, Stream, Trigger, assert_same, run_streams, stream

pytestmark = pytest.mark.chaos

RANKS, MOST = 4, 6
OPTIONS = ("--data-parallel-size", str(RANKS), "--max-ranks", str(MOST), "--spare-gpus", str(MOST - RANKS))
RESTORED = ("--restore", "auto", "--gpu-probation", "1", "--watchdog-flags=--probation 2")

CLIENTS, TOKENS = 8, 80
FLOWING = 5 * CLIENTS
"""Tokens, in all, after which the streams of a load are taken to run."""

STILL_S = 2.0

SETTLED_S = 180.0
"""Some ranks start, a few seconds each where nothing else runs."""


@dataclass(frozen=True)
class Service:
    """A daemon of `RANKS` ranks, what clients hear from it undisturbed, and its expert safety after the start."""

    cluster: Cluster
    reference: list[Stream]
    safety: int

    def order(self, size: int) -> dict[str, Any]:
        """Order this number of ranks. Returns the operation, which has begun."""
        body = {"new_data_parallel_size": size, "drain_timeout": SETTLED_S, "wait": False}
        answer = httpx.post(f"{self.cluster.url}/scale_elastic_ep", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return self.operation(answer.json()["operation_id"])

    def operation(self, id_: str) -> dict[str, Any]:
        report: dict[str, Any] = self.cluster.control(f"/operations/{id_}").json()
        return report

    def outcome(self, operation: dict[str, Any]) -> dict[str, Any]:
        """The operation's last report, once it has ended."""
        ended = self.cluster.wait_for(
            lambda: (report := self.operation(operation["id"]))["state"] != "running" and report, SETTLED_S + 60
        )
        assert isinstance(ended, dict)
        return ended

    def scale(self, size: int) -> None:
        report = self.outcome(self.order(size))
        assert report["state"] == "done", report
        self.settle(size)

    def settle(self, size: int) -> None:
        """All of `size` ranks serve, as many as are wanted."""

        def whole() -> bool:
            health = self.cluster.health()
            return health["status"] == "ok" and health["data_parallel_size"] == {"target": size, "active": size}

        self.cluster.wait_for(whole, SETTLED_S)

    def events_since(self, last: int, name: str, rank: int) -> list[dict[str, Any]]:
        events = self.cluster.control("/events", since=last).json()
        return [event for event in events if event["event"] == name and event["rank"] == rank]

    @property
    def last_event(self) -> int:
        last: int = self.cluster.control("/events").json()[-1]["id"]
        return last


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("sf", numbered=True)  # short: paths of Unix sockets are limited
    with Cluster(directory / "run", *OPTIONS, *RESTORED) as cluster:
        safety = cluster.health()["expert_safety"]
        yield Service(cluster, run_streams(cluster, PROMPTS[:CLIENTS], TOKENS), safety)


@pytest.fixture
def service(served: Service) -> Iterator[Service]:
    """As many ranks as at the start, before the test and, with all experts in their places, after it."""
    served.scale(RANKS)
    yield served
    served.scale(RANKS)
    served.cluster.verify_experts()


@contextlib.contextmanager
def under_load(service: Service) -> Iterator[None]:
    """Clients stream again and again meanwhile. Each of their answers must be the undisturbed one."""
    stop, flowing = threading.Event(), threading.Event()

    async def answers(client: httpx.AsyncClient, prompt: str, trigger: Trigger) -> list[Stream]:
        heard = []
        while not stop.is_set():
            heard.append(await stream(client, prompt, TOKENS, trigger))
        return heard

    async def clients() -> list[list[Stream]]:
        trigger = Trigger(flowing.set, FLOWING)
        async with httpx.AsyncClient(base_url=service.cluster.url, timeout=180) as client:
            return await asyncio.gather(*(answers(client, prompt, trigger) for prompt in PROMPTS[:CLIENTS]))

    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(asyncio.run, clients())
        try:
            service.cluster.wait_for(lambda: flowing.is_set() or load.done(), 60)
            yield
        finally:
            stop.set()
        heard = load.result()
    for got, want in zip(heard, service.reference, strict=True):
        assert_same(got, [want] * len(got))


def row_of(service: Service, rank: int) -> dict[str, Any]:
    row: dict[str, Any]
    for row in service.cluster.health()["ranks"]:
        if row["rank"] == rank:
            return row
    return {"state": None, "pids": []}


def kill(pid: int) -> None:
    """A rank that retires may have left a moment before: what results must be right then, too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_joining_rank_that_dies_is_started_again(service: Service) -> None:
    before = service.last_event
    with under_load(service):
        operation = service.order(RANKS + 1)
        (joining,) = operation["ranks"]
        pid = service.cluster.wait_for(lambda: service.cluster.pid(joining), 60)
        assert row_of(service, joining)["state"] in ("starting", "standby", "joining")
        os.kill(pid, signal.SIGKILL)
        report = service.outcome(operation)
        assert report["state"] == "done", report
        service.settle(RANKS + 1)
        (lost,) = service.events_since(before, "rank_excluded", joining)
        starts = [event["incarnation"] for event in service.events_since(before, "rank_starting", joining)]
        assert starts[0] == lost["incarnation"] and len(starts) == 2
        assert service.order(RANKS + 1)["state"] == "done", "nothing to do, and nothing in the way"
        service.scale(RANKS)


def is_starting(service: Service, joining: int, before: int) -> bool:
    return bool(row_of(service, joining)["pids"])


def is_let_in(service: Service, joining: int, before: int) -> bool:
    return bool(service.events_since(before, "rank_standby", joining))


@pytest.mark.parametrize("moment", [is_starting, is_let_in])
def test_a_survivor_that_dies_while_a_rank_joins(service: Service, moment: Callable[[Service, int, int], bool]) -> None:
    before = service.last_event
    with under_load(service):
        operation = service.order(RANKS + 1)
        (joining,) = operation["ranks"]
        service.cluster.wait_for(lambda: moment(service, joining, before), 60)
        service.cluster.kill(1)
        report = service.outcome(operation)
        assert report["state"] == "done", report
        service.settle(RANKS + 1)
        assert service.events_since(before, "rank_excluded", 1)
        service.scale(RANKS)


@pytest.mark.parametrize("victim", [3, 0])
def test_a_rank_that_dies_while_others_retire(service: Service, victim: int) -> None:
    """3 is one of those that leave, 0 one of those that stay: without it two cannot leave any more."""
    pid = service.cluster.pid(victim)
    with under_load(service):
        operation = service.order(2)
        assert operation["ranks"] == [2, 3]
        kill(pid)
        report = service.outcome(operation)
        assert report["state"] in ("done", "rolled back"), report
        service.settle(2 if report["state"] == "done" else RANKS)
        service.scale(3)


@pytest.mark.parametrize("delay_s", [0.02, 0.06, 0.1, 0.15])
def test_a_store_that_cannot_be_reached_while_the_group_changes(service: Service, delay_s: float) -> None:
    """The supervisor has it, and stands still: at the end of a step, in the fence, in the regroup, or after it."""
    supervisor = service.cluster.process.pid
    with under_load(service):
        operation = service.order(RANKS - 1)
        time.sleep(delay_s)
        os.kill(supervisor, signal.SIGSTOP)
        try:
            time.sleep(STILL_S)
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert service.outcome(operation)["state"] == "done"
        service.settle(RANKS - 1)


def holdings(cluster: Cluster) -> dict[str, int]:
    """What may not become more: processes, and what the two that are never replaced hold."""
    (frontend,) = cluster.titled("front end")
    held = {"processes": len(cluster.descendants())}
    for name, pid in {"supervisor": cluster.process.pid, "front end": frontend}.items():
        held[f"descriptors of the {name}"] = len(os.listdir(f"/proc/{pid}/fd"))
        held[f"threads of the {name}"] = len(os.listdir(f"/proc/{pid}/task"))
    return held


def test_losses_and_orders_again_and_again(service: Service) -> None:
    cluster = service.cluster

    def as_safe_as_before() -> bool:
        return bool(cluster.health()["expert_safety"] >= service.safety)

    def lose_and_restore(victim: int) -> None:
        before, pid = service.last_event, cluster.pid(victim)
        os.kill(pid, signal.SIGKILL)
        cluster.wait_for(lambda: service.events_since(before, "rank_excluded", victim), 30)
        service.settle(RANKS)
        assert cluster.pid(victim) != pid
        cluster.wait_for(as_safe_as_before, 30)

    def shrink_and_grow() -> None:
        service.scale(2)
        for size in (MOST, RANKS):  # copies in host memory count too, so it may be safer than after the start
            service.scale(size)
            cluster.wait_for(as_safe_as_before, 30)

    with under_load(service):
        lose_and_restore(1)
        shrink_and_grow()
    before = holdings(cluster)
    with under_load(service):
        lose_and_restore(0)
        shrink_and_grow()
        lose_and_restore(3)

    def grown() -> dict[str, tuple[int, int]]:
        return {name: (before[name], now) for name, now in holdings(cluster).items() if now > before[name]}

    with contextlib.suppress(AssertionError):  # connections of clients that have just gone, and the dead not yet reaped
        cluster.wait_for(lambda: not grown(), 30)
    assert not grown()
    assert "elastic_requests_lost_total 0.0" in cluster.control("/metrics").text
