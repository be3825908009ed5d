"""Commands in README and docs: what stands in their fenced blocks of shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
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
