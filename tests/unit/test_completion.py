"""Completion in real shells: those of bash, zsh and fish that are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_daemon.cli import make_parser
from tests.tools import require
from watchdog.cli import make_parser as watchdog_parser
from watchdog.completion import SHELLS, completion

PARSERS = {"elastic-daemon": make_parser, "elastic-watchdog": watchdog_parser}

COMPLETE_IN_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
read -ra how <<< "$(complete -p "$1")"
for at in "${!how[@]}"; do [[ ${how[at]} == -F ]] && function=${how[at + 1]}; done
"$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

CASES = [
    (["elastic-daemon", "st"], {"status"}),
    (["elastic-daemon", "dr"], {"drain", "drill"}),
    (["elastic-daemon", "status", "--"], {"--json", "--watch", "--url", "--runtime-dir", "--help"}),
    (["elastic-daemon", "serve", "--data-p"], {"--data-parallel-size"}),
    (["elastic-daemon", "serve", "--device", "c"], {"cpu", "cuda"}),
    (["elastic-daemon", "automation", "o"], {"on", "off"}),
    (["elastic-daemon", "completion", ""], {"bash", "zsh", "fish"}),
    (["elastic-watchdog", "s"], {"status", "simulate"}),
    (["elastic-watchdog", "simulate", "re"], {"recovery-action", "remap-failure", "replace", "reset-required"}),
    (["elastic-watchdog", "simulate", "xid", "--"], {"--code", "--gpu", "--help"}),
]


def script(tmp_path: Path, shell: str, prog: str) -> Path:
    path = tmp_path / ("_" + prog if shell == "zsh" else prog)
    path.write_text(completion(PARSERS[prog](), shell), encoding="utf-8")
    return path


def bash(tmp_path: Path, words: list[str]) -> set[str]:
    path = str(script(tmp_path, "bash", words[0]))
    command = ["bash", "--norc", "-c", COMPLETE_IN_BASH, "bash", path, *words]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def fish(tmp_path: Path, words: list[str]) -> set[str]:
    path = script(tmp_path, "fish", words[0])
    command = ["fish", "--no-config", "-c", f"source {path}; complete -C {' '.join(words)!r}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(("words", "offered"), CASES, ids=lambda case: "_".join(case) if isinstance(case, list) else "")
@pytest.mark.parametrize("shell", [bash, fish], ids=["bash", "fish"])
def test_completion(shell: object, words: list[str], offered: set[str], tmp_path: Path) -> None:
    name = shell.__name__  # type: ignore[attr-defined]
    if shell is not bash:
        require(name)
    got = shell(tmp_path, words)  # type: ignore[operator]
    assert offered <= got, got
    if shell is bash and not words[-1].startswith("--"):
        assert offered == got


@pytest.mark.parametrize("prog", PARSERS)
def test_zsh_takes_the_script(prog: str, tmp_path: Path) -> None:
    """It completes on a terminal only; so this is as far as a test goes: the script is read, its function is there."""
    require("zsh")
    path = script(tmp_path, "zsh", prog)
    subprocess.run(["zsh", "-f", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"#compdef {prog}\n")
    assert all(f'"--{flag}[' in text or f"--{flag}}}" in text for flag in ("runtime-dir", "json"))


@pytest.mark.parametrize("program", ["elastic_daemon.cli", "watchdog.cli"])
@pytest.mark.parametrize("shell", SHELLS)
def test_the_commands_print_the_scripts(program: str, shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", program, "completion", shell], capture_output=True, text=True, check=True
    )
    assert done.stdout == completion(PARSERS["elastic-daemon" if "daemon" in program else "elastic-watchdog"](), shell)
    assert "--runtime-dir" in done.stdout or "runtime-dir" in done.stdout
