"""Arguments of `elastic-daemon plan`."""

from __future__ import annotations

import argparse

from elastic_daemon.commands import capacity_plan
from elastic_daemon.commands.order_arguments import add_command

PLAN_EXAMPLES = """\
examples:
  elastic-daemon plan ./model --data-parallel-size 16 --gpu-memory 80
  elastic-daemon plan ./model --data-parallel-size 72 --gpu-memory 141 --mtbf-hours 20000 --repair-hours 72
  elastic-daemon plan --experts 256 --layers 58 --expert-bytes 44e6 --other-bytes 17e9 \\
                      --data-parallel-size 16 --gpu-memory 80 --json
exit status: 0 if something can be recommended, 1 if nothing fits, 2 for bad arguments
"""


def add_plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the commands of `elastic-daemon`."""
    summary = "show which redundancy buys which safety and availability"
    plan = add_command(commands, "plan", summary, PLAN_EXAMPLES)
    plan.add_argument("model", nargs="?", metavar="MODEL", help="a directory with config.json, best with the weights")
    plan.add_argument("--data-parallel-size", type=int, required=True, metavar="N", help="ranks, one GPU each")
    plan.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one GPU")
    plan.add_argument("--experts", type=int, metavar="E", help="without MODEL: routed experts per layer")
    plan.add_argument("--layers", type=int, metavar="L", help="without MODEL: layers with experts")
    plan.add_argument("--expert-bytes", type=float, metavar="BYTES", help="of one expert in one layer")
    plan.add_argument("--other-bytes", type=float, metavar="BYTES", help="of all other weights")
    plan.add_argument(
        "--mtbf-hours",
        type=float,
        default=capacity_plan.MTBF_HOURS,
        metavar="H",
        help="mean time between failures of one GPU (default: %(default)s, from the training of Llama 3)",
    )
    plan.add_argument(
        "--repair-hours",
        type=float,
        default=capacity_plan.REPAIR_HOURS,
        metavar="H",
        help="until it, or another, serves again (default: %(default)s)",
    )
    plan.add_argument(
        "--recovery-seconds",
        type=float,
        default=capacity_plan.RECOVERY_S,
        metavar="S",
        help="pause of a recovery; drill measures it (default: %(default)s)",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object with all numbers")
