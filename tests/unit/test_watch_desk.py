"""The daemon's end of the contract in docs/watchdog.md, over HTTP, and read by the watchdog's own parser."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from elastic_daemon import protocol as p
from elastic_daemon.membership import RankState, Status
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.metrics import Metrics
from elastic_daemon.watch.desk import WatchdogDesk
from elastic_daemon.watch.gpus import AllowList, Listed
from elastic_daemon.watch.routes import with_watchdog_routes
from tests.unit.test_health import SNAPSHOT, view
from watchdog.bindings import Binding, parse_bindings


class Plane:
    """A deployment of three ranks, the third of them lost."""

    def __init__(self) -> None:
        self.events, self.metrics = EventLog(), Metrics()
        ranks = (
            p.RankHealth(0, RankState.ACTIVE, 0.0, None, 1, "GPU-a"),
            p.RankHealth(1, RankState.SUSPECT, 0.0, "slow", 5, "GPU-b"),
            p.RankHealth(2, RankState.EXCLUDED, 0.0, "gone", 3, "GPU-c"),
        )
        self.now: p.HealthSnapshot | None = dataclasses.replace(SNAPSHOT, ranks=ranks)
        self.rank_pids = {(0, 1): 4711, (1, 5): 4712}
        self.min_ranks = 2
        self.told: list[p.Event] = []

    def snapshot(self) -> p.HealthSnapshot | None:
        return self.now

    def tell(self, event: p.Event) -> None:
        self.told.append(event)


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
async def client(plane: Plane, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    desk = WatchdogDesk(plane, tmp_path)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(with_watchdog_routes(FastAPI(), desk)), base_url="http://daemon"
    ) as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    now = time.time()
    verdict = {
        "id": "5f0c-1", "gpu": "GPU-b", "epoch": 7, "verdict": "exclude", "signal": "xid:79",
        "reason": "GPU has fallen off the bus", "act": True, "held": None, "at": now - 0.2,
        "evidence": [{"signal": "xid:79", "first": now - 0.2, "last": now - 0.2, "count": 1}],
    }  # fmt: skip
    return {name: value for name, value in {**verdict, **changes}.items() if value is not ...}


async def put(client: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    verdict = body(**changes)
    return await client.put(f"/watchdog/verdicts/{verdict['id']}", json=verdict)


async def test_bindings_are_what_the_watchdog_reads(client: httpx.AsyncClient, tmp_path: Path) -> None:
    answer = await client.get("/watchdog/bindings")
    bindings = parse_bindings(answer.json())
    assert (bindings.epoch, bindings.min_ranks, bindings.released) == (7, 2, {})
    assert bindings.instance
    pages = tmp_path / "heartbeats"
    assert bindings.ranks == (
        Binding(0, 1, "GPU-a", (4711,), pages / "rank-1.page"),
        Binding(1, 5, "GPU-b", (4712,), pages / "rank-5.page"),
    )


async def test_bindings_before_the_engine_is_configured(client: httpx.AsyncClient, plane: Plane) -> None:
    plane.now = None
    bindings = parse_bindings((await client.get("/watchdog/bindings")).json())
    assert (bindings.epoch, bindings.ranks) == (0, ())


async def test_a_release_reaches_the_watchdog_with_its_time(plane: Plane, tmp_path: Path) -> None:
    desk = WatchdogDesk(plane, tmp_path)
    before = time.time()
    desk.release_gpu("GPU-b")
    assert before <= parse_bindings(desk.bindings()).released["GPU-b"] <= time.time()
    assert [event["gpu"] for event in plane.events.since(0)] == ["GPU-b"]
    assert plane.told == [p.GpuReleased("GPU-b")]
    first = desk.bindings()["released"]["GPU-b"]
    desk.release_gpu("GPU-b")
    assert desk.bindings()["released"]["GPU-b"] > first, "what has happened since is forgiven too"


async def test_a_verdict_on_a_gpu_reaches_the_controller_once(client: httpx.AsyncClient, plane: Plane) -> None:
    for _ in range(2):
        assert (await put(client)).status_code == 204
    (told,) = plane.told
    assert isinstance(told, p.TelemetryVerdict)
    assert (told.subject, told.ranks, told.verdict, told.act) == ("GPU-b", ((1, 5),), p.VerdictKind.EXCLUDE, True)
    assert told.reason == "xid 79: GPU has fallen off the bus"
    assert 0.15 < time.monotonic() - told.at < 5
    (event,) = plane.events.since(0)
    assert (event["event"], event["gpu"], event["verdict"], event["evidence"][0]["count"]) == (
        "verdict", "GPU-b", "exclude", 1,
    )  # fmt: skip
    metric = 'elastic_watchdog_verdicts_total{signal="xid:79",verdict="exclude"} 1.0'
    assert metric in plane.metrics.render(view())


async def test_the_same_verdict_again_is_fine_in_a_later_epoch(client: httpx.AsyncClient, plane: Plane) -> None:
    await put(client)
    assert plane.now is not None
    plane.now = dataclasses.replace(plane.now, epoch=8)
    assert (await put(client)).status_code == 204
    assert len(plane.told) == 1


async def test_a_verdict_on_a_rank(client: httpx.AsyncClient, plane: Plane) -> None:
    answer = await put(client, gpu=..., rank=1, incarnation=5, verdict="restart-rank", signal="hung", reason="behind")
    assert answer.status_code == 204
    (told,) = plane.told
    assert isinstance(told, p.TelemetryVerdict)
    assert (told.ranks, told.reason) == (((1, 5),), "hung: behind")


async def test_what_is_held_back_says_so(client: httpx.AsyncClient, plane: Plane) -> None:
    await put(client, act=False, held="observe mode")
    (told,) = plane.told
    assert isinstance(told, p.TelemetryVerdict)
    assert not told.act
    assert told.reason.endswith("[observe mode]")


async def test_a_gpu_without_ranks_concerns_nobody(client: httpx.AsyncClient, plane: Plane) -> None:
    for number, gpu in enumerate(("GPU-c", "GPU-elsewhere")):
        assert (await put(client, gpu=gpu, id=f"5f0c-{number}")).status_code == 204
    assert [told.ranks for told in plane.told if isinstance(told, p.TelemetryVerdict)] == [(), ()]


async def test_an_old_time_is_no_part_of_a_recovery(client: httpx.AsyncClient, plane: Plane) -> None:
    await put(client, at=time.time() - 7200)
    await put(client, at=time.time() + 7200, id="5f0c-2")
    old, future = (told.at for told in plane.told if isinstance(told, p.TelemetryVerdict))
    assert 59 < time.monotonic() - old < 65
    assert time.monotonic() - future < 5


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"epoch": 6}, 409, "epoch 6"),
        ({"gpu": ..., "rank": 1, "incarnation": 4}, 404, "incarnation 4"),
        ({"gpu": ..., "rank": 2, "incarnation": 3}, 404, "incarnation 3"),
        ({"rank": 1, "incarnation": 5}, 422, "either gpu, or rank"),
        ({"gpu": ..., "rank": 1}, 422, "either gpu, or rank"),
        ({"verdict": "explode"}, 422, "verdict"),
        ({"act": ...}, 422, "act"),
        ({"epoch": "seven"}, 422, "epoch"),
    ],
)
async def test_what_cannot_be_taken_in_is_refused(
    client: httpx.AsyncClient, plane: Plane, changes: dict[str, Any], status: int, said: str
) -> None:
    answer = await put(client, **changes)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert not plane.told


async def test_other_ids_and_bodies_are_refused(client: httpx.AsyncClient, plane: Plane) -> None:
    assert (await client.put("/watchdog/verdicts/other", json=body())).status_code == 422
    assert (await client.put("/watchdog/verdicts/5f0c-1", content=b"{")).status_code == 400
    assert (await client.put("/watchdog/verdicts/5f0c-1", json=[])).status_code == 422
    assert not plane.told


async def test_verdicts_are_acted_on_while_ranks_start(client: httpx.AsyncClient, plane: Plane) -> None:
    assert plane.now is not None
    plane.now = dataclasses.replace(plane.now, status=Status.STARTING)
    assert (await put(client)).status_code == 204
    (told,) = plane.told
    assert isinstance(told, p.TelemetryVerdict)
    assert (told.ranks, told.act) == (((1, 5),), True)


async def test_nothing_is_acted_on_before_the_engine_is_configured(client: httpx.AsyncClient, plane: Plane) -> None:
    """503: the watchdog tries again. What only informs is taken in."""
    plane.now = None
    assert (await put(client, epoch=0)).status_code == 503
    assert not plane.told
    assert (await put(client, epoch=0, verdict="suspect", act=False, id="5f0c-2")).status_code == 204
    assert len(plane.told) == 1
    assert (await put(client, epoch=0)).status_code == 503, "it was not taken in: the same id may come again"


GPUS: list[dict[str, Any]] = [
    {"uuid": "GPU-a", "index": 0, "fit": True, "reason": "", "verdict": "ok"},
    {"uuid": "GPU-b", "index": 1, "fit": False, "reason": "xid 79: gone", "verdict": "exclude"},
    {"uuid": "GPU-c", "index": None, "fit": True, "reason": "hot", "verdict": "suspect"},
]


async def test_the_controller_hears_which_gpus_there_are(client: httpx.AsyncClient, plane: Plane) -> None:
    assert (await client.put("/watchdog/gpus", json={"gpus": GPUS})).status_code == 204
    assert (await client.put("/watchdog/gpus", json={"gpus": []})).status_code == 204
    assert plane.told == [
        p.GpusSeen(
            (p.GpuSeen("GPU-a", True), p.GpuSeen("GPU-b", False, "xid 79: gone"), p.GpuSeen("GPU-c", True, "hot"))
        ),
        p.GpusSeen(()),
    ]


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ([], 422, ""),
        ({}, 422, "gpus"),
        ({"gpus": [GPUS[0], GPUS[0]]}, 422, "twice"),
        ({"gpus": [{**GPUS[0], "uuid": ""}]}, 422, "uuid"),
        ({"gpus": [{**GPUS[0], "fit": "perhaps"}]}, 422, "fit"),
        ({"gpus": [{**GPUS[0], "verdict": "explode"}]}, 422, "verdict"),
        ({"gpus": [{**GPUS[0], "index": -1}]}, 422, "index"),
        ({"gpus": [{**GPUS[0], "slot": ""}]}, 422, "slot"),
    ],
)
async def test_lists_of_gpus_that_are_none(
    client: httpx.AsyncClient, plane: Plane, sent: Any, status: int, said: str
) -> None:
    answer = await client.put("/watchdog/gpus", json=sent)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert (await client.put("/watchdog/gpus", content=b"{")).status_code == 400
    assert not plane.told


async def test_gpus_are_not_taken_in_where_nobody_could_hear_of_them(client: httpx.AsyncClient, plane: Plane) -> None:
    plane.now = None
    assert (await client.put("/watchdog/gpus", json={"gpus": GPUS})).status_code == 503
    assert not plane.told


async def test_gpus_of_others_are_not_heard_of_and_told_once_when_they_come(plane: Plane, tmp_path: Path) -> None:
    allowed = AllowList("0")
    assert allowed.begin([Listed(0, "GPU-a", "slot-0"), Listed(1, "GPU-b", "slot-1")]) == ("GPU-a",)
    app = with_watchdog_routes(FastAPI(), WatchdogDesk(plane, tmp_path, allowed))
    rows = [{**gpu, "slot": f"slot-{index}"} for index, gpu in enumerate(GPUS)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://daemon") as client:
        for _ in range(2):
            assert (await client.put("/watchdog/gpus", json={"gpus": rows})).status_code == 204
    assert plane.told == [p.GpusSeen((p.GpuSeen("GPU-a", True),))] * 2
    [said] = plane.events.since(0)
    assert (said["event"], said["gpu"], said["slot"]) == ("gpu_not_ours", "GPU-c", "slot-2")


async def test_off_means_off() -> None:
    transport = httpx.ASGITransport(with_watchdog_routes(FastAPI(), None))
    async with httpx.AsyncClient(transport=transport, base_url="http://daemon") as client:
        assert (await client.get("/watchdog/bindings")).status_code == 404
        assert "--watchdog off" in (await client.put("/watchdog/verdicts/1", json=body())).text
        assert "--watchdog off" in (await client.put("/watchdog/gpus", json={"gpus": GPUS})).text


async def test_gpus_are_those_of_the_snapshot(client: httpx.AsyncClient, plane: Plane) -> None:
    """A rank that has moved to another GPU is meant by verdicts on that one."""
    assert plane.now is not None
    ranks = (dataclasses.replace(plane.now.ranks[0], gpu="GPU-b"), *plane.now.ranks[1:])
    plane.now = dataclasses.replace(plane.now, ranks=ranks)
    await put(client)
    (told,) = plane.told
    assert isinstance(told, p.TelemetryVerdict)
    assert told.ranks == ((0, 1), (1, 5))
