"""Operators' routes over the real controller, with ranks that do as they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_daemon.app import make_control_app
from elastic_daemon.routes import operations
from elastic_daemon.routes.order_bodies import MAX_BODY_BYTES
from tests.unit.operator_plane import GPU, OperatorPlane

DEEDS = ("drain", "exclude", "release")


@pytest.fixture
def plane() -> OperatorPlane:
    return OperatorPlane()


def client_of(plane: OperatorPlane) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_control_app(plane)), base_url="http://daemon")


@pytest.fixture
async def client(plane: OperatorPlane) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(plane) as client:
        yield client


async def scale(client: httpx.AsyncClient, size: int, **more: Any) -> httpx.Response:
    return await client.post("/scale_elastic_ep", json={"new_data_parallel_size": size, **more})


def message(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert set(error) == {"message", "type", "code"}
    text: str = error["message"]
    return text


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_down_and_up_with_vllms_body(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    for size, ranks in ((3, [0, 1, 2]), (6, [0, 1, 2, 3, 4, 5]), (2, [0, 1])):
        answer = await scale(client, size, drain_timeout=60)
        assert answer.status_code == 200
        body = answer.json()
        assert set(body) == {"message", "operation_id", "data_parallel_size"}
        assert body["data_parallel_size"] == size
        assert plane.active == ranks
    assert plane.stored == [3, 6, 2]


async def test_those_named_leave(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    assert (await scale(client, 2, retire_ranks=[0, 2])).status_code == 200
    assert plane.active == [1, 3]


async def test_the_same_number_again(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    answer = await scale(client, 4)
    assert (answer.status_code, answer.json()["data_parallel_size"]) == (200, 4)
    assert plane.active == [0, 1, 2, 3]


async def test_without_waiting(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    plane.play = False
    answer = await scale(client, 3, wait=False)
    assert answer.status_code == 200
    id_ = answer.json()["operation_id"]
    assert answer.json()["data_parallel_size"] == 3
    running = (await client.get(f"/operations/{id_}")).json()
    assert (running["state"], running["ended"], running["error"]) == ("running", None, None)
    assert running["progress"] == {"from": 4, "to": 3, "active": 4}, "who leaves serves meanwhile"
    plane.resume()
    done = (await client.get(f"/operations/{id_}")).json()
    assert (done["state"], done["phase"], done["message"]) == ("done", "done", "serving with 3 ranks")
    assert done["ranks"] == [3]
    assert datetime.fromisoformat(done["ended"]) >= datetime.fromisoformat(done["started"])


async def test_waiting_lasts_until_the_end(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    plane.play = False
    waiting = asyncio.create_task(scale(client, 3))
    await until(lambda: plane.operations.busy)
    assert (await client.post("/is_scaling_elastic_ep")).json() == {"is_scaling_elastic_ep": True}
    assert not waiting.done()
    plane.resume()
    assert (await waiting).status_code == 200
    assert (await client.post("/is_scaling_elastic_ep")).json() == {"is_scaling_elastic_ep": False}


async def test_another_operation_is_running(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    plane.play = False
    running = (await scale(client, 3, wait=False)).json()["operation_id"]
    busy = await scale(client, 2)
    assert busy.status_code == 409
    assert running in message(busy)
    assert busy.json()["operation_id"] == running
    plane.resume()
    assert (await scale(client, 2)).status_code == 200


async def test_the_deadline_passes(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    plane.play = False
    waiting = asyncio.create_task(scale(client, 3, drain_timeout=5))
    await until(lambda: plane.operations.busy)
    plane.pass_time(5)
    late = await waiting
    assert late.status_code == 408
    assert "5 s" in message(late)
    plane.resume()
    assert plane.active == [0, 1, 2, 3]
    operation = (await client.get(f"/operations/{late.json()['operation_id']}")).json()
    assert operation["state"] == "timed out"
    assert operation["error"] == operation["message"] == message(late)


async def test_what_fails_is_undone_and_says_what_failed(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    plane.play = False
    waiting = asyncio.create_task(scale(client, 2))
    await until(lambda: plane.operations.busy)
    plane.lose(0)
    plane.lose(1)
    plane.resume()
    failed = await waiting
    assert failed.status_code == 500
    assert "2 ranks are needed to hold every expert" in message(failed)
    assert plane.active == [2, 3]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "new_data_parallel_size is required"),
        (b"{", "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b'{"new_data_parallel_size": 3}}', "the body is no JSON"),
        (b"[3]", "the body: input should be an object, got [3]"),
        (b"3", "the body: input should be an object, got 3"),
        (b"null", "the body: input should be an object, got None"),
        (b"{}", "new_data_parallel_size is required"),
        (b'{"new_data_parallel_size": null}', "new_data_parallel_size: input should be a valid integer, got None"),
        (b'{"new_data_parallel_size": "3"}', "new_data_parallel_size: input should be a valid integer, got '3'"),
        (b'{"new_data_parallel_size": true}', "new_data_parallel_size: input should be a valid integer, got True"),
        (b'{"new_data_parallel_size": 3.0}', "new_data_parallel_size: input should be a valid integer"),
        (b'{"new_data_parallel_size": 3.5}', "new_data_parallel_size: input should be a valid integer"),
        (b'{"new_data_parallel_size": [3]}', "new_data_parallel_size: input should be a valid integer, got [3]"),
        (b'{"new_data_parallel_size": 0}', "new_data_parallel_size: input should be greater than 0, got 0"),
        (b'{"new_data_parallel_size": -1}', "new_data_parallel_size: input should be greater than 0, got -1"),
        (b'{"new_data_parallel_size": 7}', "must be at most 6, got 7 (see --max-ranks)"),
        (b'{"new_data_parallel_size": 1}', "must be at least 2, got 1: fewer ranks cannot hold every expert"),
        (b'{"new_data_parallel_size": ' + b"9" * 4000 + b"}", "must be at most 6, got 999"),
        (b'{"new_data_parallel_size": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": 0}', "drain_timeout: input should be greater than 0, got 0"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": -5}', "drain_timeout: input should be greater than 0"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": "60"}', "drain_timeout: input should be a valid number"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": true}', "drain_timeout: input should be a valid number"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": null}', "drain_timeout: input should be a valid number"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": NaN}', "drain_timeout"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": 1e999}', "drain_timeout"),
        (b'{"new_data_parallel_size": 3, "drain_timeout": 1e6}', "drain_timeout: input should be less than or equal"),
        (b'{"new_data_parallel_size": 3, "wait": 1}', "wait: input should be a valid boolean, got 1"),
        (b'{"new_data_parallel_size": 3, "wait": "yes"}', "wait: input should be a valid boolean, got 'yes'"),
        (b'{"new_data_parallel_size": 3, "retire_ranks": 3}', "retire_ranks: input should be a valid array, got 3"),
        (b'{"new_data_parallel_size": 3, "retire_ranks": ["3"]}', "retire_ranks[0]: input should be a valid integer"),
        (b'{"new_data_parallel_size": 3, "retire_ranks": [true]}', "retire_ranks[0]: input should be a valid integer"),
        (b'{"new_data_parallel_size": 3, "retire_ranks": [-1]}', "retire_ranks[0]: input should be greater"),
        (b'{"new_data_parallel_size": 2, "retire_ranks": [3, 3]}', "retire_ranks names rank 3 more than once"),
        (b'{"new_data_parallel_size": 3, "retire_ranks": [9]}', "retire_ranks: [9] do not serve"),
        (b'{"new_data_parallel_size": 3, "retire_ranks": [2, 3]}', "retire_ranks"),
        (b'{"new_data_parallel_size": 2, "retire_ranks": [3]}', "retire_ranks"),
        (b'{"new_data_parallel_size": 5, "retire_ranks": [3]}', "retire_ranks"),
        (b'{"new_data_parallel_size": 3, "retire": [3]}', "retire is not known; expected are drain_timeout, wait, new"),
        (b'{"new_data_parallel_size": 3, "\\u0000\\n": 1}', "is not known"),
    ],
)
async def test_bad_bodies(plane: OperatorPlane, client: httpx.AsyncClient, body: bytes, told: str) -> None:
    answer = await client.post("/scale_elastic_ep", content=body)
    assert answer.status_code == 400
    assert told in message(answer)
    assert len(message(answer)) < 500
    assert plane.active == [0, 1, 2, 3]


async def test_a_large_body(client: httpx.AsyncClient) -> None:
    answer = await client.post("/scale_elastic_ep", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["new_data_parallel_size", "drain_timeout", "retire_ranks", "wait", "enabled"])
NEARLY = st.dictionaries(NAMES, JSON | st.integers(0, 8) | st.lists(st.integers(0, 8), max_size=3), max_size=5)
PATHS = st.sampled_from(["/scale_elastic_ep", "/automation", *(f"/ranks/1/{deed}" for deed in DEEDS)])


def test_no_body_is_an_internal_error() -> None:
    app = make_control_app(OperatorPlane())

    async def post(path: str, body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://daemon") as client:
            return await client.post(path, content=body)

    @given(path=PATHS, body=st.binary(max_size=64) | (JSON | NEARLY).map(lambda value: json.dumps(value).encode()))
    @settings(max_examples=300)
    def check(path: str, body: bytes) -> None:
        answer = asyncio.run(post(path, body))
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            message(answer)

    check()


@pytest.mark.parametrize("path", ["/scale_elastic_ep", *(f"/ranks/1/{deed}" for deed in DEEDS)])
async def test_a_daemon_that_cannot_take_orders(plane: OperatorPlane, client: httpx.AsyncClient, path: str) -> None:
    body = {"new_data_parallel_size": 3} if path == "/scale_elastic_ep" else {}
    plane.operations.close("the daemon stops")
    stopping = await client.post(path, json=body)
    assert (stopping.status_code, message(stopping)) == (503, "the daemon stops")
    plane.controller = None
    starting = await client.post(path, json=body)
    assert (starting.status_code, message(starting)) == (503, "the daemon takes no orders: it is starting")


async def test_an_operation_that_the_controller_never_ends(
    plane: OperatorPlane, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "GRACE_S", 0.01)
    plane.play = False
    answer = await scale(client, 3, drain_timeout=0.01)  # in simulated time, which stands still
    assert answer.status_code == 500
    assert message(answer) == "it has not ended in time, it is still at: moving requests"


async def test_operations_are_listed(client: httpx.AsyncClient) -> None:
    assert (await client.get("/operations")).json() == []
    first = (await scale(client, 3)).json()["operation_id"]
    refused = (await scale(client, 2, retire_ranks=[5])).json()["operation_id"]
    listed = (await client.get("/operations")).json()
    assert [(one["id"], one["state"]) for one in listed] == [(first, "done"), (refused, "invalid")]
    assert listed[0] == {**(await client.get(f"/operations/{first}")).json(), "seconds": listed[0]["seconds"]} | {
        name: listed[0][name] for name in ("started", "ended")
    }


async def test_an_operation_that_is_not_known(client: httpx.AsyncClient) -> None:
    answer = await client.get("/operations/op-12345678")
    assert answer.status_code == 404
    assert "op-12345678" in message(answer)


@pytest.mark.parametrize("deed", ["drain", "exclude"])
async def test_a_rank_goes_and_comes_back(plane: OperatorPlane, client: httpx.AsyncClient, deed: str) -> None:
    gone = await client.post(f"/ranks/2/{deed}")
    assert (gone.status_code, set(gone.json())) == (200, {"message", "operation_id", "data_parallel_size"})
    assert plane.active == [0, 1, 3]
    operation = (await client.get(f"/operations/{gone.json()['operation_id']}")).json()
    assert (operation["kind"], operation["ranks"], operation["state"]) == (deed, [2], "done")
    back = await client.post("/ranks/2/release", json={"drain_timeout": 10, "wait": True})
    assert back.status_code == 200
    assert plane.active == [0, 1, 2, 3]


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("rank", ["9", "999999", "-1", "x", "1.5", "0x1", "1234567", "²"])
async def test_no_such_rank(plane: OperatorPlane, client: httpx.AsyncClient, rank: str, deed: str) -> None:
    answer = await client.post(f"/ranks/{rank}/{deed}")
    assert answer.status_code == 400
    assert "rank" in message(answer)
    assert plane.active == [0, 1, 2, 3]


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("body", [b"[]", b"{", b'{"drain_timeout": 0}', b'{"force": true}'])
async def test_bad_bodies_for_a_rank(plane: OperatorPlane, client: httpx.AsyncClient, deed: str, body: bytes) -> None:
    answer = await client.post(f"/ranks/1/{deed}", content=body)
    assert answer.status_code == 400
    message(answer)
    assert plane.active == [0, 1, 2, 3]


async def test_the_last_place_of_an_expert_is_not_taken(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    await scale(client, 2)
    for deed in ("drain", "exclude"):
        answer = await client.post(f"/ranks/0/{deed}")
        assert answer.status_code == 400
        assert "2 ranks are needed" in message(answer)
    assert plane.active == [0, 1]


async def test_a_gpu_is_released(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    answer = await client.post(f"/gpus/{GPU}/release")
    assert (answer.status_code, answer.json()["gpu"]) == (200, GPU)
    assert plane.released == [GPU]
    unknown = await client.post("/gpus/GPU-2/release")
    assert (unknown.status_code, message(unknown)) == (404, "no GPU GPU-2 is known")


async def test_automation(plane: OperatorPlane, client: httpx.AsyncClient) -> None:
    assert plane.controller is not None
    for enabled in (False, True):
        answer = await client.post("/automation", json={"enabled": enabled})
        assert (answer.status_code, answer.json()) == (200, {"enabled": enabled})
        assert (await client.get("/automation")).json() == {"enabled": enabled}
        assert plane.controller.automatic is enabled


@pytest.mark.parametrize("body", [b"", b"{}", b"true", b'{"enabled": 1}', b'{"enabled": "off"}', b'{"enabled": null}'])
async def test_bad_bodies_for_automation(plane: OperatorPlane, client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/automation", content=body)
    assert answer.status_code == 400
    assert message(answer)
    assert plane.automation
