"""Processes that form groups as they are told, and may be killed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Member:
    """`orders`: our end of a pipe; `void`: an event that says that the group has ended."""

    process: Any
    orders: Connection
    void: Any

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return int(self.process.pid)

    def said(self, within_s: float) -> Any:
        """What it sends next. Raises TimeoutError."""
        if not self.orders.poll(within_s):
            raise TimeoutError(f"process {self.pid} has said nothing for {within_s:g} s")
        return self.orders.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(body: Callable[..., None], *arguments: Any) -> Member:
    """A process that runs `body(orders, void, *arguments)`, with the environment of this one as it is now."""
    ours, theirs = SPAWN.Pipe()
    void = SPAWN.Event()
    process = SPAWN.Process(target=body, args=(theirs, void, *arguments), daemon=True)
    process.start()
    return Member(process, ours, void)
