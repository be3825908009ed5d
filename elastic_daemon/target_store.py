"""The number of ranks that an operator has asked for, over restarts of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from elastic_daemon.config import Settings
from watchdog.state import write_atomically

log = structlog.get_logger(__name__)

VERSION = 1
FILE_NAME = "target.json"


@dataclass(frozen=True)
class StartTarget:
    """How many ranks to start with; `event` and `fields` say why where an operator's order plays a part in it."""

    target: int
    event: str | None
    fields: Mapping[str, Any]


def load_target(settings: Settings) -> int | None:
    """What was stored last. None: nothing, or nothing readable, or `--reset-target` has just discarded it."""
    path = _path(settings)
    if settings.reset_target:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("target_unreadable", file=str(path), error=error.strerror)
        return None
    except (ValueError, KeyError, TypeError) as error:
        aside = path.with_name(f"{FILE_NAME}.corrupt-{int(time.time())}")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        log.warning("target_corrupt", file=str(path), moved_to=str(aside), error=f"{type(error).__name__}: {error}")
        return None


def store_target(settings: Settings, target: int) -> None:
    """On disk when this returns. Raises OSError."""
    path = _path(settings)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"version": VERSION, "target": target, "at": time.time()}).encode())


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


class TargetWriter:
    """Stores targets one after the other, off the event loop: a disk can be slow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = asyncio.Lock()

    async def store(self, target: int) -> None:
        """A disk that fails costs no more than the memory of it: the order itself stands."""
        async with self._turn:
            try:
                await asyncio.to_thread(store_target, self._settings, target)
            except OSError as error:
                log.error("target_not_stored", target=target, file=str(_path(self._settings)), error=error.strerror)


def _path(settings: Settings) -> Path:
    return settings.effective_state_dir / FILE_NAME


def _parse(text: bytes) -> int:
    body = json.loads(text)
    if body["version"] != VERSION:
        raise ValueError(f"version {body['version']!r} instead of {VERSION}")
    target = body["target"]
    if type(target) is not int or target < 1:
        raise ValueError(f"target {target!r} is no number of ranks")
    return target
