"""What `--help` says of both programs: every command has examples that parse, and exit statuses that it really has."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from elastic_daemon import cli
from elastic_daemon.cli import make_parser
from elastic_daemon.commands import operator_commands
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.control.service_control import EXIT_FRONTEND, EXIT_START, EXIT_STOPPED
from elastic_daemon.errors import StartError
from elastic_daemon.membership import Status
from tests.unit.command_line import run, serving
from tests.unit.test_operator_commands import Plane
from watchdog.cli import main as watchdog_main
from watchdog.cli import make_parser as watchdog_parser
from watchdog.status import write_status

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = re.compile(r"^(?:  |example: )((?:\w+=\S+ )*elastic-(?:daemon|watchdog) .*?)(?:   .*| \\)?$", re.MULTILINE)


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All commands that do something by themselves, also those below `simulate`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield child
                yield from commands(child)


def all_commands() -> list[argparse.ArgumentParser]:
    return [*commands(make_parser()), *commands(watchdog_parser())]


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    joined = re.sub(r" \\\n +", " ", parser.epilog or "")
    return EXAMPLE.findall(joined)


def parse_command(line: str) -> argparse.Namespace:
    """Parse a command line of ours as the program itself would; what is piped or redirected is left out."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    end = next((at for at, word in enumerate(words) if word in ("|", ">", ">>", "&")), len(words))
    program, *given = words[:end]
    if Path(program).name == "elastic-watchdog":
        return watchdog_parser().parse_args(given)
    model = given.pop(1) if given[0] in cli.TAKES_ALL_FLAGS and len(given) > 1 and given[1][0] != "-" else None
    arguments, rest = make_parser().parse_known_args(given)
    assert not rest or given[0] in cli.TAKES_ALL_FLAGS, rest
    assert not any(word.startswith("--") and word.partition("=")[0] not in VLLM for word in rest), rest
    return argparse.Namespace(**{**vars(arguments), "model": model or vars(arguments).get("model")})


VLLM = {"--max-model-len", "--enforce-eager", "--gpu-memory-utilization", "--quantization"}
"""Flags of vLLM that examples use."""


@pytest.mark.parametrize("parser", all_commands(), ids=lambda parser: parser.prog)
def test_every_command_has_examples_that_parse(parser: argparse.ArgumentParser) -> None:
    examples = examples_of(parser)
    assert any(re.search(rf"{parser.prog}\b", example) for example in examples), parser.epilog
    for example in examples:
        parse_command(example)


def documented(parser: argparse.ArgumentParser) -> set[int]:
    text = (parser.epilog or "").partition("exit status: ")[2]
    return {int(code) for code in re.findall(r"(?:^|[;,]\s|,? or )(\d)(?= |,)", text)}


def declared() -> list[tuple[str, int]]:
    parsers = [parser for parser in all_commands() if len(parser.prog.split()) == 2]
    return [(parser.prog, code) for parser in parsers for code in sorted(documented(parser))]


def test_every_command_tells_its_exit_statuses() -> None:
    assert {prog for prog, _ in declared()} == {p.prog for p in all_commands() if len(p.prog.split()) == 2}


