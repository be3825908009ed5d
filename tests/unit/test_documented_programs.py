"""Documented commands that need no daemon: make, benches as small as they go, `serve` as far as its settings."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_daemon.config import BUNDLED_MODEL
from tests.documented import EDITED, INSTALLED, MADE, SCRIPTS, SERVED, SMALLEST
from tests.documents import ROOT, commands
from tests.unit.command_line import run
from tests.unit.test_help import all_commands
from tests.unit.test_units import environment
from watchdog.cli import main as watchdog_main

LINES = sorted({command.line for command in commands()})


def matching(pattern: str) -> list[str]:
    return [line for line in LINES if re.match(pattern, line)]


CHECKS = ["setup.sh", "python -m ruff check .", "python -m ruff format --check .", "python -m mypy watchdog"]


def staged(*stages: str, more: str = "") -> list[str]:
    return [*CHECKS, *(f"python -m pytest tests/{stage}{more}" for stage in stages)]


MAKES = {
    "make setup": CHECKS[:1],
    "make check": CHECKS,
    "make format": ["setup.sh", "python -m ruff check --fix-only --quiet .", "python -m ruff format ."],
    "make drill": ["setup.sh", "elastic-daemon drill"],
    "make serve": ["setup.sh", "elastic-daemon serve"],
    'make serve ARGS="…"': ["setup.sh", "elastic-daemon serve …"],
    "make test": staged("unit", "contract", "e2e"),
    'make test STAGES="unit contract"': staged("unit", "contract"),
    'make test PYTEST_ARGS="-k test_placement"': staged("unit", "contract", "e2e", more=" -k test_placement"),
    "make test REQUIRE_TOOLS=1": [f"{call} with all tools" if call != "setup.sh" else call
                                  for call in staged("unit", "contract", "e2e")],
}  # fmt: skip
"""By command: what it calls."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The Makefile and its scripts, with programs that note how they are called, and nothing else."""
    for name in ("Makefile", "scripts/check.sh", "scripts/test.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    noted = 'echo "$(basename "$0")" "$@" ${REQUIRE_TOOLS:+with all tools} >> calls\n'
    (tmp_path / "scripts" / "setup.sh").write_text('echo "$(basename "$0")" >> calls\n')
    for program in ("python", "elastic-daemon"):
        (path := tmp_path / ".venv" / "bin" / program).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{noted}")
        path.chmod(0o755)
    for name in ("watchdog/__init__.py", *(f"tests/{stage}/test_it.py" for stage in ("unit", "contract", "e2e"))):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    return tmp_path


def clean() -> dict[str, str]:
    """Without what another make hands down: this test may run in one."""
    own = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "STAGES", "PYTEST_ARGS", "REQUIRE_TOOLS", "ARGS")
    return {name: value for name, value in os.environ.items() if name not in own}


def shell(line: str, where: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", line], cwd=where, env=clean(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", matching(MADE))
def test_make_calls_what_it_should(line: str, tree: Path) -> None:
    shell(line, tree)
    assert (tree / "calls").read_text().splitlines() == MAKES[line]


@pytest.mark.parametrize("line", matching(INSTALLED))
def test_make_installs_and_takes_away(line: str, tmp_path: Path) -> None:
    given = dict(word.split("=") for word in shlex.split(line)[2:])
    environment(tmp_path / "venv")
    stage = f"DESTDIR={tmp_path / 'stage'} VENV={tmp_path / 'venv'}"
    kept = " ".join(f"{name}={value}" for name, value in given.items() if name == "PREFIX")
    unit = tmp_path / "stage" / given.get("PREFIX", "/usr/local")[1:] / "lib/systemd/system/elastic-daemon.service"
    shell(f"make install {kept} {stage}", ROOT)
    assert unit.exists()
    if "uninstall" in line:
        shell(f"make uninstall {kept} {stage}", ROOT)
        assert not unit.exists()


@pytest.mark.parametrize("line", matching(SERVED))
def test_serve_takes_its_settings(line: str, tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(BUNDLED_MODEL)
    (tmp_path / "elastic-daemon.toml").write_text("survive_losses = 2\n")
    clean_environment.chdir(tmp_path)
    assert run(*shlex.split(line)[1:], "--print-config") == 0


@pytest.mark.parametrize("parser", all_commands(), ids=lambda parser: parser.prog)
def test_every_command_helps(parser: object, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = parser.prog.split()  # type: ignore[attr-defined]
    words = [word for word in words if not word.startswith("[")]
    if program == "elastic-daemon":
        assert run(*words, "--help") == 0
    else:
        with pytest.raises(SystemExit) as ended:
            watchdog_main([*words, "--help"])
        assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALLEST)
def test_a_bench_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, *SMALLEST[name]])
    monkeypatch.setattr("bench.placement.LAYERS", 2)
    try:
        code = importlib.import_module(name).main()
    except SystemExit as ended:  # its help
        code = ended.code
    # Whether the bar of heartbeats is met is for a machine with nothing else to do.
    assert not code or name == "bench.heartbeat_cost"
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", matching(SCRIPTS))
def test_a_page_is_up_to_date(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = shlex.split(line)[1]
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code


@pytest.mark.parametrize("line", matching(EDITED))
def test_the_runbook_of_alerts_moves(line: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy" / "prometheus" / "alerts.yml", tmp_path)
    shell(line, tmp_path)
    urls = re.findall(r'runbook_url: "(.*)#', (tmp_path / "alerts.yml").read_text(encoding="utf-8"))
    assert urls and set(urls) == {"https://wiki.example/operations.html"}
