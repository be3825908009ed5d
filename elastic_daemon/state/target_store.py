"""The number of ranks that an operator has asked for, over restarts of the daemon."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_daemon.config import Settings
from elastic_daemon.state.state_file import load, store

FILE_NAME = "target.json"


@dataclass(frozen=True)
class StartTarget:
    """How many ranks to start with; `event` and `fields` say why where an operator's order plays a part in it."""

    target: int
    event: str | None
    fields: Mapping[str, Any]


def load_target(settings: Settings) -> int | None:
    """What was stored last. None: nothing, or nothing readable, or `--reset-target` has just discarded it."""
    path = target_path(settings)
    if settings.reset_target:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return load(path, "target", _parse)


def store_target(settings: Settings, target: int) -> None:
    """On disk when this returns. Raises OSError."""
    store(target_path(settings), target=target)


def target_path(settings: Settings) -> Path:
    return settings.effective_state_dir / FILE_NAME


def start_target(settings: Settings, stored: int | None, min_ranks: int, max_ranks: int) -> StartTarget:
    """A stored target beats `--data-parallel-size`, unless it cannot be served any more."""
    asked = settings.data_parallel_size
    if stored is None:
        return StartTarget(asked, "target_reset" if settings.reset_target else None, {"target": asked})
    fields = {"stored": stored, "data_parallel_size": asked}
    if not min_ranks <= stored <= max_ranks:
        reason = f"it is not within {min_ranks} and {max_ranks}"
        return StartTarget(asked, "target_ignored", {"target": asked, **fields, "reason": reason})
    return StartTarget(stored, "target_restored", {"target": stored, **fields})


def _parse(body: Mapping[str, Any]) -> int:
    target = body["target"]
    if type(target) is not int or target < 1:
        raise ValueError(f"target {target!r} is no number of ranks")
    return target
