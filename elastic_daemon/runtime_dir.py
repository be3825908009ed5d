"""The runtime directory: sockets and scratch files of one live daemon."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from elastic_daemon.errors import StartError


class RuntimeDir:
    """Owns a directory for as long as the daemon lives. A lock on a file in it tells a live owner from a dead one's rest."""

    def __init__(self, path: Path) -> None:
        """Raises StartError when another live daemon has it, or it cannot be used."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self._lock = (path / "daemon.lock").open("a+")
        except OSError as error:
            raise StartError(f"runtime directory {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise StartError(
                f"another daemon (pid {owner}) uses {path}; stop it, or give this one --runtime-dir"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        self._clear()
        self.scratch.mkdir(mode=0o700)

    @property
    def control_socket(self) -> str:
        return str(self.path / "control.sock")

    @property
    def http_socket(self) -> str:
        return http_socket(self.path)

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def zmq(self, name: str) -> str:
        return f"ipc://{self.path / name}"

    def _clear(self) -> None:
        """Remove what a daemon that was killed left here."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for left in self.path.glob("*.sock"):
            with contextlib.suppress(OSError):
                left.unlink()

    def close(self) -> None:
        self._clear()
        with contextlib.suppress(OSError):
            (self.path / "daemon.lock").unlink()
        self._lock.close()


def http_socket(path: Path) -> str:
    """Where the control routes of the daemon that uses runtime directory `path` answer."""
    return str(path / "http.sock")
