"""What Linux says of processes that may end while one asks (/proc)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path


def read(pid: int, name: str) -> str:
    """One of its files, such as `cmdline`; empty for a process that has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    """Zombies too. Of a process that ends meanwhile, those found so far."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    nearest = children(pid)
    return nearest + [far for child in nearest for far in descendants(child)]


def state(pid: int) -> str:
    """One letter; Z for a zombie, empty for none."""
    stat = read(pid, "stat")
    return stat.rpartition(")")[2].split()[0] if stat else ""


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run; a zombie does not."""
    return [pid for pid in pids if state(pid) not in ("", "Z")]
