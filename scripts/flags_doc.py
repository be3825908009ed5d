"""Writes docs/flags.md from the tables in elastic_daemon/settings/flags.py and from what the tests run.

python scripts/flags_doc.py            write docs/flags.md
python scripts/flags_doc.py --check    exit status 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_drill import make_parser as gpu_drill_parser  # noqa: E402
from bench.recovery import parser as bench_parser  # noqa: E402
from elastic_daemon.cli import make_parser  # noqa: E402
from elastic_daemon.config import BUNDLED_FLAGS  # noqa: E402
from elastic_daemon.settings.flags import OURS, REFUSED, REFUSED_LOAD_FORMATS, REFUSED_ON, Refusal  # noqa: E402
from scripts.generated_page import write_or_check  # noqa: E402
from watchdog.cli import make_parser as watchdog_parser  # noqa: E402

TARGET = ROOT / "docs" / "flags.md"
TESTED_FOLDERS = ("tests/e2e", "tests/chaos")
"""Where whole daemons are started, with flags."""
MEANT_TO_FAIL = {"tests/e2e/test_bad_input.py"}
"""Tests that start daemons with what must be refused."""

HEAD = """\
# vLLM flags

<!-- Written by scripts/flags_doc.py from elastic_daemon/settings/flags.py: change that table, then run the script. -->

`elastic-daemon serve` hands every flag that is not its own to vLLM's parser. A flag that cannot work under the daemon
is refused at start-up: one line on standard error that names flag, value and reason, and exit status 2. Anything else
passes through unchanged; that a flag passes does not mean that it was tried (see the last section).
"""


def daemon_flags() -> dict[str, str]:
    """The daemon's own `serve` flags and their help."""
    commands = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices["serve"]._actions
    return {flag: action.help or "" for action in actions for flag in action.option_strings if flag.startswith("--")}


def exercised() -> dict[str, list[str]]:
    """Flags that end-to-end and chaos tests start a daemon with -> the files of those tests."""
    others = flags_of(watchdog_parser(), bench_parser(), gpu_drill_parser()) - set(daemon_flags())
    found: defaultdict[str, set[str]] = defaultdict(set)
    for folder in TESTED_FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for flag in _flags_in(path) if name not in MEANT_TO_FAIL else ():
                found[flag].add(name)
    return {flag: sorted(found[flag]) for flag in sorted(found) if flag not in others}


def flags_of(*parsers: argparse.ArgumentParser) -> set[str]:
    """Flags of these and of all their subcommands."""
    flags: set[str] = set()
    for action in (action for parser in parsers for action in parser._actions):
        flags.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            flags |= flags_of(*action.choices.values())
    return flags


def _flags_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            flag = node.value.partition("=")[0]
            if flag.startswith("--") and flag[2:].replace("-", "").isalpha():
                yield flag


def render() -> str:
    """The text of docs/flags.md."""
    return "\n".join((HEAD, *_refused(), *_ours(), *_tested()))


def _refused() -> Iterator[str]:
    yield "## Refused\n"
    yield from _table(REFUSED)
    for device, refusals in REFUSED_ON.items():
        yield f"\n## Refused with `--device {device}`\n"
        yield from _table(refusals)
    yield "\n## Refused values\n"
    yield "| flag | reason |\n|---|---|"
    for name, reason in REFUSED_LOAD_FORMATS.items():
        yield f"| `--load-format {name}` | {reason} |"
    yield ""


def _table(refusals: tuple[Refusal, ...]) -> Iterator[str]:
    yield "| flag | refused when | reason |\n|---|---|---|"
    for refusal in refusals:
        yield f"| `{refusal.option}` | {_when(refusal.allowed)} | {refusal.reason} |"


def _when(allowed: tuple[Any, ...]) -> str:
    values = [_value(value) for value in allowed if value is not None and value is not False and value not in ([], {})]
    return f"other than {' or '.join(values)}" if values else "given"


def _value(value: object) -> str:
    return f"`{value}`"


def _ours() -> Iterator[str]:
    own = daemon_flags()
    yield "## Read by the daemon\n"
    shared = sorted("--" + flag.replace("_", "-") for flag in OURS)
    yield textwrap.fill(
        f"vLLM has flags of the same name for {', '.join(f'`{flag}`' for flag in shared if flag in own)}; "
        "here the daemon reads them, as `elastic-daemon serve --help` says.",
        120,
        break_on_hyphens=False,
    )
    yield "`--enable-expert-parallel` and `--enable-eplb` need not be given: both are always on."
    yield ""


def _tested() -> Iterator[str]:
    own, tests = daemon_flags(), exercised()
    bundled = " ".join(BUNDLED_FLAGS)
    yield "## Exercised by tests\n"
    yield (
        f"The bundled model is served with `{bundled}`.\n"
        "Further flags that the end-to-end and chaos tests start daemons with; whatever is neither here nor refused\n"
        "passes through untested.\n"
    )
    yield "| flag | whose | tests |\n|---|---|---|"
    for flag, files in tests.items():
        whose = "daemon" if flag in own else "vLLM"
        yield f"| `{flag}` | {whose} | {', '.join(f'`{name}`' for name in files)} |"
    yield ""


if __name__ == "__main__":
    sys.exit(write_or_check(__doc__, TARGET, render()))
