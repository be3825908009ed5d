"""Simulated GPUs, and a process that sees them through pynvml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.nvml_child import FABRIC, LISTEN, NvmlChild
from watchdog.simulator import Simulator, build_libraries, create, driver_environment


@pytest.fixture(scope="session")
def driver_library() -> None:
    """Compiled, if `make setup` has not done so."""
    build_libraries()


@pytest.fixture
def simulator(driver_library: None, tmp_path: Path) -> Iterator[Simulator]:
    with create(tmp_path, gpus=4) as simulator:
        yield simulator


@pytest.fixture
def child(simulator: Simulator, tmp_path: Path) -> Iterator[NvmlChild]:
    with NvmlChild(driver_environment(tmp_path)) as child:
        yield child


@pytest.fixture(scope="module")
def shared(driver_library: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Simulator, NvmlChild]]:
    """One child for the tests that heal what they break."""
    directory = tmp_path_factory.mktemp("shared")
    with create(directory, gpus=4) as simulator, NvmlChild(driver_environment(directory)) as child:
        child(FABRIC)
        child(LISTEN)
        yield simulator, child
