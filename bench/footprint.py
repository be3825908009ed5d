"""What the processes of a daemon hold: whether changes of the group leave anything behind."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
LISTENING = "0A"

LASTING = ("supervisor", "front end", "zygote", "watchdog")
"""Processes that live as long as the daemon. Ranks come and go."""


@dataclass(frozen=True)
class Process:
    """Sizes in KiB: `rss` is resident, `pss` the proportional share of it. `sockets` holds inodes."""

    role: str
    rss: int
    pss: int
    descriptors: int
    threads: int
    sockets: frozenset[int]

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises OSError once it has ended."""
        home = PROC / str(pid)
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", (home / "smaps_rollup").read_text(), re.MULTILINE))
        targets = list(_targets(home / "fd"))
        sockets = {int(found[1]) for target in targets if (found := re.fullmatch(r"socket:\[(\d+)\]", target))}
        title = (home / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return cls(
            role=role_of(title),
            rss=int(sizes.get("Rss", 0)),
            pss=int(sizes.get("Pss", 0)),
            descriptors=len(targets),
            threads=len(os.listdir(home / "task")),
            sockets=frozenset(sockets),
        )


def role_of(title: str) -> str:
    """What a process of the daemon is, from its command line."""
    if found := re.match(r"elastic-daemon: (front end|zygote|rank)\b", title):
        return found[1]
    if "elastic_daemon.cli serve" in title or "elastic-daemon serve" in title:
        return "supervisor"
    return "watchdog" if "watchdog" in title else "other"


def _targets(folder: Path) -> Iterator[str]:
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            yield os.readlink(folder / name)


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(PROC / str(pid) / "task"):
            for child in (PROC / str(pid) / "task" / task / "children").read_text().split():
                found += descendants(int(child))
    return found


@dataclass(frozen=True)
class Footprint:
    """Of a daemon at rest. Counts are of all its processes; `rss` and `pss` by role, in KiB."""

    processes: int
    descriptors: int
    sockets: int
    ports: int
    threads: int
    rss: Mapping[str, int]
    pss: Mapping[str, int]

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """`pid`: of the supervisor."""
        processes = []
        for one in descendants(pid):
            with contextlib.suppress(OSError):
                processes.append(Process.of(one))
        return cls.of_processes(processes, _listeners())

    @classmethod
    def of_processes(cls, processes: Iterable[Process], listeners: frozenset[int]) -> Footprint:
        processes = list(processes)
        sockets = frozenset[int]().union(*(one.sockets for one in processes))
        lasting = [one for one in processes if one.role in LASTING]
        return cls(
            processes=len(processes),
            descriptors=sum(one.descriptors for one in processes),
            sockets=len(sockets),
            ports=len(sockets & listeners),
            threads=sum(one.threads for one in processes),
            rss={role: sum(one.rss for one in lasting if one.role == role) for role in LASTING},
            pss={role: sum(one.pss for one in lasting if one.role == role) for role in LASTING},
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


COUNTS = ("processes", "descriptors", "sockets", "ports", "threads")


def growth(before: Footprint, after: Footprint) -> dict[str, int]:
    """Of each count, and in KiB of each role's resident memory."""
    counts = {name: getattr(after, name) - getattr(before, name) for name in COUNTS}
    return counts | {f"{role}, KiB": after.rss[role] - before.rss[role] for role in LASTING}


def _listeners() -> frozenset[int]:
    """Inodes of all TCP sockets that listen."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in (PROC / "net" / name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                found.add(int(fields[9]))
    return frozenset(found)
