"""Command line: `elastic-watchdog run | status | simulate | completion`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from watchdog.completion import add_completion_command, completion
from watchdog.docket import Mode
from watchdog.errors import OptionError, StartError, WatchdogError
from watchdog.logs import configure_logging
from watchdog.parent import die_with_parent
from watchdog.probe import ProbePolicy
from watchdog.runtime_dir import default_runtime_dir
from watchdog.signals import load_table
from watchdog.simulate import add_simulate_parser, run_simulate
from watchdog.simulator import Simulator, SimulatorError, driver_environment
from watchdog.state import default_state_dir
from watchdog.status import STALE_S, read_status, render
from watchdog.verdict import Policy

RUN_EXAMPLES = """\
examples:
  elastic-watchdog run                               this machine's NVIDIA GPUs
  elastic-watchdog run --mode observe                judge and log, never have the daemon act
  elastic-watchdog run --signals /etc/elastic-daemon/signals.toml
  elastic-watchdog run --simulated                   the simulated GPUs of a daemon with --device cpu
The watchdog may be started before the daemon, and outlives it: it waits.
exit status: 0 after SIGTERM or SIGINT, 2 for a bad option, variable or table of signals, 3 when it cannot start
"""

STATUS_EXAMPLES = """\
examples:
  elastic-watchdog status
  watch -n1 elastic-watchdog status
  elastic-watchdog status --json | jq '.gpus[] | select(.verdict != "ok")'
exit status: 0 while the watchdog is alive, 1 when it does not move any more, 2 for bad arguments, 3 when there is none
"""

POLICY_HELP = {
    "probation_s": "a GPU is ok again after so long without a fatal or confirmed signal",
    "min_ranks": "ranks that must stay in service; the daemon's own number wins",
    "max_exclusions": "GPUs taken from ranks at the most per window",
    "exclusion_window_s": "length of that window",
    "quarantine_failures": "failures after which a GPU needs an operator's release (0: never)",
    "quarantine_window_s": "length of that window",
    "repeat_restarts": "hung ranks after which their GPU is drained (0: never)",
    "repeat_window_s": "length of that window",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-watchdog", description="Watches GPUs and ranks from outside and tells the daemon which are bad."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    status = commands.add_parser(
        "status",
        help="show each GPU and rank with evidence and verdict",
        epilog=STATUS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_runtime_dir(status)
    status.add_argument("--json", action="store_true", help="all that is known, as JSON")
    add_simulate_parser(commands)
    add_completion_command(commands, parser.prog)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="watch",
        description="Watch this machine's GPUs and the daemon's ranks, and report verdicts to the daemon.",
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_runtime_dir(run)
    run.add_argument(
        "--state-dir",
        type=Path,
        default=default_state_dir(),
        metavar="DIR",
        help="what outlives a restart (%(default)s)",
    )
    run.add_argument(
        "--mode",
        choices=[mode.value for mode in Mode],
        default="act",
        help="observe: nothing is acted on (default: act)",
    )
    run.add_argument("--signals", type=Path, metavar="FILE", help="changes to the table of signals (TOML)")
    run.add_argument(
        "--poll-interval", type=float, default=ProbePolicy.interval, metavar="S", help="default: %(default)s"
    )
    run.add_argument("--simulated", action="store_true", help="ask the simulated driver of the runtime directory")
    run.add_argument("--parent", type=int, metavar="PID", help="end with this process, which must be the parent")
    for name, text in POLICY_HELP.items():
        default = getattr(Policy(), name)
        unit = "S" if isinstance(default, float) else "N"
        run.add_argument(
            f"--{name.removesuffix('_s').replace('_', '-')}",
            dest=name,
            type=type(default),
            default=default,
            metavar=unit,
            help=f"{text} (%(default)s)",
        )


def _add_runtime_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime-dir",
        type=Path,
        default=default_runtime_dir(),
        metavar="DIR",
        help="runtime directory of the daemon (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    from watchdog.service import Service, Settings

    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    policy = Policy(**{name: getattr(arguments, name) for name in POLICY_HELP})
    for one in fields(policy):
        if getattr(policy, one.name) < 0:
            raise OptionError(f"--{one.name.removesuffix('_s').replace('_', '-')}: must not be negative")
    if not 0.02 <= arguments.poll_interval <= 60:
        raise OptionError(f"--poll-interval: from 0.02 to 60 seconds, not {arguments.poll_interval:g}")
    settings = Settings(
        arguments.runtime_dir,
        arguments.state_dir,
        load_table(arguments.signals),
        Mode(arguments.mode),
        policy,
        replace(ProbePolicy(), interval=arguments.poll_interval),
        _simulated_driver(arguments.runtime_dir) if arguments.simulated else {},
    )
    configure_logging()

    async def serve() -> None:
        await Service(settings).run()

    asyncio.run(serve())
    return 0


def _simulated_driver(runtime_dir: Path) -> dict[str, str]:
    try:
        Simulator.open(runtime_dir).close()
        return driver_environment(runtime_dir)
    except SimulatorError as error:
        raise StartError(f"--simulated: {error}") from error


def status(arguments: argparse.Namespace) -> int:
    found = read_status(arguments.runtime_dir)
    print(json.dumps(found, indent=1) if arguments.json else render(found))
    return 1 if found["age_s"] > STALE_S else 0


def show_completion(arguments: argparse.Namespace) -> int:
    sys.stdout.write(completion(make_parser(), arguments.shell))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    commands = {"run": run, "status": status, "simulate": run_simulate, "completion": show_completion}
    try:
        code = commands[arguments.command](arguments)
        sys.stdout.flush()
    except WatchdogError as error:
        print(f"elastic-watchdog: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    main()
