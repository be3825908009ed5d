"""Which value of a setting counts, and where it was given: flags over environment over one TOML file. Pure."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from elastic_daemon.errors import ConfigError

ENGINE_TABLE = "vllm"
"""The table of the file whose entries are flags of vLLM."""

PREFIX = "ELASTIC_"

TYPO_LIKENESS = 0.75
"""Variables of others begin with `ELASTIC_` too: only what looks like a setting of ours counts as a slip."""


@dataclass(frozen=True)
class Given:
    """A value as the operator gave it. `origin` is where; `label` begins a message about it."""

    value: Any
    origin: str
    label: str


Layer = Mapping[str, Given]


def resolve(layers: Sequence[Layer]) -> dict[str, Given]:
    """The value that counts for each name. Earlier layers win."""
    return {name: given for layer in reversed(layers) for name, given in layer.items()}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def from_flags(flags: Mapping[str, Any], known: Collection[str]) -> dict[str, Given]:
    """Raises ConfigError for a name that is not `known`."""
    for name in flags:
        if name not in known:
            raise ConfigError(f"{flag_of(name)}: no such setting{_nearest(name, known, flag_of)}")
    return {name: Given(value, place, place) for name, value in flags.items() for place in (_place(name),)}


def _place(name: str) -> str:
    return {"model": "MODEL", "engine_flags": "flags of vLLM"}.get(name, flag_of(name))


def from_environment(environ: Mapping[str, str], known: Collection[str], others: Collection[str]) -> dict[str, Given]:
    """`others`: variables of ours that are no settings. Raises ConfigError for what looks like a mistyped setting."""
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in others:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in known and variable == variable_of(name):
            found[name] = Given(value, variable, variable)
        elif close := _nearest(name, known, variable_of):
            raise ConfigError(f"{variable}: no such setting{close}")
    return found


def from_toml(text: str, path: str, known: Collection[str]) -> dict[str, Given]:
    """Settings by name, and vLLM's by `vllm.NAME`. A name may have dashes or underscores.

    Raises:
        ConfigError: with path and line.
    """
    try:
        content = tomllib.loads(text)
    except ValueError as error:  # its message has line and column
        raise ConfigError(f"{path}: {error}") from error
    lines = key_lines(text)
    found: dict[str, Given] = {}
    for parts, value in _entries(content, path, lines):
        *table, key = parts
        at = f"{path}:{lines[parts]}"
        name = key.replace("-", "_")
        label = f"{at}: {'.'.join(parts)}"
        if table and name in known:
            raise ConfigError(f"{label}: the daemon reads this one itself: give it above [{ENGINE_TABLE}]")
        if not table and name not in known:
            raise ConfigError(f"{label}: no such setting{_nearest(name, known, str) or _engine_hint(name)}")
        full = ".".join((*table, name))
        if full in found:
            raise ConfigError(f"{label}: given twice, first at {found[full].origin}")
        found[full] = Given(value, at, label)
    return found


def _entries(
    content: Mapping[str, Any], path: str, lines: Mapping[tuple[str, ...], int]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in content.items():
        if key != ENGINE_TABLE:
            yield (key,), value
        elif isinstance(value, dict):
            yield from (((key, inner), it) for inner, it in value.items())
        else:
            raise ConfigError(f"{path}:{lines[key,]}: {key}: expected a table, [{key}], of vLLM's flags")


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, where each top-level key and each key one table below first appears. `text` is valid TOML."""
    found: dict[tuple[str, ...], int] = {}
    header, pending, start = "", "", 1
    for number, line in enumerate(text.split("\n"), 1):
        if not pending:
            start = number
        pending += line + "\n"
        try:
            # A statement by itself: what is incomplete, as a string over several lines, does not parse.
            content = tomllib.loads(header + pending)
        except ValueError:
            continue
        if pending.lstrip().startswith("["):
            header = pending
        for key, value in content.items():
            found.setdefault((key,), start)
            inner = value[-1] if isinstance(value, list) and value else value
            for below in inner if isinstance(inner, dict) else ():
                found.setdefault((key, below), start)
        pending = ""
    return found


def _nearest(name: str, known: Collection[str], spell: Callable[[str], str]) -> str:
    close = get_close_matches(name, sorted(known), 1, TYPO_LIKENESS)
    return f"; did you mean {spell(close[0])}?" if close else ""


def _engine_hint(name: str) -> str:
    return f"; if {flag_of(name)} is a flag of vLLM, give it under [{ENGINE_TABLE}]"


def engine_table(given: Mapping[str, Given]) -> dict[str, Any]:
    """vLLM's flags of the file, by name with underscores."""
    prefix = ENGINE_TABLE + "."
    return {name.removeprefix(prefix): it.value for name, it in given.items() if name.startswith(prefix)}


def as_flags(table: Mapping[str, Any]) -> tuple[str, ...]:
    """A command line that says to vLLM what the table says: `true` is `--x`, `false` is `--no-x`, a table is JSON."""
    flags: list[str] = []
    for name, value in table.items():
        flag = flag_of(name)
        match value:
            case True:
                flags.append(flag)
            case False:
                flags.append(flag_of("no_" + name))
            case list():
                flags += [flag, *map(_text, value)]
            case _:
                flags.append(f"{flag}={_text(value)}")
    return tuple(flags)


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list | bool) else str(value)


def with_places(message: str, given: Mapping[str, Given]) -> str:
    """What vLLM says of a flag, with the line of the file that gave it."""
    places = [
        it.origin
        for name, it in given.items()
        if name.startswith(ENGINE_TABLE + ".") and _names(message, flag_of(name.removeprefix(ENGINE_TABLE + ".")))
    ]
    return f"{message} ({', '.join(places)})" if places else message


def _names(message: str, flag: str) -> bool:
    words = message.replace("=", " ").replace(",", " ").replace(":", " ").replace("/", " ").split()
    return flag in words or flag.replace("-", "_").replace("__", "--", 1) in words
