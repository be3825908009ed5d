"""Command line of `elastic-daemon`: serve, status, scale, drain, exclude, release, automation, events, drill, plan."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from elastic_daemon import __version__
from elastic_daemon.config import Device, HostExpertCopies, Respread, Restore, default_runtime_dir, load_settings
from elastic_daemon.errors import ElasticError, wrong_watchdog
from elastic_daemon.logs import configure_logging
from elastic_daemon.order_arguments import add_command, add_order_commands, add_target, add_watch
from elastic_daemon.plan_arguments import add_plan_command
from elastic_daemon.watch.upkeep import WatchMode
from watchdog.completion import add_completion_command

SERVE_EXAMPLES = """\
examples:
  elastic-daemon serve                                   the bundled tiny MoE on four CPU ranks
  elastic-daemon serve --data-parallel-size 5 --survive-losses 3
  elastic-daemon serve ./model --data-parallel-size 6 --survive-losses 2 --max-model-len 8192
Any flag that is not listed here goes to vLLM (docs/flags.md says which cannot work).
exit status: 0 stopped on request; 1 unexpected error; 2 bad flag, variable, file or model; 3 the start cannot succeed;
4 the front end keeps ending
"""

STATUS_EXAMPLES = """\
examples:
  elastic-daemon status                                  the daemon in the default runtime directory
  elastic-daemon status --url http://127.0.0.1:8000
  elastic-daemon status --json | jq .last_recovery.seconds
  elastic-daemon status --watch                          until Ctrl-C; on a terminal in place
  elastic-daemon status --watch 5 --json >> status.jsonl
exit status: 0 while clients are served (ok, degraded, recovering), 1 otherwise, 2 for bad arguments, 3 when no daemon
answers
"""

EVENTS_EXAMPLES = """\
examples:
  elastic-daemon events
  elastic-daemon events --follow | grep rank_excluded
  elastic-daemon events --url http://127.0.0.1:8000
exit status: 0 printed; 2 bad arguments; 3 when no daemon answers (with --follow: for a minute)
"""

DRILL_EXAMPLES = """\
examples:
  elastic-daemon drill                                   the live daemon, or one that is started and stopped for it
  elastic-daemon drill --kill 0,2 --at 40%               two ranks at once, after 40% of all tokens
  elastic-daemon drill --streams 32 --tokens 500 --at 2s --seed 7
  elastic-daemon drill --url http://127.0.0.1:8000 --json > drill.json
