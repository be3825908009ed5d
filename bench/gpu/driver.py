"""What the driver says of GPUs, their memory and the processes on them. Everything is empty where there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from bench.footprint import Footprint

MIB = 1 << 20
ANSWER_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Gpu:
    """Memory in MiB; `processes`: pid -> memory in MiB, None where the driver does not tell."""

    index: int
    uuid: str
    name: str
    used: float
    processes: dict[int, float | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Driver:
    version: str
    gpus: tuple[Gpu, ...]

    @property
    def name(self) -> str:
        names = sorted({gpu.name for gpu in self.gpus})
        return f"{len(self.gpus)} x {', '.join(names)}" if names else ""


def ask() -> Driver | None:
    """Of the real driver; None without one, or where it does not answer in time: a call to it might never return."""
    answer: list[Driver | None] = []
    thread = threading.Thread(target=lambda: answer.append(_ask()), daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_S)
    return answer[0] if answer else None


def _ask() -> Driver | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        count = pynvml.nvmlDeviceGetCount()
        return Driver(_text(pynvml.nvmlSystemGetDriverVersion()), tuple(_gpu(pynvml, index) for index in range(count)))
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    processes: dict[int, float | None] = {}
    with contextlib.suppress(nvml.NVMLError):
        for one in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            processes[one.pid] = None if one.usedGpuMemory is None else one.usedGpuMemory / MIB
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        used=nvml.nvmlDeviceGetMemoryInfo(handle).used / MIB,
        processes=processes,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def memory_mib(gpus: Collection[str], pid: int) -> float:
    """In use on the GPUs with these UUIDs, whoever uses it; without a driver, what the daemon with this pid and all
    below it hold of the host's."""
    if (driver := ask()) is not None:
        return sum(gpu.used for gpu in driver.gpus if gpu.uuid in gpus)
    return sum(Footprint.of(pid, "").pss.values()) / 1024


@dataclass(frozen=True)
class Mapping:
    """Whether the processes that the driver sees are our ranks. `pids`: rank -> pid, as the daemon says."""

    pids: dict[int, int]
    seen: dict[int, float | None]

    @property
    def verdict(self) -> str:
        ours, theirs = set(self.pids.values()), set(self.seen)
        if not theirs:
            return "the driver lists no processes"
        if ours <= theirs:
            others = len(theirs - ours)
            return "agrees" + (f"; {others} processes of others" if others else "")
        if not ours & theirs and len(ours) == len(theirs):
            return "as many processes as ranks, with pids of another namespace"
        return f"DISAGREES: ranks {sorted(ours)}, the driver sees {sorted(theirs)}"

    @property
    def agrees(self) -> bool:
        return not self.verdict.startswith("DISAGREES")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def nccl_versions() -> dict[str, str]:
    """Packages that bring NCCL, each as it is imported: the first of its name on the path."""
    names = {package.metadata["Name"] or "" for package in metadata.distributions()}
    return {name: metadata.version(name) for name in sorted(names) if name.startswith("nvidia-nccl")}
