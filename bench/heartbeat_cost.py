"""What a heartbeat costs the rank that writes it, and the watchdog that reads it.

    python -m bench.heartbeat_cost [--collectives 20] [--step-ms 5] [--seconds 2]

Times a whole step as a rank writes it (start, then each collective entered and completed) against an empty loop of the
same shape, in the same run, and prints its share of a step. Fails (exit 1) when that is above 0.5 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, perf_counter_ns

from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.layout import Collective, Phase
from watchdog.heartbeat.page import HeartbeatWriter
from watchdog.heartbeat.reader import PageDirectory

BAR = 0.005
KINDS = (Collective.DISPATCH, Collective.COMBINE)


def median_ns(work: Callable[[], object], seconds: float) -> float:
    """Median time of one call, so that what else runs on the machine does not count."""
    times = []
    end = perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter_ns()
        work()
        times.append(perf_counter_ns() - start)
    return float(sorted(times)[len(times) // 2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collectives", type=int, default=20, help="collectives per step (default 20)")
    parser.add_argument("--step-ms", type=float, default=5.0, help="length of a step (default 5 ms)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure each (default 2)")
    options = parser.parse_args()
    kinds = [KINDS[index % 2] for index in range(options.collectives)]

    with tempfile.TemporaryDirectory() as directory:
        writer = HeartbeatWriter(Path(directory), rank=0, incarnation=1)
        writer.begin_epoch(1)

        def step() -> None:
            writer.start_step(7, Phase.DECODE)
            for kind in kinds:
                writer.enter(kind)
                writer.complete(kind)

        def empty_step() -> None:
            for _ in kinds:
                pass

        written, empty = median_ns(step, options.seconds), median_ns(empty_step, options.seconds / 4)
        beat = median_ns(writer.beat, options.seconds / 4)
        pages = PageDirectory(Path(directory))
        read = median_ns(pages.read, options.seconds / 4)
        snapshots, judge = pages.read()[0], HeartbeatJudge()
        judged = median_ns(lambda: judge.observe(perf_counter(), snapshots), options.seconds / 4)
        pages.close()
        writer.close()

    share = (written - empty) / (options.step_ms * 1e6)
    updates = 2 * options.collectives + 1
    print(f"step of {options.step_ms:g} ms with {options.collectives} collectives, {updates} updates of the page")
    print(f"  with heartbeats     {written / 1e3:8.1f} us")
    print(f"  same loop, empty    {empty / 1e3:8.1f} us")
    print(f"  per update          {(written - empty) / updates:8.0f} ns")
    print(f"  share of the step   {100 * share:8.2f} %   (bar {100 * BAR:g} %)")
    print(f"idle beat             {beat:8.0f} ns, timer included")
    print(f"reader, one page      {read / 1e3:8.1f} us, directory and process state included")
    print(f"judge, one rank       {judged / 1e3:8.1f} us")
    return 0 if share <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
