"""`completion`, a command of both programs: what a shell needs to complete their commands and flags.

shtab makes it from the parsers, for bash, zsh and fish. It is not imported before it is asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")

INSTALL: Final[Mapping[str, str]] = {
    "bash": "~/.local/share/bash-completion/completions/{prog}",
    "zsh": "~/.zfunc/_{prog}",
    "fish": "~/.config/fish/completions/{prog}.fish",
}
"""Where each shell looks by itself (zsh: with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc)."""


def add_completion_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], prog: str) -> None:
    """Add `completion` to the commands of `prog`."""
    examples = "".join(f"  {prog} completion {shell} > {INSTALL[shell].format(prog=prog)}\n" for shell in SHELLS)
    parser = commands.add_parser(
        "completion",
        help="print what completes commands and flags in a shell",
        description="Print a script that completes commands and flags in bash, zsh or fish.",
        epilog=f"examples:\n{examples}"
        "In zsh, `fpath+=~/.zfunc` has to come before `compinit` in ~/.zshrc.\n"
        "exit status: 0 printed; 2 bad arguments\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `shell`. `parser` is changed: to be used for nothing else afterwards."""
    import shtab

    _mark_paths(parser, shtab.FILE, shtab.DIRECTORY)
    script: str = shtab.complete(parser, shell=shell)
    return script


def _mark_paths(parser: argparse.ArgumentParser, file: Mapping[str, str], directory: Mapping[str, str]) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark_paths(child, file, directory)
        elif action.metavar in ("DIR", "MODEL"):
            action.complete = directory  # type: ignore[attr-defined]
        elif action.metavar == "FILE":
            action.complete = file  # type: ignore[attr-defined]
