"""The GPUs that the driver lists, and which of them are this daemon's to use. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NAMES = ("GPU-", "MIG-")
"""How a UUID begins."""


@dataclass(frozen=True)
class Listed:
    """One GPU. `uuid`: None where it could not be read. `slot`: its address on the PCI bus, if that is known."""

    index: int
    uuid: str | None = None
    slot: str | None = None


class Listing:
    """What `watchdog.gpu_list` says, line by line, as far as it has come."""

    def __init__(self) -> None:
        self._gpus: dict[int, Listed] = {}
        self._unread: dict[int, str] = {}
        self._count: int | None = None

    def hear(self, line: bytes) -> None:
        """Raises ValueError, KeyError, TypeError for a line that is none of its own."""
        said = json.loads(line)
        if "count" in said:
            self._count = int(said["count"])
        elif "error" in said:
            self._unread[int(said["index"])] = str(said["error"])
        else:
            index = int(said["index"])
            self._gpus[index] = Listed(index, str(said["uuid"]), said["slot"])

    @property
    def any_read(self) -> bool:
        return bool(self._gpus)

    @property
    def complete(self) -> bool:
        return self._count is not None and len(self._gpus) + len(self._unread) >= self._count

    @property
    def gpus(self) -> tuple[Listed, ...]:
        """By index, those included that could not be read."""
        return tuple(self._gpus.get(index, Listed(index)) for index in range(self._count or 0))

    @property
    def unread(self) -> dict[str, str]:
        """Index -> why it could not be read."""
        return {str(gpu.index): self._unread.get(gpu.index, "no answer") for gpu in self.gpus if gpu.uuid is None}


class AllowList:
    """Which GPUs are ours by CUDA_VISIBLE_DEVICES as it was when the daemon started: all without it.

    A GPU that is named by UUID is ours wherever it is, and no other takes its place. One that is named by index was
    found in some slot at the start: that slot is ours, with whatever GPU is in it later. Indices are the driver's (in
    the order of the PCI bus), at the start. Where no GPU could be read at an index, one that was not there at the
    start takes its place.
    """

    def __init__(self, variable: str | None) -> None:
        self._variable = variable
        self._begun = False
        self._names: list[str] = []
        self._own: set[str] = set()  # UUIDs and slots
        self._others: set[str] = set()
        self._closed: set[int] = set()  # indices that are not named, and could not be read
        self._places = 0  # for GPUs that come, each in a slot that is not known yet

    def begin(self, listed: Sequence[Listed]) -> tuple[str, ...] | None:
        """The GPUs to begin with, in the order of the variable.

        None: that is not known, since the variable names parts of GPUs, which are not listed, or nothing that makes
        sense: ranks go by the variable as it is.
        """
        self._begun = True
        chosen = self._chosen(listed)
        if self._variable is None:
            return tuple(gpu.uuid for gpu in chosen if gpu.uuid is not None)
        rest = [gpu for gpu in listed if gpu not in chosen]
        self._others = {known for gpu in rest for known in (gpu.uuid, gpu.slot) if known is not None} - self._own
        self._closed = {gpu.index for gpu in rest if gpu.uuid is None}
        self._places += sum(gpu.uuid is None for gpu in chosen)
        if "MIG-" in self._variable or not (chosen or self._names or self._places):
            return None
        return tuple(gpu.uuid for gpu in chosen if gpu.uuid is not None)

    def admits(self, gpu: Listed) -> bool:
        """Whether it is ours. A GPU that takes an open place keeps it for its slot."""
        if self._variable is None:
            return True
        if gpu.uuid is None:
            return False
        if gpu.uuid in self._own or gpu.slot in self._own or any(map(gpu.uuid.startswith, self._names)):
            return True
        is_new = gpu.slot is not None and not {gpu.uuid, gpu.slot} & self._others and gpu.index not in self._closed
        if not is_new or not self._places:
            return False
        assert gpu.slot is not None
        self._places -= 1
        self._own.add(gpu.slot)
        return True

    def admitted(self, listed: Iterable[Listed]) -> tuple[Listed, ...]:
        """Those that are ours, by index. The first list begins where the start had none."""
        by_index = sorted(listed, key=lambda gpu: gpu.index)
        if not self._begun:
            self.begin(by_index)
        return tuple(gpu for gpu in by_index if self.admits(gpu))

    def is_news(self, gpu: Listed) -> bool:
        """Whether a GPU that is not ours was not there at the start. True once for each."""
        if gpu.uuid is None or gpu.uuid in self._others:
            return False
        self._others.add(gpu.uuid)
        return True

    def _chosen(self, listed: Sequence[Listed]) -> tuple[Listed, ...]:
        """As CUDA reads the variable (CUDA C++ Programming Guide, "CUDA Environment Variables"): indices or beginnings
        of UUIDs, up to the first that makes no sense. Unlike there, a GPU that is missing hides none of the others.
        """
        if self._variable is None:
            return tuple(listed)
        by_index = {gpu.index: gpu for gpu in listed}
        chosen: list[Listed] = []
        for name in map(str.strip, self._variable.split(",")):
            if name.isdigit():
                if int(name) not in by_index:
                    self._places += 1  # fewer are there than once were
                    continue
                found = [by_index[int(name)]]
                self._own.update(known for known in (found[0].uuid, found[0].slot) if known is not None)
            elif name.startswith(NAMES):
                found = [gpu for gpu in listed if gpu.uuid is not None and gpu.uuid.startswith(name)]
                if len(found) > 1:
                    break
                self._names.append(name)
            else:
                break
            chosen += [gpu for gpu in found if gpu not in chosen]
        return tuple(chosen)
