"""`/placement` and `/recoveries`: counts of a placement, against a slow and plain count of the same."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest

from elastic_daemon.app import make_control_app
from elastic_daemon.placement import EMPTY, Placement, copies, expert_safety, initial
from elastic_daemon.protocol import RecoveryKind, RecoveryReport, RequestCounts
from elastic_daemon.routes.placement_view import PlacementView
from elastic_daemon.routes.recovery_history import KEPT, RecoveryHistory
from tests.unit.operator_plane import OperatorPlane

# Two layers of three experts. Rank 5 holds expert 0 of layer 0 twice, which is one copy.
SMALL = Placement(
    3,
    {
        2: np.array([[0, 1], [0, 1]]),
        5: np.array([[0, 0], [1, 2]]),
        7: np.array([[2, EMPTY], [2, 1]]),
    },
)


def test_all_layers() -> None:
    assert PlacementView(4, SMALL, (2, 5, 7)).to_json() == {
        "epoch": 4,
        "layers": 2,
        "layer": None,
        "experts": 3,
        "slots_per_rank": 2,
        "ranks": [2, 5, 7],
        "held": [[2, 2, 0], [1, 1, 1], [0, 1, 2]],
        "fewest": [1, 1, 1],
        "copies": [0, 3, 2, 1],
        "sole": [2, 0, 1],
        "host_copies": 0,
    }


def test_one_layer() -> None:
    body = PlacementView(4, SMALL, (2, 5, 7)).to_json(1)
    assert (body["layer"], body["held"]) == (1, [[1, 1, 0], [0, 1, 1], [0, 1, 1]])
    assert (body["fewest"], body["copies"], body["sole"]) == ([1, 3, 2], [0, 1, 1, 1], [1, 0, 0])


def test_a_rank_that_has_gone_counts_no_more() -> None:
    body = PlacementView(5, SMALL, (5, 7)).to_json()
    assert (body["ranks"], body["fewest"]) == ([5, 7], [0, 0, 1])
    assert body["copies"] == [2, 2, 2]
    assert body["sole"] == [1, 1]


def test_a_copy_in_host_memory_makes_an_expert_safe() -> None:
    view = PlacementView(4, SMALL, (2, 5, 7), frozenset({(0, 1), (1, 0), (1, 1)}))
    assert view.to_json()["sole"] == [0, 0, 1]
    assert (view.to_json()["host_copies"], view.to_json(1)["host_copies"]) == (3, 2)
    assert view.to_json()["fewest"] == [1, 1, 1], "these are copies in ranks"


@pytest.mark.parametrize(("experts", "layers", "ranks", "slots"), [(16, 4, 4, 8), (60, 3, 7, 11), (256, 58, 72, 4)])
def test_it_agrees_with_the_placement(experts: int, layers: int, ranks: int, slots: int) -> None:
    placement = initial(experts, layers, range(ranks), slots)
    body = PlacementView(1, placement, placement.ranks).to_json()
    assert body["fewest"] == copies(placement).min(axis=0).tolist()
    assert sum(body["copies"]) == experts * layers
    assert sum(body["sole"]) == body["copies"][1]
    assert min(body["fewest"]) - 1 == expert_safety(placement)


def test_a_large_model_is_told_in_little() -> None:
    """58 layers of 256 experts on 72 ranks: the page has to load in a second."""
    placement = initial(256, 58, range(72), 4)
    body = json.dumps(PlacementView(1, placement, placement.ranks).to_json(), separators=(",", ":"))
    assert len(body) < 60_000


def test_what_is_the_same() -> None:
    view = PlacementView(4, SMALL, (2, 5))
    assert view.is_same(PlacementView(4, SMALL, (2, 5)))
    others = PlacementView(5, SMALL, (2, 5)), PlacementView(4, SMALL, (2,))
    copied = PlacementView(4, SMALL, (2, 5), frozenset({(0, 0)}))
    assert not any(view.is_same(other) for other in (None, *others, copied))


@pytest.fixture
def plane() -> OperatorPlane:
    return OperatorPlane()


@pytest.fixture
async def client(plane: OperatorPlane) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_control_app(plane))
    async with httpx.AsyncClient(transport=transport, base_url="http://daemon") as client:
        yield client


async def test_placement_follows_the_group(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    before = (await client.get("/placement")).json()
    assert (before["ranks"], before["layers"], before["experts"]) == ([0, 1, 2, 3], 2, 16)
    one = (await client.get("/placement", params={"layer": 1})).json()
    assert {count for row in one["held"] for count in row} <= {0, 1}
    plane.lose(2)
    after = (await client.get("/placement")).json()
    assert (after["ranks"], after["epoch"]) == ([0, 1, 3], before["epoch"] + 1)
    assert min(after["fewest"]) >= 1


async def test_no_such_layer(client: httpx.AsyncClient) -> None:
    for layer in (-1, 2):
        answer = await client.get("/placement", params={"layer": layer})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"layer: expected 0 to 1, got {layer}")
    assert (await client.get("/placement", params={"layer": "x"})).status_code == 422


async def test_before_the_first_group(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    plane.controller = None
    answer = await client.get("/placement")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


async def test_recoveries(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    seconds = {"detect": 0.01, "total": 0.05}
    report = RecoveryReport(3, RecoveryKind.SHRINK, (2,), "killed", seconds, RequestCounts(4, 2, 1, 0))
    plane.recoveries.record(report, 3, 1e9)
    assert (await client.get("/recoveries")).json() == [
        {
            "epoch": 3,
            "kind": "shrink",
            "ranks": [2],
            "cause": "killed",
            "seconds": seconds,
            "requests": {"kept": 4, "replayed": 2, "restarted": 1, "lost": 0},
            "active": 3,
            "ended": "2001-09-09T01:46:40.000+00:00",
        }
    ]


def test_recoveries_are_kept_up_to_a_limit() -> None:
    history = RecoveryHistory()
    for epoch in range(KEPT + 3):
        history.record(RecoveryReport(epoch, RecoveryKind.GROW, (), "", {}, None), 4, 1e9)
    assert [row["epoch"] for row in history.to_json()] == list(range(3, KEPT + 3))
