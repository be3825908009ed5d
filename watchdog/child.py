"""The parent's handle on one process that calls NVML (nvml_child.py): its pipe, its call page, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watchdog.call_page import CallPage, create_page_fd
from watchdog.logs import log

Message = dict[str, Any]
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Call:
    """The driver call that a child is in. `gpu` is empty when it concerns none."""

    gpu: str
    name: str
    started: float


class Child:
    """One process. All methods belong to the event loop's thread; none waits."""

    def __init__(
        self,
        role: str,
        arguments: Iterable[str],
        environment: Mapping[str, str],
        now: float,
        on_message: Callable[[Child, Message], None],
        on_exit: Callable[[Child], None],
    ) -> None:
        """`role` is events or poll. Raises OSError when no process can be started."""
        self.role = role
        self.started = self.cycled = now
        self.opened = False
        """It has initialised NVML and said so."""
        self.gpus: frozenset[str] = frozenset()
        """That it has opened."""
        self.listening: frozenset[str] = frozenset()
        """Those of them whose events it waits for now."""
        self.killed: float | None = None
        self._on_message = on_message
        self._on_exit = on_exit
        self._cycles = 0
        self._rest = b""
        fd = create_page_fd()
        own = ("--page-fd", str(fd), "--parent", str(os.getpid()))
        try:
            self._page = CallPage(fd)
            self._process = subprocess.Popen(
                [*(sys.executable, "-m", "watchdog.nvml_child", role), *own, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(fd,),
                env=dict(environment),
                start_new_session=True,
            )
        finally:
            os.close(fd)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        os.set_blocking(self._stdin.fileno(), False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._stdout.fileno(), self._read)
        self._loop.add_reader(self._pidfd, self._ended)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its return code, once it has ended."""
        return self._process.returncode

    def call(self, now: float) -> Call | None:
        """The driver call that it is in now. Also notes that it has turned since the last look."""
        cycles, started, gpu, name = self._page.read()
        if cycles != self._cycles:
            self._cycles, self.cycled = cycles, now
        return Call(gpu, name, started) if started is not None else None

    def tell(self, command: str) -> None:
        """One line for it. A child that does not read is dealt with by its deadline."""
        with contextlib.suppress(OSError):
            os.write(self._stdin.fileno(), command.encode() + b"\n")

    def kill(self, now: float) -> None:
        if self.killed is None:
            self.killed = now
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def starved(self) -> bool:
        """It is late and the driver is not to blame: it waits for a processor, or was stopped."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return state in (b"R", b"T", b"t")

    def close(self) -> None:
        """Let go of it, alive or not."""
        self._loop.remove_reader(self._stdout.fileno())
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._page.close()

    def _read(self) -> None:
        try:
            chunk = os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not chunk:
            self._loop.remove_reader(self._stdout.fileno())
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            self._rest = b""
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                log.warning("nvml_child_unreadable", pid=self.pid, line=line[:200].decode(errors="replace"))
                continue
            if self.killed is None:
                self.opened = self.opened or message["t"] == "opened"
                self._on_message(self, message)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        with contextlib.suppress(OSError):
            self._read()  # what it wrote last
        self._process.wait()
        self._on_exit(self)
