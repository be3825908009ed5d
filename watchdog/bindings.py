"""Which rank runs on which GPU, as the daemon says it (`GET /watchdog/bindings`).

    {"instance": "c0ffee", "epoch": 7, "min_ranks": 2,
     "ranks": [{"rank": 0, "incarnation": 12, "gpu": "GPU-…", "pids": [123], "heartbeat": "/run/…/rank-12.page"}],
     "released": {"GPU-…": 1790000000.0}}

`gpu` and `heartbeat` may be null. `instance`: any text that is another one in each life of the daemon, which is then
told again what it cannot know. `min_ranks`: fewest ranks that can serve (the breaker's floor). `released`: when an
operator last released a GPU from quarantine, wall-clock seconds. These three are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watchdog.errors import DaemonError


@dataclass(frozen=True)
class Binding:
    rank: int
    incarnation: int
    gpu: str | None = None
    pids: tuple[int, ...] = ()
    heartbeat: Path | None = None


@dataclass(frozen=True)
class Bindings:
    epoch: int = 0
    ranks: tuple[Binding, ...] = ()
    min_ranks: int | None = None
    released: Mapping[str, float] = field(default_factory=dict)
    instance: str | None = None

    @property
    def shared(self) -> bool:
        """Whether two ranks are on one GPU."""
        gpus = [binding.gpu for binding in self.ranks if binding.gpu is not None]
        return len(set(gpus)) < len(gpus)

    def on_gpu(self, gpu: str) -> tuple[Binding, ...]:
        return tuple(binding for binding in self.ranks if binding.gpu == gpu)


def parse_bindings(body: Any) -> Bindings:
    """Raises DaemonError when it is not as described above."""
    try:
        ranks = tuple(
            Binding(
                int(one["rank"]),
                int(one["incarnation"]),
                one.get("gpu"),
                tuple(int(pid) for pid in one.get("pids") or ()),
                Path(one["heartbeat"]) if one.get("heartbeat") else None,
            )
            for one in body["ranks"]
        )
        least = body.get("min_ranks")
        released = {str(gpu): float(time) for gpu, time in (body.get("released") or {}).items()}
        return Bindings(
            int(body["epoch"]), ranks, None if least is None else int(least), released, body.get("instance")
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DaemonError(f"the daemon's bindings cannot be read: {type(error).__name__}: {error}") from error
