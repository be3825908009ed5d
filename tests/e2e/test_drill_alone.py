"""The first thing that a new user does: a drill where no daemon runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil


def test_a_drill_brings_a_daemon_of_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    remembered = tmp_path / "state"
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(tmp_path / "run"), "HOME": str(tmp_path)}
    environment["ELASTIC_STATE_DIR"] = str(remembered)
    command = [sys.executable, "-m", "elastic_daemon.cli", "drill", "--streams", "4", "--tokens", "40"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting a daemon for the drill" in done.stdout + done.stderr
    assert "clients: 4 of 4 streams complete, 0 lost; tokens equal in 4, usage right in 4" in done.stdout
    assert not left_in(tmp_path / "run"), "processes are left"
    assert not remembered.exists(), "what the host's daemon remembers is none of a drill's business"


def left_in(runtime_dir: Path) -> list[psutil.Process]:
    """Processes that were told to use it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RUNTIME_DIRECTORY") == str(runtime_dir):
                found.append(process)
    return found
