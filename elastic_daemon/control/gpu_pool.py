"""Which GPUs may be used, and which rank is on which. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from elastic_daemon.protocol import GpuSeen

NOT_THERE = "the driver does not list it"


@dataclass(frozen=True)
class _Gpu:
    """`fit_since`: without anything against it, None: not now."""

    fit_since: float | None
    reason: str = ""


class GpuPool:
    """Where GPUs are not known every rank may start, and is on none that has a name, until it says which."""

    def __init__(
        self,
        uuids: Iterable[str] | None,
        ranks_per_gpu: int,
        probation_s: float,
        barred: Mapping[str, str] | None = None,
    ) -> None:
        """`uuids`: in the order of ranks, None: not known; those of a start are used at once, later ones after
        `probation_s`. `barred`: in an earlier life, and why."""
        self._homes = tuple(uuids or ())
        self._gpus = dict.fromkeys(self._homes, _Gpu(float("-inf")))
        self._known = uuids is not None
        self._ranks_per_gpu = ranks_per_gpu
        self._probation_s = probation_s
        self._barred = dict(barred or {})
        self._rank_on: dict[int, str] = {}
        self._blind: set[int] = set()  # started while nothing was known, and nobody has said where they are
        self._heard: tuple[tuple[GpuSeen, ...], float] | None = None  # while nothing is known: the latest list, when

    def try_out(self, probation_s: float) -> None:
        """From now on a GPU must be healthy this long before it is used."""
        self._probation_s = probation_s

    @property
    def is_known(self) -> bool:
        return self._known

    def of(self, rank: int) -> str | None:
        return self._rank_on.get(rank) if self._known else None

    def see(self, gpus: Iterable[GpuSeen], now: float) -> None:
        """What the watchdog knows: all GPUs there are."""
        if not self._known:
            self._heard = tuple(gpus), now
            return self._learn()
        seen = {gpu.uuid: gpu for gpu in gpus}
        for uuid in self._gpus.keys() - seen.keys():
            self._condemn(uuid, NOT_THERE)
        for uuid, gpu in seen.items():
            known = self._gpus.get(uuid, _Gpu(None))
            if not gpu.fit:
                self._gpus[uuid] = replace(known, fit_since=None, reason=gpu.reason)
            elif known.fit_since is None:
                self._gpus[uuid] = replace(known, fit_since=now, reason="")

    def locate(self, rank: int, uuid: str) -> None:
        """Where a rank is that was started while GPUs were not known, as it says itself."""
        if not self._known:
            self._blind.discard(rank)
            self._rank_on[rank] = uuid
            self._learn()

    def condemn(self, uuid: str, reason: str) -> None:
        """A verdict takes it out of service, until the watchdog finds it fit."""
        if uuid in self._gpus:
            self._condemn(uuid, reason)

    def bar(self, uuid: str, reason: str) -> None:
        """Ranks keep failing on it: not to be used until `release`, whether it is there or not."""
        self._barred[uuid] = reason

    @property
    def barred(self) -> Mapping[str, str]:
        """Those that are barred, whether they are there or not, and why."""
        return self._barred

    @property
    def bars(self) -> tuple[str, ...]:
        """For people: why GPUs of this host are barred."""
        return tuple(f"{uuid}: {self._barred[uuid]}" for uuid in self._gpus if uuid in self._barred)

    def is_barred(self, rank: int) -> bool:
        """Whether the GPU of a rank is barred."""
        return self._rank_on.get(rank) in self._barred

    def release(self, uuid: str) -> bool:
        """Whether it was barred."""
        return self._barred.pop(uuid, None) is not None

    def assign(self, rank: int, now: float) -> str | None:
        """Put a rank on the GPU it had, else on its home, else on any that can be used; None: there is none."""
        if not self._known:
            self._blind.discard(rank)  # the process that it had is gone
            self._learn()
        if not self._known:
            self._blind.add(rank)
            return None
        if uuid := self._choose(rank, now):
            self._rank_on[rank] = uuid
        return uuid

    def forget(self, rank: int) -> None:
        """The rank has left for good: its GPU is free."""
        self._rank_on.pop(rank, None)
        self._blind.discard(rank)

    def room_for(self, ranks: Collection[int]) -> int:
        """How many of these ranks could be placed, now or once a probation is over."""
        used = Counter(uuid for rank, uuid in self._rank_on.items() if rank not in ranks)
        healthy = [uuid for uuid, gpu in self._gpus.items() if gpu.fit_since is not None and uuid not in self._barred]
        return min(len(ranks), sum(max(0, self._ranks_per_gpu - used[uuid]) for uuid in healthy))

    def is_usable(self, uuid: str, now: float) -> bool:
        gpu = self._gpus.get(uuid)
        if gpu is None or uuid in self._barred or gpu.fit_since is None:
            return False
        return now >= gpu.fit_since + self._probation_s

    def trouble(self, uuid: str) -> str:
        """What is wrong with a GPU; empty when nothing is."""
        gpu = self._gpus.get(uuid, _Gpu(None, NOT_THERE))
        return self._barred.get(uuid) or ("" if gpu.fit_since is not None else gpu.reason)

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

    def _learn(self) -> None:
        """From the first list on which every rank finds its GPU, nothing that is in use can be taken for a spare one.

        A rank that has died and is not started again keeps it from being learned; so does a part of a GPU.
        """
        if self._heard is None or self._blind:
            return
        gpus, at = self._heard
        in_use = set(self._rank_on.values())
        if not in_use or not in_use <= {gpu.uuid for gpu in gpus}:
            return
        self._known, self._heard = True, None
        self._homes = tuple(gpu.uuid for gpu in gpus)
        fit = {gpu.uuid: float("-inf") if gpu.uuid in in_use else at for gpu in gpus if gpu.fit}
        self._gpus = {gpu.uuid: _Gpu(fit.get(gpu.uuid), "" if gpu.fit else gpu.reason) for gpu in gpus}
