"""What the processes of a daemon hold: whether changes of the group leave anything behind."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
LISTENING = "0A"

RANKS = "ranks"
LASTING = ("supervisor", "front end", "zygote", "watchdog")
"""Processes that live as long as the daemon. Ranks come and go."""

COUNTS = ("processes", "descriptors", "sockets", "ports", "threads")

ABANDONED = {"descriptors": 16, "sockets": 16, "ports": 1, "threads": 4}
"""What a group of ranks that gloo never lets go of may hold in a rank, until gloo's own timeout. As in
tests/chaos/test_leaks.py."""

ABANDONED_BY_SUPERVISOR = {"descriptors": 1, "sockets": 1}
"""Such a group's connection to the rendezvous store."""

ABANDONED_LINE = re.compile(r'"pid": (\d+), "position": \d+, "abandoned": (\d+), "event": "group_abandoned"')


@dataclass(frozen=True)
class Process:
    """Sizes in KiB: `rss` is resident, `pss` the proportional share of it. `sockets` holds inodes."""

    pid: int
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
        targets = list(_link_targets(home / "fd"))
        sockets = {int(found[1]) for target in targets if (found := re.fullmatch(r"socket:\[(\d+)\]", target))}
        title = (home / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return cls(
            pid=pid,
            role=role_of(title),
            rss=int(sizes.get("Rss", 0)),
            pss=int(sizes.get("Pss", 0)),
            descriptors=len(targets),
            threads=len(os.listdir(home / "task")),
            sockets=frozenset(sockets),
        )


def role_of(title: str) -> str:
    """What a process of the daemon is, from its command line. Empty for none of those that are known."""
    if found := re.match(r"elastic-daemon: (front end|zygote)\b", title):
        return found[1]
    if title.startswith("elastic-daemon: rank "):
        return RANKS
    if "elastic_daemon.cli serve" in title or "elastic-daemon serve" in title:
        return "supervisor"
    return "watchdog" if "watchdog" in title else ""


def _link_targets(folder: Path) -> Iterator[str]:
    """Of the links in it, such as /proc/PID/fd."""
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            yield os.readlink(folder / name)


def children(pid: int) -> list[int]:
    """Zombies too. None of a process that has ended."""
    found: list[int] = []
    tasks: list[str] = []
    with contextlib.suppress(OSError):
        tasks = os.listdir(PROC / str(pid) / "task")
    for task in tasks:
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found += [int(child) for child in (PROC / str(pid) / "task" / task / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    return [pid, *(one for child in children(pid) for one in descendants(child))]


@dataclass(frozen=True)
class Footprint:
    """Of a daemon at rest. `counts`: by role, then by what is counted; `rss` and `pss`: by role, in KiB.

    `abandoned`: groups that its living ranks could not let go of.
    """

    counts: Mapping[str, Mapping[str, int]]
    rss: Mapping[str, int]
    pss: Mapping[str, int]
    abandoned: int = 0

    @classmethod
    def of(cls, pid: int, log: str) -> Footprint:
        """`pid`: of the supervisor; `log`: all that the daemon has logged."""
        processes = []
        for one in descendants(pid):
            with contextlib.suppress(OSError):
                processes.append(Process.of(one))
        return cls.of_processes(processes, _listeners(), log)

    @classmethod
    def of_processes(cls, processes: Iterable[Process], listeners: frozenset[int], log: str = "") -> Footprint:
        processes = list(processes)
        roles = {role: [one for one in processes if one.role == role] for role in (*LASTING, RANKS, "")}
        abandoned = {int(pid): int(count) for pid, count in ABANDONED_LINE.findall(log)}
        return cls(
            counts={role: _counts(some, listeners) for role, some in roles.items()},
            rss={role: sum(one.rss for one in some) for role, some in roles.items()},
            pss={role: sum(one.pss for one in some) for role, some in roles.items()},
            abandoned=sum(abandoned.get(one.pid, 0) for one in processes),
        )

    def total(self, name: str) -> int:
        return sum(counts[name] for counts in self.counts.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _counts(processes: Iterable[Process], listeners: frozenset[int]) -> dict[str, int]:
    """A socket that several of them hold counts once."""
    processes = list(processes)
    sockets = frozenset[int]().union(*(one.sockets for one in processes))
    return {
        "processes": len(processes),
        "descriptors": sum(one.descriptors for one in processes),
        "sockets": len(sockets),
        "ports": len(sockets & listeners),
        "threads": sum(one.threads for one in processes),
    }


def lasting_growth(before: Footprint, after: Footprint) -> dict[str, int]:
    """Of each count, in processes that live as long as the daemon, less what abandoned groups explain."""
    return _growth(before, after, LASTING, ABANDONED_BY_SUPERVISOR)


def rank_growth(before: Footprint, after: Footprint) -> dict[str, int]:
    """The same in ranks and whatever else there is; may be below 0."""
    return _growth(before, after, (RANKS, ""), ABANDONED)


def _growth(
    before: Footprint, after: Footprint, roles: Collection[str], each_abandoned: Mapping[str, int]
) -> dict[str, int]:
    abandoned = max(0, after.abandoned - before.abandoned)
    return {
        name: sum(after.counts[role][name] - before.counts[role][name] for role in roles)
        - abandoned * each_abandoned.get(name, 0)
        for name in COUNTS
    }


def memory_growth(before: Footprint, after: Footprint) -> dict[str, int]:
    """Of the resident memory of each process that lives as long as the daemon, in KiB."""
    return {role: after.rss[role] - before.rss[role] for role in LASTING}


def _listeners() -> frozenset[int]:
    """Inodes of all TCP sockets that listen."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in (PROC / "net" / name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                found.add(int(fields[9]))
    return frozenset(found)
