"""`elastic-watchdog simulate`: what each command does to the simulated GPUs, and what it says of bad input."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_daemon.config import default_runtime_dir as daemon_runtime_dir
from watchdog.runtime_dir import default_runtime_dir
from watchdog.simulate import add_simulate_parser, line, run_simulate
from watchdog.simulator import GpuState, Simulator, build_libraries, create, library
from watchdog.simulator.simulator import state_path

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    build_libraries()


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    with create(tmp_path, gpus=3, spares=1) as simulator:
        yield simulator


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="elastic-watchdog")
    add_simulate_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["simulate", *words])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*words: str) -> tuple[int, list[str]]:
        lines: list[object] = []
        status = run_simulate(parse("--runtime-dir", str(tmp_path), *words), lines.append)
        return status, [str(line) for line in lines]

    return run


FAULTS = {
    "lose": "lost",
    "lose --event": "lost",
    "reset-required": "reset required",
    "driver-error": "error 999",
    "driver-error --code 17": "error 17",
    "ecc": "1 uncorrectable ECC errors",
    "ecc --count 4 --corrected": "4 corrected ECC errors",
    "remap-failure": "row remapping failed",
    "remap-failure --pending": "row remapping pending",
    "recovery-action --code 2": "recovery action 2",
    "throttle": "throttled: thermal",
    "throttle --reason power-brake": "throttled: power-brake",
    "throttle --reason hw-slowdown": "throttled: hw-slowdown",
    "temperature --celsius 92": "temperature 92 C",
    "hang": "hangs",
    "latency --milliseconds 300": "latency 300 ms",
    "latency --ms 300": "latency 300 ms",
    "flap": "flaps every 2 s",
    "flap --period 0.5": "flaps every 0.5 s",
    "nvlink-down --link 3": "NVLink down: 3",
    "nvlink-errors": "NVLink errors",
    "fabric": "fabric unhealthy",
    "pcie-replays --count 9": "9 PCIe replays",
}


@pytest.mark.parametrize("command", FAULTS)
def test_a_fault_is_injected_shown_and_healed(simulator: Simulator, run: Run, command: str) -> None:
    before = simulator.list()
    name, *options = command.split()
    status, printed = run(name, "--gpu", "1", *options)
    after = simulator.list()
    assert status == 0
    assert after[1].faults == (FAULTS[command],)
    assert [after[i] for i in (0, 2, 3)] == [before[i] for i in (0, 2, 3)]
    assert printed == [line(after[1])] == [run("list")[1][1]]
    assert run("heal", "--gpu", before[1].uuid)[0] == 0
    assert simulator.list() == before


def test_an_xid_leaves_the_gpu_as_it_is(simulator: Simulator, run: Run) -> None:
    before = simulator.list()
    assert run("xid", "--gpu", "1", "--code", "79") == (0, [line(before[1])])
    assert simulator.list() == before


def test_every_command_is_covered() -> None:
    commands = {command.split()[0] for command in FAULTS} | {"list", "xid", "replace", "heal"}
    subparsers = argparse.ArgumentParser().add_subparsers()
    parser = add_simulate_parser(subparsers)
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert set(action.choices) == commands


def test_replace_shows_the_new_gpu(simulator: Simulator, run: Run) -> None:
    old = simulator.list()[2].uuid
    simulator.ecc(2)
    status, printed = run("replace", "--gpu", old)
    new = simulator.list()[2]
    assert (status, printed) == (0, [line(new)])
    assert new.uuid != old and not new.faults


def test_all_gpus_at_once(simulator: Simulator, run: Run) -> None:
    status, printed = run("lose", "--gpu", "all")
    assert status == 0 and len(printed) == 4
    assert all(gpu.lost for gpu in simulator.list())
    run("heal", "--gpu", "all")
    assert not any(gpu.faults for gpu in simulator.list())


def test_the_list_as_json(simulator: Simulator, run: Run) -> None:
    simulator.hang(3)
    _, (text,) = run("list", "--json")
    gpus = json.loads(text)
    assert [gpu["uuid"] for gpu in gpus] == [gpu.uuid for gpu in simulator.list()]
    assert gpus[3]["spare"] is True and gpus[3]["faults"] == ["hangs"]


def test_a_line_of_the_list() -> None:
    gpu = GpuState(7, "GPU-1", "name", True, False, 45, 1, ("recovery action 1", "hangs"))
    assert line(gpu) == " 7  GPU-1   45 C  faulty   spare, recovery action 1, hangs"
    assert line(GpuState(7, "GPU-1", "name", False, False, 45, 0, ())) == " 7  GPU-1   45 C  healthy"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lose --gpu 4", "no simulated GPU 4: the indices are 0 to 3"),
        ("lose --gpu GPU-x", "no simulated GPU 'GPU-x': give an index"),
        ("xid --gpu 0 --code 0", "a positive number is needed"),
        ("ecc --gpu 0 --count -3", "a positive number is needed"),
        ("recovery-action --gpu 0 --code 999", "recovery action 999: from 0 to 255"),
        ("latency --gpu 0 --ms -1", "a latency of -1 ms"),
        ("flap --gpu 0 --period 0.001", "at least 2 ms"),
        ("nvlink-down --gpu 0 --link 18", "no NVLink 18: this simulated GPU has 18 links"),
    ],
)
def test_bad_values_are_one_line(
    simulator: Simulator, run: Run, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    before = simulator.list()
    assert run(*words.split()) == (2, [])
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("elastic-watchdog simulate: ") and said in printed
    assert simulator.list() == before


def test_where_nothing_is_simulated(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list")[0] == 2
    assert f"no simulated GPUs in {tmp_path}: start the daemon with --device cpu" in capsys.readouterr().err
    state_path(tmp_path).write_bytes(b"NVMLSIM1" + bytes(100))
    assert run("list")[0] == 2
    assert "another version" in capsys.readouterr().err


def test_without_a_built_library(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from watchdog.simulator import control

    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "nowhere")
    control.library.cache_clear()
    assert run("list")[0] == 2
    assert "run `make setup`" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "lose", "xid --gpu 0", "break --gpu 0", "flap --gpu 0 --period -1"])
def test_a_command_line_that_is_none(words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words.split())
    assert ended.value.code == 2


@pytest.mark.parametrize("words", [[], ["lose"], ["latency"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words, "--help")
    assert ended.value.code == 0
    assert "usage: elastic-watchdog simulate" in capsys.readouterr().out


@pytest.mark.parametrize("variables", [{}, {"XDG_RUNTIME_DIR": "/x"}, {"RUNTIME_DIRECTORY": "/r:/s"}])
def test_both_programs_meet_in_one_directory(clean_environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        clean_environment.setenv(name, value)
    assert default_runtime_dir() == daemon_runtime_dir() == parse("list").runtime_dir
