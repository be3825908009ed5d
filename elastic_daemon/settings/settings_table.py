"""What settings there are, and what they are at present, for documents and for `elastic-daemon config`. Pure."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from elastic_daemon.config import SECRETS, Settings
from elastic_daemon.settings.resolve import ENGINE_TABLE, flag_of, variable_of
from elastic_daemon.settings.sources import Loaded

MASK = "********"

SECRET_ENGINE_FLAGS = frozenset({"hf_token", "api_key"})
"""Flags of vLLM whose values are not shown."""

NO_FLAG = frozenset({"model", "engine_flags", ENGINE_TABLE})
"""MODEL has a place of its own on the command line, and vLLM's flags stand there by themselves."""


@dataclass(frozen=True)
class SettingInfo:
    """`flag` and `variable` are None where there is none. `default`: as text, None where there is no value."""

    name: str
    flag: str | None
    variable: str | None
    type: str
    default: str | None
    reloadable: bool
    secret: bool
    help: str


def all_settings() -> tuple[SettingInfo, ...]:
    """In the order of the command line's help."""
    return tuple(_info(name, field) for name, field in Settings.model_fields.items())


def reloadable() -> frozenset[str]:
    """Names of the settings that a reload applies."""
    return frozenset(info.name for info in all_settings() if info.reloadable)


def _info(name: str, field: FieldInfo) -> SettingInfo:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = field.default
    if name == "runtime_dir":
        shown: str | None = "$RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/elastic-daemon, else one under the temporary one"
    else:
        shown = None if default is None or default is PydanticUndefined or default == () else _plain(default)
    return SettingInfo(
        name=name,
        flag=None if name in NO_FLAG else flag_of(name),
        variable=None if name == ENGINE_TABLE else variable_of(name),
        type=_type(field),
        default=shown,
        reloadable=bool(extra.get("reloadable")),
        secret=name in SECRETS,
        help=field.description or "",
    )


def _type(field: FieldInfo) -> str:
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not types.NoneType]
    return " or ".join(map(_type_name, kinds)) + _bounds(field)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(str(member.value) for member in kind)
    if get_origin(kind) is tuple:
        return "list of texts"
    if get_origin(kind) is dict:
        return "table"
    names = {int: "whole number", float: "number", bool: "true | false", str: "text", Path: "path", SecretStr: "text"}
    return names[kind]


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {bound:g}" for rule in field.metadata for name, sign in signs.items()
             if (bound := getattr(rule, name, None)) is not None]  # fmt: skip
    return f" ({', '.join(found)})" if found else ""


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value.value if isinstance(value, Enum) else value)


@dataclass(frozen=True)
class Shown:
    """A value as it may be shown, and where it was given."""

    name: str
    value: Any
    origin: str


def shown(loaded: Loaded) -> tuple[Shown, ...]:
    """All settings in their order, with vLLM's of the file as `vllm.NAME`. Secrets are masked."""
    rows = []
    for name in Settings.model_fields:
        value = getattr(loaded.settings, name)
        if name == ENGINE_TABLE:
            rows += [_engine_row(loaded, key, value[key]) for key in value]
        else:
            origin = loaded.given[name].origin if name in loaded.given else "default"
            rows.append(Shown(name, _visible(name, value), origin))
    return tuple(rows)


def _engine_row(loaded: Loaded, key: str, value: Any) -> Shown:
    name = f"{ENGINE_TABLE}.{key}"
    return Shown(name, MASK if _is_secret(key) else value, loaded.given[name].origin)


def _visible(name: str, value: Any) -> Any:
    if name in SECRETS:
        return ([MASK] * len(value) if isinstance(value, tuple) else MASK) if value else None
    if isinstance(value, tuple):
        return mask_flags(value)
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def _is_secret(flag: str) -> bool:
    """Whether vLLM may take it for a secret flag: its parser takes abbreviations.

    Ambiguous ones count too: the parser refuses them, so that nothing is lost by masking what they were given.
    """
    name = flag.replace("-", "_")
    return bool(name) and any(secret.startswith(name) for secret in SECRET_ENGINE_FLAGS)


def mask_flags(flags: Sequence[str]) -> list[str]:
    """A command line without the values of secret flags."""
    masked, hide = [], False
    for flag in flags:
        name, equals, _ = flag.partition("=")
        secret = name.startswith("--") and _is_secret(name.removeprefix("--"))
        masked.append(MASK if hide else name + equals + MASK if secret and equals else flag)
        hide = secret and not equals
    return masked


def to_toml(rows: Sequence[Shown]) -> str:
    """A file that says the same, but for what is masked; each line says where its value was given."""
    plain = [row for row in rows if not row.name.startswith(ENGINE_TABLE + ".")]
    engine = [Shown(row.name.partition(".")[2], row.value, row.origin) for row in rows if row not in plain]
    lines = list(_lines(plain))
    if engine:
        lines += ["", f"[{ENGINE_TABLE}]", *_lines(engine)]
    return "\n".join(lines) + "\n"


def _lines(rows: Sequence[Shown]) -> Iterator[str]:
    for row in rows:
        text = f"# {row.name} =" if row.value is None else f"{row.name} = {toml_value(row.value)}"
        yield f"{text:<40}  # {row.origin}".replace("\n", " ")


def toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(it)}" for key, it in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return str(value)


def to_json(rows: Sequence[Shown]) -> str:
    return json.dumps({row.name: {"value": row.value, "from": row.origin} for row in rows}, indent=2, default=str)
