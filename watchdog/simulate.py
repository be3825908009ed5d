"""`elastic-watchdog simulate`: inject faults into the simulated GPUs of a daemon that runs with `--device cpu`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from watchdog.runtime_dir import default_runtime_dir
from watchdog.simulator import UNKNOWN_ERROR, GpuState, Simulator, SimulatorError, Throttle

Act = Callable[[Simulator, argparse.Namespace], object]

DESCRIPTION = """\
Show or break the simulated GPUs of a daemon that runs with --device cpu. They are seen by the watchdog only, through
a real libnvidia-ml.so.1. Faults last until the GPU is healed or replaced.
"""

EPILOG = """\
examples:
  elastic-watchdog simulate list
  elastic-watchdog simulate xid --gpu 2 --code 79         the Xid event alone
  elastic-watchdog simulate lose --gpu 2                  it falls off the bus
  elastic-watchdog simulate hang --gpu GPU-1c5bf4a2-...   driver calls for it never return
  elastic-watchdog simulate flap --gpu 1 --period 4       lost for 2 s, back for 2 s, ...
  elastic-watchdog simulate replace --gpu 2               another GPU, with a new UUID, in its place
  elastic-watchdog simulate heal --gpu all
exit status: 0 done, 2 for bad arguments, a GPU that is not there or a daemon without simulated ones
"""

EXAMPLES = {
    "list": "--json",
    "lose": "--gpu 2 --event",
    "reset-required": "--gpu 2",
    "driver-error": "--gpu 2",
    "xid": "--gpu 2 --code 79",
    "ecc": "--gpu 2 --count 3 --corrected",
    "remap-failure": "--gpu 2 --pending",
    "recovery-action": "--gpu 2 --code 1",
    "throttle": "--gpu 2 --reason thermal",
    "temperature": "--gpu 2 --celsius 91",
    "hang": "--gpu 1",
    "latency": "--gpu 1 --ms 500",
    "flap": "--gpu 1 --period 4",
    "nvlink-down": "--gpu 2 --link 3",
    "nvlink-errors": "--gpu 2 --link 3 --count 100",
    "fabric": "--gpu 2",
    "pcie-replays": "--gpu 2 --count 50",
    "replace": "--gpu 2",
    "heal": "--gpu all",
}


def add_simulate_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command `simulate`; `run_simulate` takes what it parses."""
    parser = subparsers.add_parser(
        "simulate",
        help="inject faults into simulated GPUs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = default_runtime_dir()
    parser.add_argument(
        "--runtime-dir", type=Path, default=default, metavar="DIR", help=f"of the daemon (default: {default})"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="show the simulated GPUs and their faults")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(act=show)
    _add_faults(actions)
    for name, action in actions.choices.items():
        action.epilog = f"example: elastic-watchdog simulate {name} {EXAMPLES[name]}"
    return parser


def _add_faults(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def fault(
        name: str, text: str, act: Callable[[Simulator, str, argparse.Namespace], Any]
    ) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.add_argument("--gpu", required=True, metavar="INDEX_OR_UUID", help="as `list` shows it, or: all")
        parser.set_defaults(act=on_each_gpu(act))
        return parser

    lose = fault("lose", "off the bus: every call answers GPU_IS_LOST", lambda s, g, a: s.lose(g, event=a.event))
    lose.add_argument("--event", action="store_true", help="the driver sends a GPU-unavailable event too")

    fault("reset-required", "calls answer RESET_REQUIRED until the GPU is healed", lambda s, g, a: s.reset_required(g))

    error = fault("driver-error", "calls answer an unexpected error", lambda s, g, a: s.driver_error(g, a.code))
    error.add_argument(
        "--code", type=int, default=UNKNOWN_ERROR, metavar="N", help="of NVML (default: %(default)s, unknown error)"
    )

    xid = fault("xid", "an Xid error, as an event", lambda s, g, a: s.xid(g, a.code))
    xid.add_argument("--code", type=int, required=True, metavar="N", help="the Xid, for example 79")

    ecc = fault("ecc", "memory errors, uncorrectable ones by default, and an event", ecc_errors)
    ecc.add_argument("--count", type=int, default=1, metavar="N", help="how many (default: 1)")
    ecc.add_argument("--corrected", action="store_true", help="errors that ECC has corrected")

    remap = fault("remap-failure", "a bad row of memory that cannot be remapped", remap_rows)
    remap.add_argument("--pending", action="store_true", help="it will be remapped at the next reset")

    action = fault(
        "recovery-action",
        "what the driver wants done (field 230), and an event",
        lambda s, g, a: s.recovery_action(g, a.code),
    )
    action.add_argument(
        "--code",
        type=int,
        required=True,
        metavar="N",
        help="0 none, 1 reset, 2 reboot, 3 drain P2P, 4 drain and reset, ...",
    )

    throttle = fault("throttle", "lowered clocks", lambda s, g, a: s.throttle(g, Throttle(a.reason)))
    throttle.add_argument(
        "--reason",
        choices=[reason.value for reason in Throttle],
        default=Throttle.THERMAL.value,
        help="default: %(default)s",
    )

    temperature = fault("temperature", "a temperature", lambda s, g, a: s.temperature(g, a.celsius))
    temperature.add_argument("--celsius", type=int, required=True, metavar="N")

    fault("hang", "driver calls for this GPU never return", lambda s, g, a: s.hang(g))

    latency = fault(
        "latency",
        "every driver call for this GPU takes longer",
        lambda s, g, a: s.latency(g, timedelta(milliseconds=a.milliseconds)),
    )
    latency.add_argument("--milliseconds", "--ms", type=int, required=True, metavar="N", help="0 ends it")

    flap = fault("flap", "lost and back, in turn", lambda s, g, a: s.flap(g, timedelta(seconds=a.period)))
    flap.add_argument("--period", type=seconds, default=2.0, metavar="SECONDS", help="of one turn (default: 2)")

    down = fault("nvlink-down", "an NVLink that is down", lambda s, g, a: s.nvlink_down(g, a.link))
    errors = fault("nvlink-errors", "errors on an NVLink", lambda s, g, a: s.nvlink_errors(g, a.link, a.count))
    for parser in (down, errors):
        parser.add_argument("--link", type=int, default=0, metavar="N", help="which one (default: 0)")
    errors.add_argument("--count", type=int, default=1, metavar="N", help="of each kind (default: 1)")

    fault("fabric", "an unhealthy route of the NVLink fabric", lambda s, g, a: s.fabric_unhealthy(g))

    replays = fault("pcie-replays", "PCIe replays", lambda s, g, a: s.pcie_replays(g, a.count))
    replays.add_argument("--count", type=int, default=1, metavar="N", help="how many more (default: 1)")

    fault("replace", "another, healthy GPU with a new UUID in its place", lambda s, g, a: s.replace(g))
    fault("heal", "all faults and counters cleared", lambda s, g, a: s.heal(g))


def run_simulate(arguments: argparse.Namespace, out: Callable[[str], object] = print) -> int:
    """Do what the command line says; returns the exit status, 2 after one line of what is wrong."""
    try:
        with Simulator.open(arguments.runtime_dir) as simulator:
            for line in arguments.act(simulator, arguments):
                out(line)
    except SimulatorError as error:
        print(f"elastic-watchdog simulate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def on_each_gpu(act: Callable[[Simulator, str, argparse.Namespace], Any]) -> Act:
    """Does `act` to the GPUs that were named, and gives each one's state after it."""

    def do(simulator: Simulator, arguments: argparse.Namespace) -> list[str]:
        gpus = simulator.list()
        named = [str(gpu.index) for gpu in gpus] if arguments.gpu == "all" else [arguments.gpu]
        lines = []
        for name in named:
            replacement = act(simulator, name, arguments)
            lines.append(line(state_of(simulator.list(), replacement or name)))
        return lines

    return do


def state_of(gpus: Sequence[GpuState], name: str) -> GpuState:
    return next(gpu for gpu in gpus if name in (str(gpu.index), gpu.uuid))


def ecc_errors(simulator: Simulator, gpu: str, arguments: argparse.Namespace) -> None:
    simulator.ecc(gpu, arguments.count, corrected=arguments.corrected)


def remap_rows(simulator: Simulator, gpu: str, arguments: argparse.Namespace) -> None:
    (simulator.remap_pending if arguments.pending else simulator.remap_failure)(gpu)


def show(simulator: Simulator, arguments: argparse.Namespace) -> list[str]:
    gpus = simulator.list()
    return [json.dumps([asdict(gpu) for gpu in gpus], indent=2)] if arguments.json else [line(gpu) for gpu in gpus]


def line(gpu: GpuState) -> str:
    """One GPU as `list` prints it."""
    state = "lost" if gpu.lost else "faulty" if gpu.faults else "healthy"
    notes = [*(["spare"] if gpu.spare else []), *gpu.faults]
    return f"{gpu.index:>2}  {gpu.uuid}  {gpu.temperature_c:>3} C  {state:<7}  {', '.join(notes)}".rstrip()


def seconds(text: str) -> float:
    """An argparse type. Raises ValueError for what is no duration of at most a day."""
    value = float(text)
    if not 0 < value <= 86_400:
        raise ValueError
    return value
