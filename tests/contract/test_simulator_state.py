"""The state file of the simulated GPUs, shared by many processes; building the library."""

from __future__ import annotations

import fcntl
import mmap
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pynvml
import pytest

from tests.contract.nvml_child import LISTEN, RELEASE_S, NvmlChild, code_of
from watchdog.simulator import (
    MAX_GPUS,
    NVLINKS,
    BuildError,
    NoState,
    NotBuilt,
    Simulator,
    SimulatorError,
    UnknownGpu,
    build_libraries,
    control,
    create,
    driver_environment,
    library,
    library_dir,
)
from watchdog.simulator.layout import GpuRecord
from watchdog.simulator.simulator import state_path

pytestmark = [pytest.mark.contract, pytest.mark.timeout(60), pytest.mark.usefixtures("driver_library")]


def test_a_full_rack(tmp_path: Path) -> None:
    with create(tmp_path, gpus=64, spares=8) as simulator, NvmlChild(driver_environment(tmp_path)) as child:
        child(LISTEN)
        child("e = listen(*range(72))")
        uuids = child("[n.nvmlDeviceGetUUID(gpu(i)) for i in range(n.nvmlDeviceGetCount())]")
        assert uuids == [gpu.uuid for gpu in simulator.list()]
        assert len(set(uuids)) == MAX_GPUS
        assert [gpu.spare for gpu in simulator.list()] == [False] * 64 + [True] * 8
        for index in range(MAX_GPUS):
            simulator.xid(index, index + 1)
        assert child("sorted(wait(e) for _ in range(72))") == [[i, 8, i + 1] for i in range(MAX_GPUS)]


@pytest.mark.parametrize(("gpus", "spares"), [(0, 0), (73, 0), (70, 3), (-1, 4), (4, -1)])
def test_numbers_of_gpus_that_do_not_fit(tmp_path: Path, gpus: int, spares: int) -> None:
    with pytest.raises(SimulatorError, match="1 to 72"):
        create(tmp_path, gpus, spares)
    assert not state_path(tmp_path).exists()


def test_powering_up_again_keeps_the_uuids_and_clears_the_faults(simulator: Simulator, child: NvmlChild) -> None:
    runtime_dir = Path(child("__import__('os').environ['ELASTIC_NVML_SIMULATOR']")).parent
    uuids = [gpu.uuid for gpu in simulator.list()]
    simulator.lose(1)
    with create(runtime_dir, gpus=5, spares=1) as again:
        assert [gpu.uuid for gpu in again.list()][:4] == uuids
        assert not any(gpu.faults for gpu in again.list())
    assert child("n.nvmlDeviceGetUUID(gpu(1))") == uuids[1]
    child.restart_nvml()
    assert child("n.nvmlDeviceGetCount()") == 6


INJECT = """
import sys
from pathlib import Path
from watchdog.simulator import Simulator
with Simulator.open(Path(sys.argv[1])) as simulator:
    for _ in range(int(sys.argv[2])):
        simulator.ecc(0)
        simulator.xid(1, 31)
"""


