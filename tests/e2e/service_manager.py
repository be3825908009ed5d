"""A service manager for tests, as far as a service can tell: the other end of its notify socket.

Not systemd: it makes no cgroup, so what is left of a service after its main process is what the service itself left.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests import proc


@dataclass(frozen=True)
class Said:
    """One datagram. `at`: CLOCK_MONOTONIC seconds of its arrival; `pid`: who sent it, as the kernel says."""

    at: float
    pid: int
    fields: dict[str, str] = field(default_factory=dict)


class ServiceManager:
    """Hears what services say. `environment` is what it starts them with."""

    def __init__(self, address: Path, watchdog_s: float) -> None:
        self.environment = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}
        self._heard: list[Said] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(address))
        self._socket.settimeout(0.1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> ServiceManager:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                data, ancillary, _, _ = self._socket.recvmsg(8192, socket.CMSG_SPACE(12))
            except TimeoutError:
                continue
            [(_, _, credentials)] = ancillary
            pid = int.from_bytes(credentials[:4], "little")
            lines = dict(line.split("=", 1) for line in data.decode().split("\n"))
            self._heard.append(Said(time.monotonic(), pid, lines))

    def said(self, name: str, since: float = 0.0) -> list[Said]:
        """What had this field, from time `since` on, in order."""
        return [one for one in list(self._heard) if name in one.fields and one.at >= since]

    def status(self) -> str:
        """The last sentence."""
        told = self.said("STATUS")
        return told[-1].fields["STATUS"] if told else ""

    @property
    def speakers(self) -> set[int]:
        return {one.pid for one in list(self._heard)}

    def longest_silence(self, name: str, since: float, until: float) -> float:
        times = [since, *(one.at for one in self.said(name, since) if one.at <= until), until]
        return max(later - earlier for earlier, later in pairwise(times))


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{timeout_s:g} s without {what}"
        time.sleep(0.02)


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    return dict(pair.split("=", 1) for pair in proc.read(pid, "environ").split("\0") if "=" in pair)
