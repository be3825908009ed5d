"""What clients notice when the deployment shrinks, heals and grows beneath them.

A daemon with four CPU ranks serves streams without a pause. Ranks are killed and come back, GPUs are lost and replaced
(a spare one, or a new one that appears later), and the number of ranks is changed by order. Each stream is compared
token for token with an undisturbed run, and what the daemon's processes hold afterwards with what they held at the
start. With --wear its throughput is measured before and afterwards, in turn with that of a second daemon which is left
alone: an idle neighbour, so that clients wait a little longer in all changes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.command import check_json_path, positive, say, to_the_end, write_json
from bench.elastic_report import Report, render
from bench.elastic_run import Plan, Run
from bench.machine import Machine, load_average
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Display

EXAMPLES = """examples:
  python -m bench.elasticity                       ten cycles of each kind; about 12 minutes on two cores
  python -m bench.elasticity --quick               two cycles; about three minutes
  python -m bench.elasticity --wear                throughput before and after, too; a quarter of an hour
  python -m bench.elasticity --json elastic.json   all raw numbers as well

exit status: 0 if no stream was lost, refused or changed and every change came to its end, 1 if not, 2 for a wrong
argument. Bars that are not met are printed, and do not count."""

CYCLES, QUICK_CYCLES = 10, 2
STREAMS = 16
TOKENS = 120


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.elasticity",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cycles",
        type=positive,
        metavar="N",
        help=f"of each kind, rejoins twice as many ({CYCLES}, quick {QUICK_CYCLES})",
    )
    parser.add_argument("--streams", type=positive, metavar="N", default=STREAMS, help=f"at once ({STREAMS})")
    parser.add_argument("--tokens", type=positive, metavar="N", default=TOKENS, help=f"of each stream ({TOKENS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers to FILE")
    parser.add_argument("--wear", action="store_true", help="throughput before and after, beside another daemon")
    parser.add_argument("--quick", action="store_true", help="few cycles, short windows")
    return parser


async def measure(cycles: int, streams: int, tokens: int, quick: bool, wear: bool) -> Report:
    """Everything, one after the other. What it starts is stopped when it is cancelled."""
    started, load = time.monotonic(), load_average()
    with Display(make_console(stderr=True)) as display:
        run = Run(Plan.of(cycles, quick, wear), streams, tokens, say, display)
        await run.everything()
    return Report(
        machine=Machine.here(),
        load=(load, load_average()),
        cycles=cycles,
        streams=streams,
        tokens=tokens,
        seconds=time.monotonic() - started,
        results=run.results,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    cycles = options.cycles or (QUICK_CYCLES if options.quick else CYCLES)
    check_json_path(parser(), options.json)
    report = to_the_end(measure(cycles, options.streams, options.tokens, options.quick, options.wear))
    make_console().print(render(report))
    write_json(options.json, report.to_json())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
