"""A rank copies experts from its slots to host memory while it serves.

The main thread reads the slots between two steps, since a move could overwrite them at any other time, and no more at
once than delays a step by milliseconds. A thread of its own computes digests and writes files meanwhile, and wakes the
main thread for the next ones, which it also does while the rank is idle.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog

from elastic_daemon.engine.experts import ExpertSlots
from elastic_daemon.engine.host_copies import HostCopies, Weights
from elastic_daemon.engine.respread import gb_per_s
from elastic_daemon.errors import ControlClosed
from elastic_daemon.placement import IntArray

log = structlog.get_logger(__name__)

STAGED_BYTES = 16 << 20
"""Read from the slots between two steps, and one expert at least: milliseconds at the speed of a bus."""


@dataclass(frozen=True)
class _Staged:
    """Experts on their way to files: (layer, expert) and weights in host memory."""

    epoch: int
    experts: tuple[tuple[tuple[int, int], Weights], ...]
    began: float


class Storing:
    """Belongs to the main thread, except for `_write` and what it calls.

    `column`: what this rank holds, [layers, S]; `send`: to the supervisor; `wake`: has `stage` called in the main
    thread. The last two are called from the writing thread.
    """

    def __init__(
        self,
        rank: int,
        slots: ExpertSlots,
        copies: HostCopies,
        column: Callable[[], IntArray],
        send: Callable[..., None],
        wake: Callable[[], None],
    ) -> None:
        self._rank = rank
        self._slots = slots
        self._copies = copies
        self._column = column
        self._send = send
        self._wake = wake
        self._wanted: deque[tuple[int, int]] = deque()
        self._epoch = 0
        self._staged: queue.SimpleQueue[_Staged] = queue.SimpleQueue()
        self._is_writing = threading.Event()
        self._thread: threading.Thread | None = None

    def order(self, epoch: int, experts: list[tuple[int, int]]) -> None:
        """Store these, (layer, expert), in this epoch."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="host-copies", daemon=True)
            self._thread.start()
        self._epoch = epoch
        self._wanted.extend(experts)

    def void(self) -> None:
        """The epoch has ended: whatever has not been read from its slot will be asked for again."""
        self._wanted.clear()

    def stage(self) -> None:
        """Read the next experts from their slots, unless the last ones are still being written."""
        if not self._wanted or self._is_writing.is_set():
            return
        began, column = time.monotonic(), self._column()
        staged: list[tuple[tuple[int, int], Weights]] = []
        size = 0
        while self._wanted and size < STAGED_BYTES:
            layer, expert = self._wanted.popleft()
            held = np.flatnonzero(column[layer] == expert)
            if len(held) == 0:
                log.info("expert_not_stored", rank=self._rank, layer=layer, expert=expert, because="it has moved away")
                continue
            weights = self._slots.snapshot(layer, int(held[0]))
            staged.append(((layer, expert), weights))
            size += sum(tensor.nbytes for tensor in weights.values())
        self._is_writing.set()
        self._staged.put(_Staged(self._epoch, tuple(staged), began))

    def _write(self) -> None:
        try:
            while True:
                self._store(self._staged.get())
                self._is_writing.clear()
                self._wake()
        except ControlClosed:
            pass  # the control thread ends the process

    def _store(self, staged: _Staged) -> None:
        stored: list[tuple[int, int]] = []
        size = 0
        try:
            for content, weights in staged.experts:
                size += self._copies.write(*content, weights)
                stored.append(content)
        except OSError as error:  # say, no space. They have no copy then, and the next order tries again
            left = len(staged.experts) - len(stored) + len(self._wanted)
            self._wanted.clear()  # the main thread leaves it alone while this one writes
            log.error("host_copies_failed", rank=self._rank, stored=len(stored), left=left, error=str(error))
        seconds = time.monotonic() - staged.began
        log.info(
            "host_copies_stored",
            rank=self._rank,
            epoch=staged.epoch,
            experts=len(stored),
            bytes=size,
            seconds=round(seconds, 4),
            gb_per_s=gb_per_s(size, seconds),
        )
        if stored:
            self._send("stored", epoch=staged.epoch, experts=stored, seconds=seconds, bytes=size)