The drill kills processes of the daemon for real. It needs to run on the daemon's machine, as its user.
exit status: 0 if no stream was lost or changed, 1 otherwise, 2 for bad arguments, 3 when no daemon answers or starts
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-daemon", description="Keeps large Mixture-of-Experts models serving when GPUs die."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        epilog=SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    serve.usage = "elastic-daemon serve [MODEL] [options] [any vLLM engine flag]"
    serve.description = "Serve MODEL (a directory or hub id; it comes first), or without one the bundled tiny-moe."
    serve.add_argument("--data-parallel-size", type=int, metavar="N", help="ranks to serve with (default: 4)")
    serve.add_argument("--max-ranks", type=int, metavar="M", help="most ranks that can be scaled up to (default: N)")
    serve.add_argument(
        "--reset-target", action="store_true", help="forget the number of ranks that was scaled to before this start"
    )
    serve.add_argument("--device", choices=[device.value for device in Device], help="default: cpu")
    serve.add_argument(
        "--ranks-per-gpu", type=int, metavar="R", help="ranks that share a GPU, to test without many (default: 1)"
    )
    serve.add_argument(
        "--survive-losses",
        type=int,
        metavar="K",
        help="size slots so that any N-K ranks hold every expert (default: 1)",
    )
    serve.add_argument(
        "--restore",
        choices=[restore.value for restore in Restore],
        help="start lost ranks again and let them rejoin (default: auto)",
    )
    serve.add_argument(
        "--respread",
        choices=[respread.value for respread in Respread],
        help="spread copies of experts anew after each change of the group (default: auto)",
    )
    serve.add_argument(
        "--host-expert-copies",
        choices=[copies.value for copies in HostExpertCopies],
        help="copy experts that a single rank holds to host memory (default: auto)",
    )
    serve.add_argument("--hold-timeout", type=float, metavar="S", help="hold requests this long without capacity (60)")
    serve.add_argument("--start-timeout", type=float, metavar="S", help="give a rank this long to start (300)")
    serve.add_argument("--shutdown-timeout", type=float, metavar="S", help="let requests finish this long (5)")
    serve.add_argument(
        "--watchdog",
        choices=[mode.value for mode in WatchMode],
        help="start and tend a watchdog, expect one that others start, or do without (default: spawn)",
    )
    serve.add_argument(
        "--watchdog-flags", metavar="FLAGS", help='for `elastic-watchdog run`, e.g. --watchdog-flags="--mode observe"'
    )
    serve.add_argument("--spare-gpus", type=int, metavar="K", help="idle simulated GPUs on --device cpu (default: 0)")
    serve.add_argument(
        "--gpu-probation",
        type=float,
        metavar="S",
        help="a GPU must be healthy this long before a rank starts on it (2)",
    )
    serve.add_argument("--state-dir", type=Path, metavar="DIR", help="what is remembered over restarts")
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: 8000; 0: any free one)")
    serve.add_argument(
        "--api-key", action="append", metavar="KEY", help="require this key (again for more; better: $ELASTIC_API_KEY)"
    )
    serve.add_argument(
        "--admin-key", metavar="KEY", help="require it for scaling and such (seen in `ps`; better: $ELASTIC_ADMIN_KEY)"
    )
    serve.add_argument("--runtime-dir", type=Path, metavar="DIR", help=f"default: {default_runtime_dir()}")

    status = add_command(commands, "status", "show ranks and state of a running daemon", STATUS_EXAMPLES)
    add_target(status)
    status.add_argument("--json", action="store_true", help="print the body of /health as it is")
    add_watch(status)

    add_order_commands(commands)

    events = add_command(commands, "events", "print what happened, oldest first", EVENTS_EXAMPLES)
    add_target(events)
    events.add_argument("--follow", "-f", action="store_true", help="go on as things happen, also across a restart")

    drill = add_command(commands, "drill", "kill a rank under load and compare what clients see", DRILL_EXAMPLES)
    drill.description = (
        "Stream completions twice, the second time with SIGKILL of a rank on the way, and compare the two\n"
        "runs token by token. Uses the daemon at --url or the live one in --runtime-dir; otherwise starts\n"
        "one of its own."
    )
    add_target(drill)
    drill.add_argument("--streams", type=int, default=16, metavar="N", help="clients at once (default: %(default)s)")
    drill.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens per stream (default: %(default)s)")
    drill.add_argument("--kill", metavar="RANK[,RANK]", help="ranks to kill (default: a random one that is active)")
    drill.add_argument(
        "--at",
        default="0.5",
        metavar="WHEN",
        help="when: seconds into the run (2s), or a share of all tokens (0.4, 40%%; default: %(default)s)",
    )
    drill.add_argument("--ranks", type=int, metavar="N", help="ranks of a daemon that the drill starts (default: 4)")
    drill.add_argument("--seed", type=int, metavar="N", help="of the random choice (default: a new one, shown)")
    drill.add_argument("--json", action="store_true", help="print one JSON object with all numbers")
    add_plan_command(commands)
    add_completion_command(commands, parser.prog)
    return parser


def serve(arguments: argparse.Namespace, engine_flags: Sequence[str]) -> int:
    try:
        from elastic_daemon.supervisor import Supervisor
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "watchdog":
            raise wrong_watchdog(error) from error
        raise

    flags = {name: value for name, value in vars(arguments).items() if name != "command"}
    settings = load_settings({**flags, "engine_flags": tuple(engine_flags)} if engine_flags else flags)
    configure_logging()
    return asyncio.run(Supervisor(settings).run())


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    # Taken out by hand: argparse would take the value of an unknown vLLM flag for the model.
    model = given.pop(1) if given[:1] == ["serve"] and len(given) > 1 and not given[1].startswith("-") else None
    arguments, rest = parser.parse_known_args(given)
    if model is not None:
        arguments.model = model
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if arguments.command == "serve":
            code = serve(arguments, rest)
        else:
            from elastic_daemon.operator_commands import COMMANDS
            from elastic_daemon.order_commands import ORDER_COMMANDS

            code = {**COMMANDS, **ORDER_COMMANDS}[arguments.command](arguments)
            sys.stdout.flush()
    except ElasticError as error:
        print(f"elastic-daemon: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    main()
