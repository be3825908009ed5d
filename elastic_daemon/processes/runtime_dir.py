"""The runtime directory: sockets and scratch files of one live daemon."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from elastic_daemon.errors import StartError
from elastic_daemon.processes.fence_word import FenceWord

SOCKET_NAMES = ("control.sock", "http.sock", "input.sock", "output.sock")

MAX_SOCKET_PATH_BYTES = 107
"""What Linux takes for the path of a Unix socket."""


class RuntimeDir:
    """Owns a directory for as long as the daemon lives.

    A lock on a file in it tells a live owner from what a dead one has left.
    """

    def __init__(self, path: Path) -> None:
        """Raises StartError when another live daemon has it, or it cannot be used."""
        self.path = path
        longest = len(os.fsencode(path)) + 1 + max(map(len, SOCKET_NAMES))
        if longest > MAX_SOCKET_PATH_BYTES:
            raise StartError(
                f"runtime directory {path}: its path is {longest - MAX_SOCKET_PATH_BYTES} bytes too long for sockets; "
                "give a shorter --runtime-dir"
            )
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self._lock = self._take_lock()
        except OSError as error:
            raise StartError(f"runtime directory {path} cannot be used: {error.strerror}") from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        self._clear()
        for directory in (self.scratch, self.experts):
            directory.mkdir(mode=0o700)

    @property
    def control_socket(self) -> str:
        return str(self.path / "control.sock")

    @property
    def http_socket(self) -> str:
        return http_socket(self.path)

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def fence_word(self) -> Path:
        return self.scratch / "fence"

    def make_fence_word(self) -> FenceWord:
        """Raises StartError."""
        try:
            return FenceWord(self.fence_word, writer=True)
        except OSError as error:
            raise StartError(f"runtime directory {self.path} cannot be used: {error.strerror}") from error

    @property
    def experts(self) -> Path:
        """Copies of experts that outlive the ranks, not the daemon."""
        return self.path / "experts"

    @property
    def zmq_addresses(self) -> dict[str, str]:
        """Where ranks and front end meet."""
        return {f"{name}_address": f"ipc://{self.path / name}.sock" for name in ("input", "output")}

    @property
    def _lock_path(self) -> Path:
        return self.path / "daemon.lock"

    def _take_lock(self) -> IO[str]:
        while True:
            lock = self._lock_path.open("a+")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # An owner that closed after our open has removed this file, and the next one locks another.
                if os.path.samestat(os.fstat(lock.fileno()), self._lock_path.stat()):
                    return lock
            except BlockingIOError as error:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                lock.close()
                raise StartError(
                    f"another daemon (pid {owner}) uses {self.path}; stop it, or give this one --runtime-dir"
                ) from error
            except FileNotFoundError:
                pass
            lock.close()

    def _clear(self) -> None:
        """Remove what a daemon that was killed left here."""
        for directory in (self.scratch, self.experts):
            shutil.rmtree(directory, ignore_errors=True)
        for left in self.path.glob("*.sock"):
            with contextlib.suppress(OSError):
                left.unlink()

    def close(self) -> None:
        self._clear()
        with contextlib.suppress(OSError):
            self._lock_path.unlink()  # while it is locked
        self._lock.close()


def http_socket(path: Path) -> str:
    """Where the control routes of the daemon that uses runtime directory `path` answer."""
    return str(path / "http.sock")
