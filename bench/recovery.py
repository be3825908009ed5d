"""How long a lost rank interrupts clients, beside stock vLLM that has to be restarted.

Our daemon serves the bundled model on four CPU ranks. Ranks are killed with SIGKILL: early and late in decoding, in
prefill, idle just before requests arrive, two at once, and one more during the recovery of the first. Each run is
compared token for token with an undisturbed run of the same daemon. Stock vLLM (data-parallel 2, expert parallelism,
same model and streams) then loses a process too, and an ideal supervisor restarts it at once: from nothing, and in a
process that had imported vLLM beforehand.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.command import check_json_path, positive, say, to_the_end, write_json
from bench.machine import Machine, load_average
from bench.ours import run_ours
from bench.plan import plan
from bench.report import Report, render
from bench.stock import Stock, run_stock
from elastic_daemon.commands.operator_commands import make_console

EXAMPLES = """examples:
  python -m bench.recovery                            20 kills, and stock vLLM; 8 minutes on two cores
  python -m bench.recovery --quick                    4 kills, no stock vLLM; about a minute, for CI
  python -m bench.recovery --kills 8 --json out.json  all raw numbers as well

exit status: 0 if no stream was lost or changed and the median over all runs of the longest wait of any client is at
most 0.2 s, 1 if not, 2 for a wrong argument."""

KILLS, QUICK_KILLS = 20, 4
STREAMS = 16
TOKENS, QUICK_TOKENS = 120, 60


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.recovery",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=positive, metavar="N", help=f"SIGKILLs in all ({KILLS}, quick {QUICK_KILLS})")
    parser.add_argument("--streams", type=positive, metavar="N", default=STREAMS, help=f"at once ({STREAMS})")
    parser.add_argument("--tokens", type=_tokens, metavar="N", help=f"of each stream ({TOKENS}, quick {QUICK_TOKENS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers to FILE")
    parser.add_argument("--no-stock", action="store_true", help="leave out the comparison with stock vLLM")
    parser.add_argument("--quick", action="store_true", help="few kills, short streams, no stock vLLM")
    return parser


def _tokens(text: str) -> int:
    """Shorter streams would end before the later kills are due."""
    if not 20 <= (number := int(text)) <= 1500:
        raise argparse.ArgumentTypeError(f"expected 20 to 1500, got {number}")
    return number


async def measure(kills: int, streams: int, tokens: int, with_stock: bool) -> Report:
    """Everything, one after the other. What it starts is stopped when it is cancelled."""
    started, load = time.monotonic(), load_average()
    ours = await run_ours(plan(kills), streams, tokens, say)
    stock: Stock | None = await run_stock(streams, tokens, say) if with_stock else None
    return Report(
        machine=Machine.here(),
        load=(load, load_average()),
        kills=kills,
        streams=streams,
        tokens=tokens,
        seconds=time.monotonic() - started,
        ours=ours,
        stock=stock,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    kills = options.kills or (QUICK_KILLS if options.quick else KILLS)
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    check_json_path(parser(), options.json)
    report = to_the_end(measure(kills, options.streams, tokens, not (options.no_stock or options.quick)))
    make_console().print(render(report))
    write_json(options.json, report.to_json())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
