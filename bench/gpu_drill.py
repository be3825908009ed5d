"""The drill of a GPU host: ranks that are killed, stopped, scaled and watched under load, over real NCCL.

Parts that need the same flags of the daemon share one life of it. Each part writes its result as soon as it is over;
one that has a result is not run again, so a drill that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.command import positive, to_the_end
from bench.gpu.budget import Budget
from bench.gpu.life import Setting
from bench.gpu.parts import PARTS, listing
from bench.gpu.results import read_all, table
from bench.gpu.running import Running
from elastic_daemon.drill.sampling import MODES

EXAMPLES = """examples:
  python -m bench.gpu_drill --part kill --part hang --budget 560 --out results
  python -m bench.gpu_drill --part kill --variant v1-async --serve-args=--async-scheduling --out results
  python -m bench.gpu_drill --part kill --sampling mixed --variant mixed --out results
  python -m bench.gpu_drill --part fp8 --model fp8-model --out results
  python -m bench.gpu_drill --part kill --device cpu --trials 1 --out trial     proves the script, not a GPU
  python -m bench.gpu_drill --report results

exit status: 0 if all parts that were run met their bars, or were refused with a reason; 1 if not; 2 for a wrong
argument; 130 if it was stopped."""

DEFAULT_OUT = Path("gpu-drill")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_drill",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part", action="append", type=_parts, default=[], metavar="PART[,PART]", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--list", action="store_true", help="what each part does, needs and has to reach")
    parser.add_argument("--report", type=Path, metavar="DIR", help="print the table of the results in DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", default=DEFAULT_OUT, help="results (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run parts that have a result, too")
    parser.add_argument("--budget", type=_seconds, metavar="S", help="begin only what fits into so many seconds")
    parser.add_argument("--variant", type=_name, metavar="NAME", help="of the cell that is drilled")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial of the drill itself")
    parser.add_argument("--ranks", type=positive, metavar="N", default=4, help="default: %(default)s")
    parser.add_argument("--ranks-per-gpu", type=positive, metavar="R", help="default: all on one; with cpu, 1")
    parser.add_argument("--serve-args", type=shlex.split, default=[], metavar="FLAGS", help="for `serve`")
    parser.add_argument("--model", metavar="DIR", help="instead of the bundled model")
    parser.add_argument("--streams", type=positive, metavar="N", default=8, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, metavar="N", default=120, help="of each (default: %(default)s)")
    parser.add_argument("--trials", type=positive, metavar="N", help="instead of each part's own number")
    parser.add_argument("--logprobs", action="store_true", help="ask for 2 logprobs, to tell near-ties from errors")
    parser.add_argument(
        "--sampling",
        choices=tuple(MODES),
        default="greedy",
        help="mixed: greedy, seeded, penalised and bound to a regex in turn (default: %(default)s)",
    )
    parser.add_argument("--watch-minutes", type=_seconds, metavar="M", default=5.0, help="nvml (default: %(default)g)")
    return parser


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    return names


def _seconds(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time, got {text}")
    return number


def _name(text: str) -> str:
    if not text or not text.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise argparse.ArgumentTypeError(f"expected letters, digits, dots and dashes, got {text!r}")
    return text


def setting_of(chosen: argparse.Namespace) -> Setting:
    return Setting(
        device=chosen.device,
        ranks=chosen.ranks,
        ranks_per_gpu=chosen.ranks_per_gpu,
        serve_args=tuple(chosen.serve_args),
        model=os.path.abspath(chosen.model) if chosen.model else None,
        streams=chosen.streams,
        tokens=chosen.tokens,
        logprobs=2 if chosen.logprobs else None,
        sampling=chosen.sampling,
        watch_minutes=chosen.watch_minutes,
        trials=chosen.trials,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    chosen = parser.parse_args(arguments)
    setting = setting_of(chosen)
    if chosen.list:
        print(listing(setting))
        return 0
    if chosen.report:
        try:
            results = read_all(chosen.report)
        except ValueError as error:
            parser.error(f"--report: {error}")
        print(table(results, tuple(PARTS)))
        return 0
    names = list(dict.fromkeys(name for given in chosen.part for name in given))
    if not names:
        parser.error("one of --part, --list and --report is needed")
    running = Running(setting, chosen.out, chosen.variant, Budget(chosen.budget), chosen.again)
    to_the_end(running.run(names))
    return 0 if running.good else 1


if __name__ == "__main__":
    sys.exit(main())
