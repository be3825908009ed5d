"""Commands in README and docs: in fenced blocks of shell, and between backticks in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(sh|bash|console|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)

PROGRAMS = r"(?:elastic-(?:daemon|watchdog)|make|python|pip|curl|sed|ssh|openssl|watch|system(?:ctl|d-\w+)|journalctl)"
SPANNED = re.compile(rf"(?:\$ )?((?:\w+=\S+ )*(?:\.venv/bin/)?{PROGRAMS} \S.*)")
"""A span of code that is a command: one of these programs with something to do."""
SHORT = re.compile(r"(?:serve|config|status|scale|drain|exclude|release|automation|events|drill|plan) \S.*")
"""A span that leaves the program out: `release 2`."""


@dataclass(frozen=True, order=True)
class Command:
    """`line` without its comment; lines that end in a backslash are joined."""

    document: str
    line: str


def commands() -> list[Command]:
    found = {Command(path.relative_to(ROOT).as_posix(), line) for path in DOCUMENTS for line in _lines(path)}
    return sorted(found)


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def spans(path: Path) -> list[str]:
    """What stands between backticks, blocks aside. It may go on in the next line."""
    paragraphs = re.split(r"\n\s*\n", prose(path))
    return [span for text in paragraphs for span in re.findall(r"`([^`]+)`", re.sub(r"\s*\n\s*", " ", text))]


def _lines(path: Path) -> Iterator[str]:
    for language, body in SHELL.findall(path.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n\s*", "", body).splitlines():
            if language in ("console", "text"):  # the rest is what they print
                if line.startswith("$ "):
                    yield _bare(line.removeprefix("$ "))
            elif bare := _bare(line):
                yield bare
    for span in spans(path):
        if match := SPANNED.fullmatch(span):
            yield match[1]
        elif SHORT.fullmatch(span):
            yield f"elastic-daemon {span}"


def _bare(line: str) -> str:
    return re.sub(r"(^|\s+)#.*$", "", line).strip()
