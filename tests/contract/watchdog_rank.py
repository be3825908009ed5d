"""A process that keeps step with others and writes its heartbeat, like a rank: RUNTIME_DIR RANK RANKS MODE WORK_S.

MODE `idle` turns an idle loop; `decode` meets the other ranks in two collectives a step, and works WORK_S before each.
They meet through counters in a shared file, and look up from the wait as a rank does that waits in slices.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path

from watchdog.heartbeat.layout import Collective, Phase
from watchdog.heartbeat.page import HeartbeatWriter

EPOCH = 1


def incarnation_of(rank: int) -> int:
    return 10 + rank


def main() -> None:
    directory, rank, ranks, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    work_s = float(sys.argv[5])
    writer = HeartbeatWriter(directory, rank, incarnation_of(rank))
    writer.begin_epoch(EPOCH)
    fd = os.open(directory / "meeting", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    arrived = memoryview(mmap.mmap(fd, 4096)).cast("Q")
    print("ready", flush=True)
    while mode == "idle":
        writer.beat()
        time.sleep(0.1)
    meetings = step = 0
    while True:
        step += 1
        writer.start_step(step, Phase.DECODE)
        for kind in (Collective.DISPATCH, Collective.COMBINE):
            time.sleep(work_s)
            writer.enter(kind)
            meetings += 1
            arrived[rank] = meetings
            looked = time.monotonic()
            while any(arrived[one] < meetings for one in range(ranks)):
                time.sleep(0.002)
                if time.monotonic() - looked > 0.1:
                    looked = time.monotonic()
                    writer.beat()
            writer.complete(kind)


if __name__ == "__main__":
    main()
