"""Commands in README and docs: what stands in their fenced blocks of shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCK = re.compile(r"^```(sh|bash|console|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, order=True)
class Command:
    """`line` without its comment; lines that end in a backslash are joined."""

    document: str
    line: str


def commands() -> list[Command]:
    found = {Command(path.relative_to(ROOT).as_posix(), line) for path in DOCUMENTS for line in _lines(path)}
    return sorted(found)


def _lines(path: Path) -> Iterator[str]:
    for language, body in BLOCK.findall(path.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n\s*", "", body).splitlines():
            if language in ("console", "text"):  # the rest is what they print
                if line.startswith("$ "):
                    yield _bare(line.removeprefix("$ "))
            elif bare := _bare(line):
                yield bare


def _bare(line: str) -> str:
    return re.sub(r"(^|\s+)#.*$", "", line).strip()


class Kind(StrEnum):
    RUN = "run"  # as it stands, on a real deployment
    ENDLESS = "endless"  # the same, ended with Ctrl-C when it has printed something
    PARSED = "parsed"  # by the parser of its program only; the reason says why
    NEEDS = "needs"  # what no test machine has; the reason says what


RUN = (
    "elastic-daemon status",
    "elastic-daemon status --url http://127.0.0.1:8000",
    "elastic-daemon status --json | jq .last_recovery.seconds",
    "elastic-daemon events",
    "elastic-daemon events --url http://127.0.0.1:8000",
    "elastic-daemon config",
    "elastic-daemon config --json",
    "elastic-daemon config --json | jq .port",
    *(f"elastic-daemon completion {shell} > ~/{where}" for shell, where in (
        ("bash", ".local/share/bash-completion/completions/elastic-daemon"),
        ("zsh", ".zfunc/_elastic-daemon"),
        ("fish", ".config/fish/completions/elastic-daemon.fish"),
    )),
    *(f"elastic-watchdog completion {shell} > ~/{where}" for shell, where in (
        ("bash", ".local/share/bash-completion/completions/elastic-watchdog"),
        ("zsh", ".zfunc/_elastic-watchdog"),
        ("fish", ".config/fish/completions/elastic-watchdog.fish"),
    )),
    "elastic-daemon plan ./model --data-parallel-size 16 --gpu-memory 80",
    "elastic-daemon plan ./model --data-parallel-size 72 --gpu-memory 141 --mtbf-hours 20000 --repair-hours 72",
    "elastic-daemon plan --experts 256 --layers 58 --expert-bytes 44e6 --other-bytes 17e9 --data-parallel-size 16 "
    "--gpu-memory 80",
    "elastic-daemon plan --experts 256 --layers 58 --expert-bytes 44e6 --other-bytes 17e9 --data-parallel-size 16 "
    "--gpu-memory 80 --json",
    "curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "tiny-moe", "prompt": "add 384 + 729 =", "max_tokens": 20, "temperature": 0}'""",
    "curl -s http://127.0.0.1:8000/experts/verify",
    "elastic-watchdog status",
    """elastic-watchdog status --json | jq '.gpus[] | select(.verdict != "ok")'""",
    "elastic-watchdog simulate list",
    "elastic-daemon automation",
    "elastic-daemon automation off",
    "elastic-daemon automation on",
    "elastic-daemon scale 3 --retire 1",
    "elastic-daemon scale 4",
    """curl http://127.0.0.1:8000/scale_elastic_ep -H 'Content-Type: application/json' """
    """-d '{"new_data_parallel_size": 3}'""",
    "elastic-daemon scale 3",
    "elastic-daemon scale 4",
    "elastic-daemon drain 2",
    "elastic-daemon release 2",
    "elastic-daemon exclude 2",
    "elastic-daemon release 2",
    "elastic-daemon release GPU-5d0a1f6c",
    "elastic-daemon release GPU-5d0a1f6c-0000-0000-0000-000000000002",
    "elastic-daemon drill",
    "elastic-watchdog simulate xid --gpu 2 --code 79",
    "elastic-watchdog simulate flap --gpu 1 --period 4",
    "elastic-watchdog simulate hang --gpu 1",
    "elastic-watchdog simulate lose --gpu 2",
    "elastic-watchdog simulate replace --gpu 2",
    "elastic-watchdog simulate heal --gpu all",
)  # fmt: skip
"""In this order, from the looks to the orders to the faults."""

ENDLESS = ("elastic-daemon status --watch", "elastic-daemon events --follow")

OTHERS = (
    (r"(\.venv/bin/)?elastic-daemon serve", Kind.PARSED, "every end-to-end test starts it, with flags of its own"),
    (r"elastic-watchdog run", Kind.PARSED, "the deployment has a watchdog; tests/contract starts others"),
    (r"elastic-daemon drill --", Kind.PARSED, "one drill is run; each further one takes half a minute"),
    (r"elastic-daemon status --url https:", Kind.PARSED, "of another machine"),
    (r"elastic-daemon drain 2 --timeout 30", Kind.PARSED, "drained once already"),
    (r"elastic-daemon scale 6", Kind.PARSED, "the deployment has room for four ranks"),
    (r"ELASTIC_ADMIN_KEY=… elastic-daemon scale", Kind.PARSED, "of another machine"),
    (r"elastic-daemon events --follow \| grep", Kind.PARSED, "as without grep, which ends by the next line only"),
    (r"elastic-daemon status --watch 5 --json", Kind.PARSED, "as without a file to look at"),
    (r"elastic-daemon config --config /etc/", Kind.PARSED, "that file is on an operator's machine only"),
    (r"elastic-watchdog simulate hang --gpu GPU-", Kind.PARSED, "a UUID that is cut short"),
    (r"elastic-(daemon|watchdog) \w+ --runtime-dir /run/", Kind.PARSED, "there with systemd only"),
    (r"watch -n1 elastic-watchdog", Kind.PARSED, "watch needs a terminal"),
    (r"make (setup|test|check|format|serve)\b", Kind.PARSED, "it is what runs this test, or ends never"),
    (r"\.venv/bin/python scripts/\w+_doc\.py", Kind.PARSED, "would write documents; tests/unit/test_docs.py compares"),
    (r"make install", Kind.NEEDS, "root, or the network; tests/unit/test_units.py installs into a folder"),
    (r"python -m bench\.gpu_drill", Kind.NEEDS, "a GPU"),
    (r"system(ctl|d-sysusers|d-tmpfiles) ", Kind.NEEDS, "root and systemd"),
    (r"journalctl ", Kind.NEEDS, "systemd"),
    (r"openssl rand .* >> /etc/elastic-daemon/", Kind.NEEDS, "root, and an installed daemon"),
)
"""The start of a line, and why it is not run."""


def classify(command: Command) -> tuple[Kind, str] | None:
    """None for a command that nobody has thought about."""
    if command.line in RUN:
        return Kind.RUN, ""
    if command.line in ENDLESS:
        return Kind.ENDLESS, ""
    return next(((kind, why) for start, kind, why in OTHERS if re.match(start, command.line)), None)
