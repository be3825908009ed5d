"""Command line: `elastic-daemon serve | status | events | drill`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from elastic_daemon import __version__
from elastic_daemon.config import Device, default_runtime_dir, load_settings
from elastic_daemon.errors import ElasticError
from elastic_daemon.logs import configure_logging

SERVE_EXAMPLES = """\
examples:
  elastic-daemon serve                                   the bundled tiny MoE on four CPU ranks
  elastic-daemon serve Qwen/Qwen3-30B-A3B --device cuda --data-parallel-size 8
  elastic-daemon serve ./model --data-parallel-size 6 --survive-losses 2 --max-model-len 8192
Any flag that is not listed here goes to vLLM (docs/flags.md says which cannot work).
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
    serve.add_argument("--device", choices=[device.value for device in Device], help="default: cpu")
    serve.add_argument(
        "--survive-losses", type=int, metavar="K", help="size slots so that any N-K ranks hold every expert (default: 1)"
    )
    serve.add_argument("--hold-timeout", type=float, metavar="S", help="hold requests this long without capacity (60)")
    serve.add_argument("--start-timeout", type=float, metavar="S", help="give a rank this long to start (300)")
    serve.add_argument("--shutdown-timeout", type=float, metavar="S", help="let requests finish this long (5)")
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: 8000; 0: any free one)")
    serve.add_argument("--runtime-dir", type=Path, metavar="DIR", help=f"default: {default_runtime_dir()}")

    status = commands.add_parser("status", help="show ranks and state of a running daemon")
    _add_target(status)
    status.add_argument("--json", action="store_true", help="print the body of /health")
    events = commands.add_parser("events", help="print what happened, oldest first")
    _add_target(events)
    events.add_argument("--follow", "-f", action="store_true", help="go on as things happen")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime-dir", type=Path, default=default_runtime_dir(), metavar="DIR")
    parser.add_argument("--url", help="ask a daemon over HTTP instead, e.g. http://127.0.0.1:8000")


def serve(arguments: argparse.Namespace, engine_flags: Sequence[str]) -> int:
    from elastic_daemon.supervisor import Supervisor

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

            code = COMMANDS[arguments.command](arguments)
    except ElasticError as error:
        print(f"elastic-daemon: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
