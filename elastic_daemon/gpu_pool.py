"""Which GPUs may be used, and which rank is on which. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from elastic_daemon.protocol import GpuSeen

NOT_THERE = "the driver does not list it"


@dataclass(frozen=True)
class _Gpu:
    """`fit_since`: without anything against it, None: not now. `barred`: by us, until an operator releases it."""

    fit_since: float | None
    reason: str = ""
    barred: str | None = None


class GpuPool:
    """Empty when GPUs are not known: then every rank may start, and is on none that has a name."""

    def __init__(self, uuids: Iterable[str], ranks_per_gpu: int, probation_s: float) -> None:
        """`uuids`: in the order of ranks; those of a start are used at once, later ones after `probation_s`."""
        self._homes = tuple(uuids)
        self._gpus = dict.fromkeys(self._homes, _Gpu(float("-inf")))
        self._ranks_per_gpu = ranks_per_gpu
        self._probation_s = probation_s
        self._rank_on: dict[int, str] = {}

    def try_out(self, probation_s: float) -> None:
        """From now on a GPU must be healthy this long before it is used."""
        self._probation_s = probation_s

    @property
    def is_known(self) -> bool:
        return bool(self._gpus)

    def of(self, rank: int) -> str | None:
        return self._rank_on.get(rank)

    def see(self, gpus: Iterable[GpuSeen], now: float) -> None:
        """What the watchdog knows: all GPUs there are."""
        seen = {gpu.uuid: gpu for gpu in gpus}
        if not self.is_known:
            return  # nothing says which of them ranks were put on
        for uuid in self._gpus.keys() - seen.keys():
            self._condemn(uuid, NOT_THERE)
        for uuid, gpu in seen.items():
            known = self._gpus.get(uuid, _Gpu(None))
            if not gpu.fit:
                self._gpus[uuid] = replace(known, fit_since=None, reason=gpu.reason)
            elif known.fit_since is None:
                self._gpus[uuid] = replace(known, fit_since=now, reason="")

    def condemn(self, uuid: str, reason: str) -> None:
        """A verdict takes it out of service, until the watchdog finds it fit."""
        if uuid in self._gpus:
            self._condemn(uuid, reason)

    def bar(self, uuid: str, reason: str) -> None:
        """Ranks keep failing on it: not to be used until `release`."""
        self._gpus[uuid] = replace(self._gpus[uuid], barred=reason)

    def is_barred(self, rank: int) -> bool:
        """Whether the GPU of a rank is barred."""
        gpu = self._gpus.get(self._rank_on.get(rank, ""))
        return gpu is not None and gpu.barred is not None

    def release(self, uuid: str) -> bool:
        """Whether it was barred."""
        gpu = self._gpus.get(uuid)
        if gpu is None or gpu.barred is None:
            return False
        self._gpus[uuid] = replace(gpu, barred=None)
        return True

    def assign(self, rank: int, now: float) -> str | None:
        """Put a rank on the GPU it had, else on its home, else on any that can be used; None: there is none."""
        if uuid := self._choose(rank, now):
            self._rank_on[rank] = uuid
        return uuid

    def forget(self, rank: int) -> None:
        """The rank has left for good: its GPU is free."""
        self._rank_on.pop(rank, None)

    def room_for(self, ranks: Collection[int]) -> int:
        """How many of these ranks could be placed, now or once a probation is over."""
        used = Counter(uuid for rank, uuid in self._rank_on.items() if rank not in ranks)
        healthy = [uuid for uuid, gpu in self._gpus.items() if gpu.fit_since is not None and not gpu.barred]
        return min(len(ranks), sum(max(0, self._ranks_per_gpu - used[uuid]) for uuid in healthy))

    def is_usable(self, uuid: str, now: float) -> bool:
        gpu = self._gpus.get(uuid)
        if gpu is None or gpu.barred is not None or gpu.fit_since is None:
            return False
        return now >= gpu.fit_since + self._probation_s

    def trouble(self, uuid: str) -> str:
        """What is wrong with a GPU; empty when nothing is."""
        gpu = self._gpus.get(uuid, _Gpu(None, NOT_THERE))
        return gpu.barred or ("" if gpu.fit_since is not None else gpu.reason)

    @property
    def troubles(self) -> tuple[str, ...]:
        """What keeps GPUs from being used."""
        return tuple(f"{uuid}: {why}" for uuid in self._gpus if (why := self.trouble(uuid)))

    def next_usable(self, now: float) -> float | None:
        """When the next probation is over."""
        ends = (gpu.fit_since + self._probation_s for gpu in self._gpus.values() if gpu.fit_since is not None)
        return min((end for end in ends if end > now), default=None)

    def _choose(self, rank: int, now: float) -> str | None:
        home = rank // self._ranks_per_gpu
        first = [self._rank_on.get(rank), self._homes[home] if home < len(self._homes) else None]
        used = Counter(uuid for other, uuid in self._rank_on.items() if other != rank)
        for uuid in dict.fromkeys([*first, *self._gpus]):
            if uuid is not None and self.is_usable(uuid, now) and used[uuid] < self._ranks_per_gpu:
                return uuid
        return None

    def _condemn(self, uuid: str, reason: str) -> None:
        self._gpus[uuid] = replace(self._gpus[uuid], fit_since=None, reason=reason)