def watch(*line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        watchdog_main(line)
    return ended.value.code or 0  # type: ignore[return-value]


Here = tuple[Path, pytest.MonkeyPatch]


def _served(*line: str, status: Status = Status.OK) -> Callable[[Here], int]:
    def do(here: Here) -> int:
        with serving(Plane(status), here[0]):
            return run(*line, "--runtime-dir", str(here[0]))

    return do


def _alone(*line: str) -> Callable[[Here], int]:
    return lambda here: run(*line, "--runtime-dir", str(here[0]))


def _supervisor(ends: int | Exception) -> Callable[[Here], int]:
    def do(here: Here) -> int:
        async def ended(_: object) -> int:
            if isinstance(ends, Exception):
                raise ends
            return ends

        from elastic_daemon.supervisor import Supervisor

        here[1].setattr(Supervisor, "run", ended)
        return run("serve", "--runtime-dir", str(here[0]))

    return do


def _drill(ends: int | Exception) -> Callable[[Here], int]:
    def do(here: Here) -> int:
        def ended(_: argparse.Namespace) -> int:
            if isinstance(ends, Exception):
                raise ends
            return ends

        here[1].setattr("elastic_daemon.drill.drill.drill", ended)
        return run("drill", "--runtime-dir", str(here[0]))

    return do


SIZES = ("--experts", "8", "--layers", "2", "--expert-bytes", "1e6", "--other-bytes", "1e6")
ORDERS = ("scale 3", "drain 2", "exclude 2", "release 2")
STATUS = {
    "pid": 1, "mode": "act", "epoch": 1, "ranks": [], "gpus": [],
    "driver": {"version": "1", "trouble": "", "stuck": {}}, "daemon": {"reachable": True},
}  # fmt: skip


def _watchdog_status(age_s: float) -> Callable[[Here], int]:
    def do(here: Here) -> int:
        write_status(here[0], STATUS)
        path = here[0] / "watchdog.json"
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
        return watch("status", "--runtime-dir", str(here[0]))

    return do


def _simulated(here: Here) -> int:
    from watchdog.simulator import create

    create(here[0], 1)
    return watch("simulate", "--runtime-dir", str(here[0]), "list")


WAYS: dict[tuple[str, int], Callable[[Here], int]] = {
    ("elastic-daemon serve", 0): _supervisor(EXIT_STOPPED),
    ("elastic-daemon serve", 1): _supervisor(RuntimeError("of no kind of ours")),
    ("elastic-daemon serve", 2): _alone("serve", "--port", "70000"),
    ("elastic-daemon serve", 3): _supervisor(StartError("port")),
    ("elastic-daemon serve", 4): _supervisor(EXIT_FRONTEND),
    ("elastic-daemon config", 0): _alone("config"),
    ("elastic-daemon config", 2): _alone("config", "--port", "70000"),
    ("elastic-daemon status", 0): _served("status"),
    ("elastic-daemon status", 1): _served("status", status=Status.UNAVAILABLE),
    ("elastic-daemon status", 2): _alone("status", "--watch", "never"),
    ("elastic-daemon status", 3): _alone("status"),
    ("elastic-daemon events", 0): _served("events"),
    ("elastic-daemon events", 2): _alone("events", "--since"),
    ("elastic-daemon events", 3): _alone("events"),
    ("elastic-daemon automation", 0): _served("automation"),
    ("elastic-daemon automation", 2): _alone("automation", "maybe"),
    ("elastic-daemon automation", 3): _alone("automation"),
    ("elastic-daemon drill", 0): _drill(0),
    ("elastic-daemon drill", 1): _drill(1),
    ("elastic-daemon drill", 2): _alone("drill", "--streams", "0"),
    ("elastic-daemon drill", 3): _drill(StartError("it does not start")),
    ("elastic-daemon plan", 0): lambda _: run("plan", *SIZES, "--data-parallel-size", "4", "--gpu-memory", "80"),
    ("elastic-daemon plan", 1): lambda _: run("plan", *SIZES, "--data-parallel-size", "4", "--gpu-memory", "0.001"),
    ("elastic-daemon plan", 2): lambda _: run("plan", "--data-parallel-size", "4", "--gpu-memory", "80"),
    ("elastic-daemon completion", 0): lambda _: run("completion", "bash"),
    ("elastic-daemon completion", 2): lambda _: run("completion", "cmd"),
    ("elastic-watchdog run", 2): lambda here: watch("run", "--poll-interval", "0"),
    ("elastic-watchdog run", 3): lambda here: watch("run", "--simulated", "--runtime-dir", str(here[0])),
    ("elastic-watchdog status", 0): _watchdog_status(0),
    ("elastic-watchdog status", 1): _watchdog_status(60),
    ("elastic-watchdog status", 2): lambda _: watch("status", "--no-such-flag"),
    ("elastic-watchdog status", 3): lambda here: watch("status", "--runtime-dir", str(here[0])),
    ("elastic-watchdog simulate", 0): _simulated,
    ("elastic-watchdog simulate", 2): lambda here: watch("simulate", "--runtime-dir", str(here[0]), "list"),
    ("elastic-watchdog completion", 0): lambda _: watch("completion", "bash"),
    ("elastic-watchdog completion", 2): lambda _: watch("completion", "cmd"),
}
ELSEWHERE = {
    ("elastic-watchdog run", 0): "tests/contract/test_watchdog_process.py",
    **{(f"elastic-daemon {line.split()[0]}", code): "tests/unit/test_order_commands.py"
       for line in (*ORDERS, "automation") for code in range(4)},
}  # fmt: skip
"""Those that need a process or a plane that takes orders, and the tests that have one."""


def test_exit_statuses_in_the_help_are_all_there_are() -> None:
    assert set(declared()) == set(WAYS) | set(ELSEWHERE)


@pytest.mark.parametrize(("prog", "code"), list(WAYS), ids=str)
def test_exit_status(prog: str, code: int, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (prog, code) == ("elastic-daemon serve", 1):  # Python's own, with the traceback in the log
        with pytest.raises(RuntimeError):
            WAYS[prog, code]((socket_dir, monkeypatch))
        return
    assert WAYS[prog, code]((socket_dir, monkeypatch)) == code


def test_the_daemon_s_own_statuses_are_those_of_the_help() -> None:
    assert (EXIT_STOPPED, EXIT_START, EXIT_FRONTEND) == (0, 3, 4)


def rendered(console: Console) -> str:
    console.print("[red]x[/red]")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_only_on_a_terminal(
    terminal: bool, no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Output(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Output())
    assert ("\x1b[31m" in rendered(make_console())) is coloured
    assert operator_commands.make_console is make_console


@pytest.mark.parametrize("no_color", ["", "1"])
def test_logs_honour_no_color(no_color: str) -> None:
    """On a terminal, which a pseudo-terminal is."""
    import pty

    code = (
        "from elastic_daemon.telemetry.logs import configure_logging; configure_logging()\n"
        "import structlog; structlog.get_logger().info('x')"
    )
    main, terminal = pty.openpty()
    env = {**os.environ, "ELASTIC_LOG_FORMAT": "text", "TERM": "xterm", "NO_COLOR": no_color}
    try:
        subprocess.run([sys.executable, "-c", code], stderr=terminal, env=env, cwd=ROOT, check=True)
        assert (b"\x1b[" in os.read(main, 4096)) is (not no_color)
    finally:
        os.close(main)
        os.close(terminal)
