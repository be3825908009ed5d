"""Command line of `elastic-daemon`: serve, config, the orders of an operator, and what shows the state of things."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

import structlog

from elastic_daemon import __version__
from elastic_daemon.commands.order_arguments import Commands, add_command, add_order_commands, add_target, add_watch
from elastic_daemon.commands.plan_arguments import add_plan_command
from elastic_daemon.commands.serve_arguments import add_serve_arguments
from elastic_daemon.config import Settings
from elastic_daemon.errors import ConfigError, ElasticError, wrong_watchdog
from elastic_daemon.settings.resolve import with_places
from elastic_daemon.settings.sources import Sources
from elastic_daemon.telemetry.logs import configure_logging

SERVE_EXAMPLES = """\
examples:
  elastic-daemon serve                                   the bundled tiny MoE on four CPU ranks
  elastic-daemon serve --data-parallel-size 5 --survive-losses 3
  elastic-daemon serve ./model --data-parallel-size 6 --survive-losses 2 --max-model-len 8192
  elastic-daemon serve --config elastic-daemon.toml      flags win over $ELASTIC_*, and those over the file
Any flag that is not listed here goes to vLLM (docs/flags.md says which cannot work).
exit status: 0 stopped on request; 1 unexpected error; 2 bad flag, variable, file or model; 3 the start cannot succeed;
4 the front end keeps ending
"""

CONFIG_EXAMPLES = """\
examples:
  elastic-daemon config                                  what `elastic-daemon serve` would take
  elastic-daemon config --config /etc/elastic-daemon.toml
  elastic-daemon config --json | jq .port
exit status: 0 shown; 2 if a setting is wrong
"""

STATUS_EXAMPLES = """\
examples:
  elastic-daemon status                                  the daemon in the default runtime directory
  elastic-daemon status --url http://127.0.0.1:8000
  elastic-daemon status --url https://gpu-host:8000 --cacert ca.pem
  elastic-daemon status --url https://gpu-host:8000 --cert operator.pem --cert-key operator-key.pem
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
  elastic-daemon drill --url https://gpu-host:8000 --cacert ca.pem
The drill kills processes of the daemon for real. It needs to run on the daemon's machine, as its user. A daemon that
it starts has a state directory of its own: the host's daemon remembers nothing of it.
Where the daemon serves with TLS, give a --url with a name that is in its certificate.
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
    add_serve_arguments(serve)
    serve.add_argument("--print-config", action="store_true", help="show each setting and where it was given, and end")

    config = commands.add_parser(
        "config",
        help="show each setting and where it was given",
        epilog=CONFIG_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    config.usage = "elastic-daemon config [--json] [MODEL] [options of serve]"
    config.description = "What `serve` would take, with the same arguments, environment and file. Keys are masked."
    add_serve_arguments(config)
    config.add_argument("--json", action="store_true", help="print one JSON object")

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
    _add_completion_command(commands, parser.prog)
    return parser


def _add_completion_command(commands: Commands[argparse.ArgumentParser], prog: str) -> None:
    try:
        from watchdog.completion import add_completion_command
    except ImportError:  # another package of that name: `serve` says so
        return
    add_completion_command(commands, prog)


NO_SETTINGS = ("command", "print_config", "json")

TAKES_ALL_FLAGS = ("serve", "config")


def serve(sources: Sources) -> int:
    try:
        from elastic_daemon.supervisor import Supervisor
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "watchdog":
            raise wrong_watchdog(error) from error
        raise

    loaded = sources.load()
    os.umask(0o077)  # what the daemon writes is for its user only
    export_logging(loaded.settings)
    configure_logging()
    for doubt in loaded.doubts:
        structlog.get_logger("elastic_daemon").warning("key_exposed", reason=doubt)
    try:
        return asyncio.run(Supervisor(loaded.settings, sources).run())
    except ConfigError as error:
        raise ConfigError(with_places(str(error), loaded.given)) from error


def export_logging(settings: Settings) -> None:
    """All processes of the daemon, and its watchdog, log alike: they read the environment."""
    os.environ["ELASTIC_LOG_LEVEL"] = settings.log_level
    if settings.log_format is not None:
        os.environ["ELASTIC_LOG_FORMAT"] = settings.log_format.value


def show_config(sources: Sources, as_json: bool) -> int:
    from elastic_daemon.settings.settings_table import shown, to_json, to_toml

    rows = shown(sources.load())
    sys.stdout.write(to_json(rows) + "\n" if as_json else to_toml(rows))
    sys.stdout.flush()
    return 0


def sources_of(arguments: argparse.Namespace, engine_flags: Sequence[str]) -> Sources:
    """`arguments` of `serve`, and what is left for vLLM."""
    flags = {name: value for name, value in vars(arguments).items() if name not in NO_SETTINGS}
    return Sources({**flags, "engine_flags": tuple(engine_flags)} if engine_flags else flags)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    # Taken out by hand: argparse would take the value of an unknown vLLM flag for the model.
    takes_all = bool(given) and given[0] in TAKES_ALL_FLAGS
    model = given.pop(1) if takes_all and len(given) > 1 and not given[1].startswith("-") else None
    arguments, rest = parser.parse_known_args(given)
    if model is not None:
        arguments.model = model
    if rest and not takes_all:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if takes_all:
            sources = sources_of(arguments, rest)
            shows = arguments.command == "config" or "print_config" in arguments
            code = show_config(sources, "json" in arguments) if shows else serve(sources)
        else:
            from elastic_daemon.commands.operator_commands import COMMANDS
            from elastic_daemon.commands.order_commands import ORDER_COMMANDS

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
