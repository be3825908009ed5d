"""The runtime directory: one live daemon at a time, private, and clean after a crash."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_daemon.errors import StartError
from elastic_daemon.processes.runtime_dir import MAX_SOCKET_PATH_BYTES, SOCKET_NAMES, RuntimeDir, http_socket


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_private_also_when_it_was_not(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    path.mkdir(parents=True, mode=0o755)
    path.chmod(0o755)
    directory = RuntimeDir(path)
    assert {mode(private) for private in (path, directory.scratch, directory.experts)} == {0o700}
    directory.close()
    assert not directory.scratch.exists() and not directory.experts.exists()


def test_paths_lie_in_it(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path / "run")
    assert directory.control_socket == str(tmp_path / "run" / "control.sock")
    assert directory.http_socket == http_socket(tmp_path / "run")
    assert directory.zmq_addresses["input_address"] == f"ipc://{tmp_path}/run/input.sock"
    directory.close()


def test_second_daemon_is_told_who_has_it(tmp_path: Path) -> None:
    first = RuntimeDir(tmp_path)
    (tmp_path / "control.sock").touch()
    with pytest.raises(StartError, match=rf"pid {os.getpid()}\).*--runtime-dir"):
        RuntimeDir(tmp_path)
    assert (tmp_path / "control.sock").exists(), "the first one's files are not the second one's to clear"
    first.close()
    RuntimeDir(tmp_path).close()


def test_what_a_killed_daemon_left_is_cleared(tmp_path: Path) -> None:
    # SIGKILL lets nothing run at exit: the lock is the kernel's to drop.
    leave = (
        "import os, sys, pathlib, signal; from elastic_daemon.processes.runtime_dir import RuntimeDir\n"
        "d = RuntimeDir(pathlib.Path(sys.argv[1])); (d.scratch / 'torch-1').touch()\n"
        "(d.experts / '0-1.expert').touch(); "
        "(d.path / 'control.sock').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", leave, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert (tmp_path / "scratch" / "torch-1").exists() and (tmp_path / "experts" / "0-1.expert").exists()
    (tmp_path / "keep.txt").touch()
    directory = RuntimeDir(tmp_path)
    assert list(directory.scratch.iterdir()) == list(directory.experts.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["daemon.lock", "experts", "keep.txt", "scratch"]
    assert (tmp_path / "daemon.lock").read_text() == f"{os.getpid()}\n"
    directory.close()


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path)
    (directory.scratch / "x").touch()
    Path(directory.http_socket).touch()
    directory.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.touch()
    with pytest.raises(StartError, match=f"{path} cannot be used"):
        RuntimeDir(path)


def test_one_owner_also_when_one_starts_while_another_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RuntimeDir(tmp_path)
    lock = fcntl.flock

    def lock_after_close(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.close()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_after_close)
    second = RuntimeDir(tmp_path)
    try:
        with pytest.raises(StartError):
            RuntimeDir(tmp_path).close()
    finally:
        second.close()


def test_a_path_that_is_too_long_for_its_sockets(socket_dir: Path) -> None:
    spare = MAX_SOCKET_PATH_BYTES - len(f"{socket_dir}/") - len("/control.sock")
    with pytest.raises(StartError, match=r"1 bytes too long.*--runtime-dir"):
        RuntimeDir(socket_dir / ("x" * (spare + 1)))
    assert list(socket_dir.iterdir()) == []
    directory = RuntimeDir(socket_dir / ("x" * spare))
    for name in SOCKET_NAMES:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory.path / name))
    directory.close()
