"""Which parts of the project import vLLM, and which import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_only_the_engine_and_the_front_end_import_vllm() -> None:
    package = ROOT / "elastic_daemon"
    importers = {path.relative_to(package) for path in package.rglob("*.py") if "vllm" in imported(path)}
    assert importers, "the scan finds nothing: it is broken"
    others = {str(path) for path in importers if path.parts[0] != "engine" and path != Path("frontend.py")}
    assert others == set()


def test_the_watchdog_knows_nothing_of_the_daemon() -> None:
    files = list((ROOT / "watchdog").rglob("*.py"))
    assert files
    assert {path.name for path in files if {"elastic_daemon", "vllm"} & imported(path)} == set()


@pytest.mark.parametrize("module", ["elastic_daemon.supervisor", "elastic_daemon.cli", "watchdog"])
def test_importing_the_supervisor_does_not_import_vllm(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'vllm', 'torch'}} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