def test_injections_at_once_are_neither_lost_nor_torn(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    each, threads = 120, 2  # 960 events in all: the ring that they are read from holds 1024
    child(LISTEN)
    child("e = listen(1); found = []; torn = 0")
    processes = [subprocess.Popen([sys.executable, "-c", INJECT, str(tmp_path), str(each)]) for _ in range(2)]

    def inject() -> None:
        for _ in range(each):
            simulator.ecc(0)
            simulator.xid(1, 31)

    workers = [threading.Thread(target=inject) for _ in range(threads)]
    for worker in workers:
        worker.start()
    total = each * (threads + len(processes))
    # Both counters are in one record, which one call reads: they differ only in a torn one.
    child(
        f"""
end = time.monotonic() + 30
while len(found) < {total} and time.monotonic() < end:
    found += drain(e)
    values = [value.value.ullVal for value in n.nvmlDeviceGetFieldValues(gpu(0), [4, 6])]
    torn += values[0] != values[1]
""",
        wait_s=40,
    )
    for worker in workers:
        worker.join(10)
    assert [process.wait(10) for process in processes] == [0, 0]
    assert child("[len(found), torn, n.nvmlDeviceGetTotalEccErrors(gpu(0), 1, 0)]") == [total, 0, total]


FIRST_SLOT = 32
"""offsetof(struct sim_state, slots), which begins with the sequence number."""


def test_a_record_that_is_being_written_is_not_read(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    temperature = FIRST_SLOT + 8 + GpuRecord.temperature_c.offset
    child("h = gpu(0)")
    with state_path(tmp_path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as state:
        (before,) = struct.unpack_from("<I", state, FIRST_SLOT)
        fcntl.flock(file, fcntl.LOCK_EX)
        struct.pack_into("<I", state, FIRST_SLOT, before + 1)
        struct.pack_into("<I", state, temperature, 99)
        child.send("n.nvmlDeviceGetTemperature(h, 0)")
        with pytest.raises(TimeoutError):
            child.answer(RELEASE_S)
        struct.pack_into("<I", state, temperature, 60)
        struct.pack_into("<I", state, FIRST_SLOT, before + 2)
        assert child.answer() == 60


def test_a_writer_that_died_half_way_stops_nobody(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    with state_path(tmp_path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as state:
        (before,) = struct.unpack_from("<I", state, FIRST_SLOT)
        struct.pack_into("<I", state, FIRST_SLOT, before + 1)
        assert child("n.nvmlDeviceGetTemperature(gpu(0), 0)") == 45
        simulator.temperature(0, 60)
        (after,) = struct.unpack_from("<I", state, FIRST_SLOT)
        assert before % 2 == 0 and after == before + 2
    assert child("n.nvmlDeviceGetTemperature(gpu(0), 0)") == 60


def test_a_writer_that_never_finishes_is_not_waited_for(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOCK_TIMEOUT_MS", 50)
    with state_path(tmp_path).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SimulatorError, match="another process"):
            simulator.lose(0)
    simulator.lose(0)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        (b"", pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        (b"something else" * 100, pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        (b"NVMLSIM1" + struct.pack("<II", 2, 4096) + bytes(4080), pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
        (b"NVMLSIM1" + struct.pack("<II", 1, 100) + bytes(84), pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
    ],
    ids=["none", "empty", "other", "layout", "size"],
)
def test_a_state_file_that_is_none(tmp_path: Path, content: bytes | None, code: int) -> None:
    if content is not None:
        state_path(tmp_path).write_bytes(content)
    with NvmlChild(driver_environment(tmp_path), start=False) as child:
        assert code_of(child, "n.nvmlInit()") == code
    with pytest.raises(NoState):
        Simulator.open(tmp_path)
    with create(tmp_path, gpus=1) as simulator:
        assert len(simulator.list()) == 1


def test_without_the_variable_there_is_no_driver(tmp_path: Path) -> None:
    environment = {"LD_LIBRARY_PATH": driver_environment(tmp_path)["LD_LIBRARY_PATH"], "ELASTIC_NVML_SIMULATOR": ""}
    with NvmlChild(environment, start=False) as child:
        assert code_of(child, "n.nvmlInit()") == pynvml.NVML_ERROR_DRIVER_NOT_LOADED


def test_who_injects_does_not_load_the_driver(simulator: Simulator) -> None:
    simulator.list()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert library.CONTROL in maps
    assert str(library_dir() / library.DRIVER) not in maps


def test_values_that_are_refused_change_nothing(simulator: Simulator) -> None:
    before = simulator.list()
    refusals: tuple[Callable[[], object], ...] = (
        lambda: simulator.xid(0, 0),
        lambda: simulator.ecc(0, -1),
        lambda: simulator.recovery_action(0, -1),
        lambda: simulator.driver_error(0, 0),
        lambda: simulator.temperature(0, 1000),
        lambda: simulator.latency(0, timedelta(milliseconds=-1)),
        lambda: simulator.flap(0, timedelta(0)),
        lambda: simulator.nvlink_down(0, NVLINKS),
    )
    for refused in refusals:
        with pytest.raises(SimulatorError):
            refused()
    for name in (4, "4", "GPU-", "-1", ""):
        with pytest.raises(UnknownGpu):
            simulator.lose(name)
    assert simulator.list() == before


def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    library.compile_into(tmp_path, "-Werror", "-Wshadow", "-Wstrict-prototypes")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(library.PARTS)


def test_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "lib")
    with pytest.raises(NotBuilt, match="make setup"):
        library_dir()
    builders = [threading.Thread(target=build_libraries) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert sorted(path.name for path in (tmp_path / "lib").iterdir()) == sorted(library.PARTS)
    made = (library_dir() / library.DRIVER).stat()
    assert build_libraries() is False
    assert (library_dir() / library.DRIVER).stat() == made


def test_a_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "lib")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="install one"):
        build_libraries()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(BuildError, match="no such header"):
        build_libraries()
    with pytest.raises(NotBuilt):
        library_dir()


def test_a_library_directory_belongs_to_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "native"
    shutil.copytree(library.SOURCES, sources)
    monkeypatch.setattr(library, "SOURCES", sources)
    path = library.library_path.__wrapped__
    same = path()
    assert same == library_dir()
    (sources / "state.h").write_text((sources / "state.h").read_text() + "\n")
    assert path() != same
    assert re.fullmatch(r"simulator-[0-9a-f]{12}", path().name)
