"""A process that writes a heartbeat page like a rank: RUNTIME_DIR RANK MODE.

MODE `idle` turns an idle loop, `busy` updates without a pause, `torn` stops itself (SIGSTOP) in the middle of one.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from pathlib import Path

from watchdog.heartbeat.layout import ENTERED, SEQUENCE, Collective, Granularity, Phase
from watchdog.heartbeat.page import HeartbeatWriter


def main() -> None:
    rank, mode = int(sys.argv[2]), sys.argv[3]
    mapped: list[mmap.mmap] = []

    def keep(page: mmap.mmap) -> Granularity:
        mapped.append(page)
        return Granularity.COLLECTIVE

    writer = HeartbeatWriter(Path(sys.argv[1]), rank, 10 + rank, keep)
    writer.begin_epoch(3)
    print("ready", flush=True)
    step = 0
    while mode == "idle":
        writer.beat()
        time.sleep(0.1)
    while True:
        step += 1
        writer.start_step(step, Phase.DECODE)
        for kind in (Collective.DISPATCH, Collective.COMBINE):
            writer.enter(kind)
            writer.complete(kind)
        if mode == "torn" and step == 1000:
            words = memoryview(mapped[0]).cast("Q")
            words[SEQUENCE] += 1
            words[ENTERED] += 1
            os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
