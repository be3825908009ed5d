"""The list of GPUs at the start, by the real pynvml and the simulated driver: one that is wedged hides no other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_daemon.watch import driver
from elastic_daemon.watch.driver import GpusUnknown, ask_driver
from watchdog.simulator import Simulator, driver_environment

pytestmark = [pytest.mark.contract, pytest.mark.timeout(60)]

NEXT_TIMEOUT_S = 1.0


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.fixture
def environment(simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.setattr(driver, "NEXT_TIMEOUT_S", NEXT_TIMEOUT_S)
    before = children()
    yield {**os.environ, **driver_environment(tmp_path)}
    assert children() == before, "a child is left behind"


def uuids(simulator: Simulator) -> list[str]:
    return [gpu.uuid for gpu in simulator.list()]


async def test_all_gpus_by_index_each_in_its_slot(simulator: Simulator, environment: dict[str, str]) -> None:
    listing = await ask_driver(environment)
    assert [gpu.uuid for gpu in listing.gpus] == uuids(simulator)
    assert [gpu.slot for gpu in listing.gpus] == [f"00000000:0{bus}:00.0" for bus in range(1, 5)]
    assert (listing.complete, listing.unread) == (True, {})
    simulator.lose(1)
    assert [gpu.slot for gpu in (await ask_driver(environment)).gpus][1] == "00000000:03:00.0", "a slot does not shift"


async def test_one_that_hangs_costs_little_and_hides_no_other(
    simulator: Simulator, environment: dict[str, str]
) -> None:
    simulator.hang(1)
    started = time.monotonic()
    listing = await ask_driver(environment)
    assert time.monotonic() - started < driver.LIST_TIMEOUT_S / 2
    one, two, three, four = uuids(simulator)
    assert [gpu.uuid for gpu in listing.gpus] == [one, None, three, four]
    assert listing.unread == {"1": "no answer"}
    simulator.heal(1)
    assert [gpu.uuid for gpu in (await ask_driver(environment)).gpus] == [one, two, three, four]


async def test_one_that_answers_with_an_error_is_left_out(
    simulator: Simulator, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "NEXT_TIMEOUT_S", 20.0)
    simulator.hang(2)  # listed, and lost while it is asked
    asking = asyncio.create_task(ask_driver(environment))
    await asyncio.sleep(2.0)
    simulator._set(2, lost=1, hang=0)
    listing = await asking
    assert [gpu.uuid is None for gpu in listing.gpus] == [False, False, True, False]
    assert listing.unread == {"2": "GPU is lost"}


async def test_where_all_hang_none_is_known(
    simulator: Simulator, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LIST_TIMEOUT_S", 3.0)
    for index in range(4):
        simulator.hang(index)
    with pytest.raises(GpusUnknown, match="within 3 s"):
        await ask_driver(environment)


async def test_nor_without_a_driver(environment: dict[str, str]) -> None:
    with pytest.raises(GpusUnknown, match="NVML: Driver Not Loaded"):
        await ask_driver({name: value for name, value in environment.items() if not name.startswith("ELASTIC_")})
