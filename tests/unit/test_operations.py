"""Orders are handed on, awaited with a deadline, and remembered."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.errors import OrderUnanswered
from elastic_daemon.protocol import OperationKind, OperationReport, OperationState
from elastic_daemon.routes import operations
from elastic_daemon.routes.operations import HTTP_STATUS, KEPT, OperationDesk, new_id

RUNNING = OperationReport("op-1", OperationKind.SCALE, OperationState.RUNNING, "moving requests", "", 3, 4, (3,), 1.0)
DONE = dataclasses.replace(RUNNING, state=OperationState.DONE, message="serving with 3 ranks", ended=2.0)
ORDER = p.ScaleOrder("op-1", 3, None, 10.0)


class Controller:
    """Reports what a test wants, when it is told something."""

    def __init__(self, *reports: OperationReport) -> None:
        self.told: list[p.Event] = []
        self.desk = OperationDesk(self._tell)
        self._reports = reports

    def _tell(self, event: p.Event) -> None:
        self.told.append(event)
        for report in self._reports:
            self.desk.changed(report)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_an_order_is_handed_on_and_its_end_is_awaited() -> None:
    controller = Controller(RUNNING)
    waiting = asyncio.create_task(controller.desk.submit(ORDER, wait=True))
    await until(lambda: controller.desk.busy)
    assert controller.told == [ORDER]
    assert not waiting.done()
    controller.desk.changed(dataclasses.replace(RUNNING, phase="regrouping"))
    await asyncio.sleep(0)
    assert not waiting.done()
    controller.desk.changed(DONE)
    assert await waiting is DONE
    assert not controller.desk.busy


async def test_without_waiting_the_first_report_is_returned() -> None:
    assert await Controller(RUNNING).desk.submit(ORDER, wait=False) is RUNNING


@pytest.mark.parametrize("state", [state for state in OperationState if state.ended])
@pytest.mark.parametrize("wait", [False, True])
async def test_what_ends_at_once_is_returned_at_once(state: OperationState, wait: bool) -> None:
    ended = dataclasses.replace(DONE, state=state)
    assert await Controller(ended).desk.submit(ORDER, wait) is ended


async def test_a_report_that_comes_late_is_awaited() -> None:
    controller = Controller()
    waiting = asyncio.create_task(controller.desk.submit(ORDER, wait=False))
    await until(lambda: bool(controller.told))
    controller.desk.changed(RUNNING)
    assert await waiting is RUNNING


async def test_a_controller_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "FIRST_REPORT_S", 0.02)
    with pytest.raises(OrderUnanswered, match=r"not taken the order within 0\.02 s"):
        await Controller().desk.submit(ORDER, wait=True)


async def test_an_operation_that_does_not_end_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "GRACE_S", 0.01)
    report = await Controller(RUNNING).desk.submit(dataclasses.replace(ORDER, timeout_s=0.02), wait=True)
    assert report is RUNNING


async def test_nobody_waits_for_a_daemon_that_stops() -> None:
    controller = Controller(RUNNING)
    waiting = [asyncio.create_task(controller.desk.submit(ORDER, wait=True)) for _ in range(2)]
    await until(lambda: len(controller.told) == 2)
    controller.desk.close("the daemon stops")
    for task in waiting:
        with pytest.raises(OrderUnanswered, match="the daemon stops; operation op-1 was under way"):
            await task
    with pytest.raises(OrderUnanswered, match="the daemon stops"):
        await controller.desk.submit(ORDER, wait=False)
    assert len(controller.told) == 2


async def test_an_end_that_came_before_the_close_is_told() -> None:
    controller = Controller(RUNNING)
    waiting = asyncio.create_task(controller.desk.submit(ORDER, wait=True))
    await until(lambda: controller.desk.busy)
    controller.desk.changed(DONE)
    controller.desk.close("the daemon stops")
    assert await waiting is DONE


async def test_the_latest_reports_are_kept_and_one_that_runs_always() -> None:
    desk = OperationDesk(lambda event: None)
    desk.changed(dataclasses.replace(RUNNING, operation="runs"))
    for number in range(KEPT + 10):
        desk.changed(dataclasses.replace(DONE, operation=f"op-{number}"))
    kept = [report.operation for report in desk.all()]
    assert kept == ["runs", *(f"op-{number}" for number in range(11, KEPT + 10))]
    assert desk.get("op-10") is None
    assert desk.get("runs") is not None and desk.busy


def test_every_state_has_its_status() -> None:
    assert {state: HTTP_STATUS[state] for state in OperationState} == {
        OperationState.RUNNING: 200,
        OperationState.DONE: 200,
        OperationState.INVALID: 400,
        OperationState.TIMED_OUT: 408,
        OperationState.BUSY: 409,
        OperationState.ROLLED_BACK: 500,
    }


def test_ids_are_short_unique_and_fit_into_a_path() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(id_) < 16 and id_.replace("-", "").isalnum() for id_ in ids)
