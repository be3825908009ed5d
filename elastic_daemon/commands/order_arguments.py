"""Arguments of the commands that give orders, and what the arguments of all commands have in common."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from elastic_daemon.commands.client_tls import VARIABLES
from elastic_daemon.config import default_runtime_dir

Commands = argparse._SubParsersAction  # argparse has no public name for it

EXIT_STATUS = """\
exit status: 0 done; 1 refused, failed or undone; 2 bad arguments; 3 when no daemon answers
"""

SCALE_EXAMPLES = f"""\
examples:
  elastic-daemon scale 3                                 one of four leaves: a degraded one, else the highest
  elastic-daemon scale 3 --retire 1                      rank 1 leaves
  elastic-daemon scale 6 --timeout 600 --no-wait
  ELASTIC_ADMIN_KEY=… elastic-daemon scale 4 --url http://10.0.0.5:8000
Requests move, none is aborted. What fails is undone. The daemon remembers the number over a restart.
{EXIT_STATUS}"""

DRAIN_EXAMPLES = f"""\
examples:
  elastic-daemon drain 2                                 move its requests and experts away, then let it go
  elastic-daemon drain 2 --timeout 30
It stays out until `elastic-daemon release 2`.
{EXIT_STATUS}"""

EXCLUDE_EXAMPLES = f"""\
examples:
  elastic-daemon exclude 2                               give it up at once, as if it had died
It stays out until `elastic-daemon release 2`.
{EXIT_STATUS}"""

RELEASE_EXAMPLES = f"""\
examples:
  elastic-daemon release 2                               rank 2, drained or excluded before, may come back
  elastic-daemon release GPU-5d0a1f6c-0000-0000-0000-000000000002
                                                         this GPU may leave quarantine
{EXIT_STATUS}"""

AUTOMATION_EXAMPLES = f"""\
examples:
  elastic-daemon automation                              is it on?
  elastic-daemon automation off                          maintenance: restore nothing, act on no verdict
  elastic-daemon automation on
While it is off, the death of a process is still recovered from. It is on again after a restart.
{EXIT_STATUS}"""


def add_order_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    scale = add_command(commands, "scale", "serve with another number of ranks", SCALE_EXAMPLES)
    scale.add_argument("ranks", type=_positive, metavar="N", help="ranks to serve with")
    scale.add_argument("--retire", type=_ranks, metavar="RANK[,RANK]", help="who leaves (default: the daemon chooses)")
    _add_order(scale)

    drain = add_command(commands, "drain", "take a rank out in order", DRAIN_EXAMPLES)
    exclude = add_command(commands, "exclude", "take a rank out at once", EXCLUDE_EXAMPLES)
    for parser in (drain, exclude):
        parser.add_argument("rank", type=_rank, metavar="RANK")
        _add_order(parser)

    release = add_command(commands, "release", "let a rank, or a GPU in quarantine, come back", RELEASE_EXAMPLES)
    release.add_argument("what", type=_rank_or_gpu, metavar="RANK|GPU", help="a rank, or the UUID of a GPU")
    _add_order(release)

    automation = add_command(commands, "automation", "switch what the daemon does by itself", AUTOMATION_EXAMPLES)
    automation.add_argument("switch", nargs="?", choices=("on", "off"), help="default: show whether it is on")
    add_target(automation)
    automation.add_argument("--json", action="store_true", help="print the answer as it is")


def add_command(
    commands: Commands[argparse.ArgumentParser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime-dir",
        type=Path,
        default=default_runtime_dir(),
        metavar="DIR",
        help="runtime directory of the daemon (default: %(default)s)",
    )
    parser.add_argument("--url", help="ask a daemon over HTTP instead, e.g. http://127.0.0.1:8000")
    for flag, meaning in (
        ("--cacert", "trust the authorities in this file (PEM), and no others"),
        ("--cert", "file with the certificate (PEM) for a daemon that asks its clients for one"),
        ("--cert-key", "file with the private key of --cert; without it, it is in the same file"),
    ):
        default = f"(default: ${VARIABLES[flag]})"
        parser.add_argument(flag, type=Path, metavar="FILE", help=f"https: {meaning} {default}")


def add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=1.0, metavar="S", help="show it again each S seconds (default: 1)"
    )


def _add_order(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="S", help="undo what takes longer (default: %(default)g)"
    )
    parser.add_argument("--no-wait", action="store_true", help="return when the daemon has taken the order")
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: what the operation has come to")


def _rank(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError(f"expected the number of a rank, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if (number := _rank(text)) < 1:
        raise argparse.ArgumentTypeError("expected one rank at least")
    return number


def _ranks(text: str) -> list[int]:
    return [_rank(part.strip()) for part in text.split(",")]


def _rank_or_gpu(text: str) -> int | str:
    if re.fullmatch(r"(?:GPU|MIG)-[\w-]+", text):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected the number of a rank or the UUID of a GPU (GPU-…), got {text!r}")
    return _rank(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0 and at most 86400, got {text!r}")
    return seconds
