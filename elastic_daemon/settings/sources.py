"""Where settings come from: flags over environment (`ELASTIC_*`) over one TOML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from elastic_daemon.commands.client_tls import VARIABLES as CLIENT_TLS_VARIABLES
from elastic_daemon.config import FLAG_SETTINGS, SECRETS, Settings
from elastic_daemon.errors import ConfigError
from elastic_daemon.gates.tls import TlsError
from elastic_daemon.settings.resolve import (
    ENGINE_TABLE,
    Given,
    engine_table,
    flag_of,
    from_environment,
    from_flags,
    from_toml,
    resolve,
)

CONFIG_VARIABLE = "ELASTIC_CONFIG"

OTHER_VARIABLES = frozenset(
    {
        CONFIG_VARIABLE,
        *CLIENT_TLS_VARIABLES.values(),
        "ELASTIC_NVML_SIMULATOR",
        "ELASTIC_FAULT_TRANSFER",
        "ELASTIC_FAULT_LINKS",
    }
)
"""Variables of ours that are no settings of `serve`."""


@dataclass(frozen=True)
class Loaded:
    """Settings, and where each that is no default was given. `doubts`: what an operator should know of the keys."""

    settings: Settings
    given: dict[str, Given] = field(repr=False)
    file: Path | None = None
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sources:
    """Flags as the command line had them, and the environment: what a start and each reload read anew from the file."""

    flags: Mapping[str, Any] = field(repr=False)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    @property
    def file(self) -> Path | None:
        name = self.flags.get("config") or self.environ.get(CONFIG_VARIABLE)
        return Path(name) if name else None

    def load(self) -> Loaded:
        """Raises ConfigError: its message names the flag, the variable, or the file with the line."""
        known = Settings.model_fields.keys() - {ENGINE_TABLE}
        flags = {name: value for name, value in self.flags.items() if name != "config"}
        layers = [from_flags(flags, known), from_environment(self.environ, known, OTHER_VARIABLES)]
        if self.file is not None:
            layers.append(from_toml(self._read(self.file), str(self.file), known))
        given = resolve(layers)
        values: dict[str, Any] = {name: it.value for name, it in given.items() if name in known}
        if table := engine_table(given):
            values[ENGINE_TABLE] = table
        doubts = [f"{given[name].label}: others on this machine can read it in `ps`" for name in flags.keys() & SECRETS]
        for file in filter(None, (self.file if given.keys() & SECRETS else None, *_read_keys(values, given))):
            if remedy := _remedy(file):
                doubts.append(f"{file}: others on this machine can read the keys in it: {remedy}")
        settings = _validated(values, given)
        try:
            if settings.tls is not None:
                settings.tls.check()
        except TlsError as error:
            raise ConfigError(f"{given[error.setting].label}: {error.detail}") from error
        return Loaded(settings, given, self.file, tuple(sorted(doubts)))

    def _read(self, path: Path) -> str:
        named = "--config" if self.flags.get("config") else CONFIG_VARIABLE
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror} ({named} names it)") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not UTF-8: {error}") from error


def _remedy(file: Path) -> str | None:
    """What to do where others can read a file with keys.

    One that belongs to another user, to root say, is read through its group: whoever set that up chose who is in it.
    """
    found = file.stat()
    if found.st_uid == os.geteuid():
        return "chmod 600" if found.st_mode & 0o044 else None
    return "chmod 640, with a group that the daemon is in" if found.st_mode & 0o004 else None


def _read_keys(values: dict[str, Any], given: dict[str, Given]) -> list[Path]:
    """Put the keys of key files among `values`. Returns these files. Raises ConfigError."""
    files = []
    for setting in ("api_key", "admin_key"):
        if (named := given.get(f"{setting}_file")) is None:
            continue
        files.append(path := Path(str(named.value)))
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{named.label}: {path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            ) from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{named.label}: {path} has no key in it")
        if setting == "admin_key" and (len(keys) > 1 or setting in values):
            raise ConfigError(f"{named.label}: there is one admin key, given once")
        before = values.get(setting, ())
        before = [key for key in before.split(",") if key] if isinstance(before, str) else before
        values[setting] = (*before, *keys) if setting == "api_key" else keys[0]
        if setting not in given or setting == "admin_key":
            given[setting] = Given(None, str(path), str(path))
    return files


def _validated(values: dict[str, Any], given: Mapping[str, Given]) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        label = given[name].label if name in given else flag_of(name)
        reason = first["msg"].removeprefix("Value error, ")
        if name in SECRETS or name in FLAG_SETTINGS:
            raise ConfigError(f"{label}: {reason}") from None  # the cause shows the value
        raise ConfigError(f"{label}: {reason} (got {first['input']!r})") from error


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from given flags (only those that were set), environment and file. Raises ConfigError."""
    return Sources(flags).load().settings
