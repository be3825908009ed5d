"""What a service tells systemd (sd_notify(3)), for the watchdog and for the daemon.

Own code, as the libraries fit badly: `systemd-python` and `cysystemd` are built against libsystemd, and `sdnotify` has
been left alone for years and knows none of MONOTONIC_USEC, EXTEND_TIMEOUT_USEC and WATCHDOG_USEC, which are what is
done here. The rest is one datagram.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

STATUS_S = 1.0
"""A sentence that changes all the time is sent this often."""

EXTEND_S = 60.0
"""What is asked for while a start makes progress; asked for again when a third of it is over."""

PINGS_PER_PERIOD = 4
"""systemd acts when a whole period has passed without a ping; half of it is the least it advises."""


@dataclass(frozen=True)
class Supervision:
    """`address`: None when no service manager listens. `watchdog_s`: None when it expects no pings."""

    address: str | None = None
    watchdog_s: float | None = None

    @classmethod
    def take(cls) -> Supervision:
        """Read it from the environment and remove it there: children must not speak for this process."""
        address = os.environ.pop("NOTIFY_SOCKET", None) or None
        usec = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        meant = not pid or pid == str(os.getpid())
        watchdog_s = int(usec) / 1e6 if meant and usec.isdecimal() and int(usec) > 0 else None
        if watchdog_s is not None:
            faulthandler.enable()  # systemd ends a hung service by SIGABRT: say where it hung
        return cls(address, watchdog_s)


class NotifySocket:
    """Sends datagrams to the service manager and never waits: a manager that is busy must not stop a control loop."""

    def __init__(self, address: str | None) -> None:
        """`address`: a path, or `@` and a name in the abstract namespace."""
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address

    def send(self, **fields: str | int) -> bool:
        """All fields in one datagram. Returns whether it was taken."""
        if self._address is None or not fields:
            return False
        lines = (f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), self._address)
            return True
        return False


class Schedule:
    """What is to be said in a turn of a service's loop. Pure; times are CLOCK_MONOTONIC seconds."""

    def __init__(self, watchdog_s: float | None) -> None:
        self.ready = False
        self._ping_s = None if watchdog_s is None else watchdog_s / PINGS_PER_PERIOD
        self._pinged: float | None = None
        self._extended: float | None = None
        self._told: float | None = None
        self._sentence = ""

    def turn(self, now: float, sentence: str, *, serving: bool, stopping: bool = False) -> dict[str, str | int]:
        """Fields to send. `serving` counts the first time only: what comes later is for STATUS to tell."""
        fields: dict[str, str | int] = {}
        if serving and not self.ready:
            self.ready = True
            fields["READY"] = 1
        if not self.ready and not stopping and _is_due(self._extended, EXTEND_S / 3, now):
            self._extended = now
            fields["EXTEND_TIMEOUT_USEC"] = _usec(EXTEND_S)
        if sentence != self._sentence and (fields or _is_due(self._told, STATUS_S, now)):
            self._told, self._sentence = now, sentence
            fields["STATUS"] = sentence
        if self._ping_s is not None and _is_due(self._pinged, self._ping_s, now):
            self._pinged = now
            fields["WATCHDOG"] = 1
        return fields


class Notifier:
    """A service's voice. Without a service manager it does nothing."""

    def __init__(self, supervision: Supervision) -> None:
        self._socket = NotifySocket(supervision.address)
        self._schedule = Schedule(supervision.watchdog_s)
        self._listened_to = supervision.address is not None
        self._stopping = False

    def turn(self, sentence: Callable[[], str], *, serving: bool) -> None:
        """From each turn of the loop that proves progress, and from nowhere else: it sends the watchdog's ping."""
        if self._listened_to:
            now, stopping = time.monotonic(), self._stopping
            self._socket.send(**self._schedule.turn(now, sentence(), serving=serving, stopping=stopping))

    def reloading(self) -> None:
        """The configuration is being read anew; `ready` must follow. Nothing before the service is ready at all."""
        if self._schedule.ready and not self._stopping:
            self._socket.send(RELOADING=1, MONOTONIC_USEC=_usec(time.monotonic()))

    def ready(self) -> None:
        """The reload is over, however it went."""
        if self._schedule.ready and not self._stopping:
            self._socket.send(READY=1)

    def stopping(self, timeout_s: float) -> None:
        """The service ends in order, which may take `timeout_s` whatever the unit says."""
        self._stopping = True
        self._socket.send(STOPPING=1, EXTEND_TIMEOUT_USEC=_usec(timeout_s))


def _is_due(last: float | None, every_s: float, now: float) -> bool:
    return last is None or now - last >= every_s


def _usec(seconds: float) -> int:
    return int(seconds * 1e6)
