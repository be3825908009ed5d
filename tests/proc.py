"""What Linux says of processes that may end while one asks (/proc)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def read(pid: int, name: str) -> str:
    """One of its files, such as `cmdline`; empty for a process that has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def state(pid: int) -> str:
    """One letter; Z for a zombie, empty for none."""
    stat = read(pid, "stat")
    return stat.rpartition(")")[2].split()[0] if stat else ""


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run; a zombie does not."""
    return [pid for pid in pids if state(pid) not in ("", "Z")]
