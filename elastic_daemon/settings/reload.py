"""What a reload of the configuration changes: what can change while the daemon serves, and what has to wait."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from elastic_daemon.config import SECRETS, Settings
from elastic_daemon.errors import ConfigError
from elastic_daemon.settings.resolve import ENGINE_TABLE
from elastic_daemon.settings.settings_table import reloadable
from elastic_daemon.settings.sources import Loaded, Sources
from elastic_daemon.telemetry.events import EventLog


@dataclass(frozen=True)
class Change:
    """`settings`: to go on with. `applied`: names of what is new in them. `waiting`: what takes a restart."""

    settings: Settings
    applied: tuple[str, ...]
    waiting: tuple[str, ...]


def compare(running: Settings, read: Settings) -> Change:
    """Pure. Secrets are compared like everything else and never shown."""
    live = reloadable()
    differing = [name for name in Settings.model_fields if getattr(running, name) != getattr(read, name)]
    applied = [name for name in differing if name in live]
    waiting = [name for name in differing if name not in live and name != ENGINE_TABLE]
    tables = (running.vllm, read.vllm)
    for key in sorted(tables[0].keys() | tables[1].keys()):
        if tables[0].get(key) != tables[1].get(key):
            waiting.append(f"{ENGINE_TABLE}.{key}")
    settings = running.model_copy(update={name: getattr(read, name) for name in applied})
    return Change(settings, tuple(applied), tuple(waiting))


def plain(settings: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """Values for an event, without secrets."""
    return {name: str(getattr(settings, name)) for name in names if name not in SECRETS}


def has_terminal() -> bool:
    """Whether this process belongs to a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Reloader:
    """Reads the sources anew on request. `apply` gets the new settings, and the names of what has changed in them.

    `around()` is entered before the file is read and left when `apply` has returned, however that goes: whoever tells a
    service manager of reloads sets it.
    """

    def __init__(
        self,
        sources: Sources | None,
        running: Settings,
        apply: Callable[[Settings, tuple[str, ...]], None],
        events: EventLog,
    ) -> None:
        """`sources`: None where settings did not come from any, in tests."""
        self._sources = sources
        self._running = running
        self._apply = apply
        self._events = events
        self.around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def reload(self) -> None:
        """A bad file changes nothing: event `reload_failed` says why. Else `reloaded` says what has changed."""
        with self.around():
            try:
                if self._sources is None:
                    raise ConfigError("this daemon has no configuration to read anew")
                loaded: Loaded = self._sources.load()
                change = compare(self._running, loaded.settings)
                self._apply(change.settings, change.applied)
            except (ConfigError, OSError) as error:
                self._events.record("reload_failed", {"reason": str(error)})
                return
            self._running = change.settings
            self._events.record(
                "reloaded",
                {
                    "file": str(loaded.file) if loaded.file is not None else None,
                    "applied": list(change.applied),
                    "values": plain(change.settings, change.applied),
                    "needs_restart": list(change.waiting),
                },
            )
