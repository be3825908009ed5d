"""The supervisor's handle on the zygote and on the processes that it forks."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import structlog

from elastic_daemon.errors import ConfigError, ControlClosed, StartError
from elastic_daemon.processes.messages import MAX_LINE_BYTES, Message, decode, encode

log = structlog.get_logger(__name__)

CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Memory of NCCL that peers map one by one makes it slow to connect: 0.87 s for three GPUs, 0.2 s without.
    "NCCL_CUMEM_ENABLE": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
}
"""Defaults for the children; what the environment already says wins, but for what is in `FORCED`."""

LOOPBACK_ONLY = ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

FORCED = (*LOOPBACK_ONLY, "VLLM_ALLOW_INSECURE_SERIALIZATION")
"""Whatever the environment says: children talk over loopback, and unpickle nothing that comes over a socket."""


_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, so that it can be reaped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans() -> None:
    """Free the pids of all children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def reap_adopted(kin: Collection[int]) -> None:
    """Free the pids of children that have ended, but not of `kin`: somebody else waits for those."""
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in {int(child) for child in task.read_text().split()} - set(kin):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


class Child:
    """A forked process, known by its pidfd: never confused with another process that got the same pid."""

    def __init__(self, pid: int, on_exit: Callable[[Child], None]) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self.exited = asyncio.Event()
        self._loop.add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.exited.set()
        self._on_exit(self)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)


def child_environment() -> dict[str, str]:
    """The environment of the zygote, and so of all that it forks."""
    environment = {**CHILD_ENVIRONMENT, **os.environ}
    return {**environment, **{name: CHILD_ENVIRONMENT[name] for name in FORCED}}


class Zygote:
    """Starts the zygote process and asks it for forks, one request at a time."""

    def __init__(self, listener: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "elastic_daemon.engine.zygote", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(), listener.fileno()),
            env=child_environment(),
            start_new_session=True,
        )
        theirs.close()
        self._turn = asyncio.Lock()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @property
    def pid(self) -> int:
        return self._process.pid

    async def connect(self, on_exit: Callable[[], None]) -> None:
        """`on_exit` is called when the process ends: without it nothing can be started or reaped any more."""
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended, on_exit)
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=MAX_LINE_BYTES)

    async def ask(self, type_: str, **fields: Any) -> Message:
        """One request and its answer.

        Raises:
            ConfigError, StartError: what the zygote says is wrong.
            ControlClosed: the zygote has ended.
        """
        async with self._turn:
            try:
                self._writer.write(encode({"type": type_, **fields}))
                await self._writer.drain()
                line = await self._reader.readline()
            except OSError as error:
                raise ControlClosed(f"the zygote has ended: {error}") from error
        if not line:
            raise ControlClosed(f"the zygote has ended with {self._process.poll()}")
        answer = decode(line)
        if "error" in answer:
            raise (ConfigError if answer["exit_code"] == ConfigError.exit_code else StartError)(answer["error"])
        return answer

    async def fork(self, kind: str, title: str, on_exit: Callable[[Child], None], **spec: Any) -> Child:
        answer = await self.ask("fork", kind=kind, title=title, **spec)
        return Child(answer["pid"], on_exit)

    async def reap(self, child: Child) -> str:
        """How an exited child ended. Frees its pid."""
        status: str = (await self.ask("reap", pid=child.pid))["status"]
        child.close()
        return status

    def _ended(self, on_exit: Callable[[], None]) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        on_exit()

    def stop(self) -> None:
        """End the zygote; all its children end with it."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._process.kill()
        self._process.wait()
        self._writer.transport.abort()
