"""Writes docs/cli.md from the parsers of both programs.

python scripts/cli_doc.py            write docs/cli.md
python scripts/cli_doc.py --check    exit status 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from elastic_daemon.cli import make_parser  # noqa: E402
from elastic_daemon.config import default_runtime_dir  # noqa: E402
from scripts.generated_page import write_or_check  # noqa: E402
from watchdog.cli import make_parser as watchdog_parser  # noqa: E402
from watchdog.state import default_state_dir  # noqa: E402

TARGET = ROOT / "docs" / "cli.md"

HEAD = """\
# Command line

<!-- Written by scripts/cli_doc.py from the programs' own help: change that, then run the script. -->

Both programs say this themselves: `elastic-daemon COMMAND --help`. What a failure means and what to do about it is in
[operations.md](operations.md#exit-statuses).

Output is coloured on a terminal only, and not where `NO_COLOR` is set. Results go to standard output, progress and
errors to standard error. With `--json` a command prints one JSON object and nothing else. All commands end with 130
after Ctrl-C, and with 141 when the reader of their output has gone.

Commands find a daemon by its runtime directory: `--runtime-dir`, else `$RUNTIME_DIRECTORY`,
`$XDG_RUNTIME_DIR/elastic-daemon` or one under the temporary directory. With `--url` they ask over HTTP, and send
`$ELASTIC_API_KEY`, or for orders `$ELASTIC_ADMIN_KEY`. A certificate of an authority of your own is proven with
`--cacert`, or `$ELASTIC_CACERT`; a daemon that asks for one of yours gets that of `--cert` and `--cert-key`.
"""


def render() -> str:
    """The text of docs/cli.md."""
    lines = [HEAD]
    for parser in (make_parser(), watchdog_parser()):
        lines += [f"## {parser.prog}", "", parser.description or "", ""]
        lines += ["| command | |", "|---|---|"]
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for choice in commands._choices_actions:
            full = f"{parser.prog} {choice.dest}"
            lines.append(f"| [`{full}`](#{full.replace(' ', '-')}) | {choice.help} |")
        lines.append("")
        for name in commands.choices:
            lines += _command(commands.choices[name])
    return "\n".join(lines).rstrip() + "\n"


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (f"### {parser.prog}", "", _wrapped(parser.description or ""), "")
    yield from ("| argument | |", "|---|---|")
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                flags = " ".join(_flags(action.choices[choice.dest]))
                yield f"| `{choice.dest} {flags}` | {choice.help} |"
            continue
        yield f"| `{_name(action)}` | {_help(parser, action)} |"
    epilog = parser.epilog or ""
    examples, _, status = epilog.partition("exit status: ")
    yield from ("", "```console", *_console(examples), "```", "")
    if notes := [line for line in examples.splitlines() if line and not line.startswith((" ", "example"))]:
        yield from (_wrapped(" ".join(notes)), "")
    if status:
        yield from (_wrapped(f"Exit status: {status}."), "")


def _wrapped(text: str) -> str:
    words = " ".join(text.split()).replace(" .", ".")
    return textwrap.fill(words, 118, break_long_words=False, break_on_hyphens=False)


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            yield _name(action) if action.required else f"[{_name(action)}]"


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return flag
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    return f"{flag} [{value}]" if action.nargs == "?" else f"{flag} {value}"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    shown = parser._get_formatter()._expand_help(action) if action.help else ""
    if action.choices and not action.option_strings and not shown:
        shown = ", ".join(map(str, action.choices))
    for path, name in (
        (default_runtime_dir(), "see above"),
        (default_state_dir(), "state directory"),
    ):
        shown = shown.replace(str(path), name)
    return shown.replace("|", "\\|")


def _console(examples: str) -> Iterator[str]:
    """As they would be typed; what each does becomes a comment."""
    joined = re.sub(r" \\\n +", " ", examples)
    lines = [line for line in joined.splitlines() if line.startswith("  ")]
    for at, line in enumerate(lines):
        command, _, comment = line.strip().partition("   ")
        if line.startswith("    "):
            continue
        following = lines[at + 1].strip() if at + 1 < len(lines) and lines[at + 1].startswith("    ") else ""
        comment = comment.strip() or following
        yield f"$ {command}" + (f"    # {comment}" if comment else "")


if __name__ == "__main__":
    sys.exit(write_or_check(__doc__, TARGET, render()))
