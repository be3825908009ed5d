"""The settings as arguments of `elastic-daemon serve`."""

from __future__ import annotations

import argparse
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from elastic_daemon.config import Settings
from elastic_daemon.settings.resolve import flag_of, variable_of
from elastic_daemon.settings.settings_table import NO_FLAG, SettingInfo, all_settings

METAVARS = {
    "data_parallel_size": "N",
    "max_ranks": "M",
    "ranks_per_gpu": "R",
    "survive_losses": "K",
    "spare_gpus": "K",
    "watchdog_flags": "FLAGS",
    "max_body_size": "BYTES",
    "host": "HOST",
    "port": "PORT",
    "api_key": "KEY",
    "admin_key": "KEY",
    "log_level": "LEVEL",
}
"""Of those whose type does not say it."""

REPEATED = frozenset({"api_key"})
"""Given again for one more."""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """`parser` has `argument_default=SUPPRESS`: what is not given is left to environment, file and default."""
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings (default: $ELASTIC_CONFIG, or none)")
    for info in all_settings():
        if info.name not in NO_FLAG:
            parser.add_argument(flag_of(info.name), help=_help(info), **_shape(info.name))


def _help(info: SettingInfo) -> str:
    notes = [f"default: {info.default}"] if info.default not in (None, "false") else []
    if info.secret:
        notes.append(f"seen in `ps`; better: ${variable_of(info.name)}")
    text = info.help + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _shape(name: str) -> dict[str, Any]:
    """How argparse takes it. What a value may be is checked later, in one way for all sources."""
    kinds = _kinds(Settings.model_fields[name].annotation)
    if bool in kinds:
        return {"action": "store_true"}
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return {"choices": [member.value for member in kind]}
    if name in REPEATED:
        return {"action": "append", "metavar": METAVARS[name]}
    if Path in kinds:
        return {"type": Path, "metavar": "DIR" if name.endswith("_dir") else "FILE"}
    if float in kinds:
        return {"type": float, "metavar": METAVARS.get(name, "S")}
    if int in kinds:
        return {"type": int, "metavar": METAVARS.get(name, "N")}
    return {"metavar": METAVARS.get(name, "TEXT")}


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)
