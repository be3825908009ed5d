"""What each signal means: the table `signals.toml`, and a site's changes to it.

A signal has a name: `xid:79`, `recovery_action:1`, or one of section [signal] such as `gpu_lost`. `SignalTable.rule`
gives the rule of any name, also of Xids and recovery actions that no file lists.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Any

from watchdog.errors import SignalsError

BUNDLED = Path(__file__).with_name("signals.toml")
VERSION = 1


class SignalClass(StrEnum):
    EXCLUDE = "exclude"
    DRAIN = "drain"
    RESTART_RANK = "restart-rank"
    SUSPECT = "suspect"
    COMPANIONS = "companions"
    RE_READ = "re-read"
    WITNESS = "witness"
    IGNORE = "ignore"


ALONE = (SignalClass.EXCLUDE, SignalClass.DRAIN, SignalClass.RESTART_RANK, SignalClass.SUSPECT, SignalClass.IGNORE)


@dataclass(frozen=True)
class Rule:
    """What one signal means. Durations in seconds; `threshold` in the unit of its reading."""

    signal: str
    cls: SignalClass
    name: str
    source: str
    date: date
    hold_s: float = 0.0
    count: int = 2
    window_s: float = 60.0
    threshold: float | None = None
    per_s: float = 60.0
    companions: tuple[str, ...] = ()
    alone: SignalClass = SignalClass.SUSPECT


NUMBERED = {"xid": "xid", "recovery_action": "recovery_action"}
"""Section -> prefix of the signals in it, whose keys are numbers (or `other`)."""

_NUMBERS = {"hold_s": 0.0, "count": 1, "window_s": 0.0, "threshold": 0.0, "per_s": 1.0}
"""Numeric field -> least value."""
_TEXTS = ("name", "source")
_FIELDS = {"class", "date", "companions", "alone", *_TEXTS, *_NUMBERS}


@dataclass(frozen=True)
class SignalTable:
    """All rules, by signal."""

    rules: Mapping[str, Rule]

    def rule(self, signal: str) -> Rule:
        """The rule of a signal; a number that is not listed has the rule `other` of its section.

        Raises KeyError for a name that is no signal.
        """
        if rule := self.rules.get(signal):
            return rule
        prefix, _, _ = signal.partition(":")
        return replace(self.rules[f"{prefix}:other"], signal=signal)

    def threshold(self, signal: str) -> float:
        value = self.rule(signal).threshold
        assert value is not None, f"{signal} has no threshold"
        return value


def load_table(site: Path | None = None) -> SignalTable:
    """The bundled table, overlaid by a site's.

    Raises SignalsError: `FILE:LINE: reason`.
    """
    rules, sources = _read(BUNDLED, {}, {})
    if site is not None:
        rules, _ = _read(site, rules, sources)
    return SignalTable(rules)


def _read(
    path: Path, rules: Mapping[str, Rule], sources: Mapping[str, date]
) -> tuple[dict[str, Rule], dict[str, date]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SignalsError(f"{path}: {reason}") from error
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at line (\d+)", str(error))
        raise SignalsError(f"{path}:{where[1] if where else 1}: {error}") from error
    return _Parser(path, text).parse(content, rules, sources)


class _Parser:
    """Checks one file; knows where in it an entry stands."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()
        self._modified = date.fromtimestamp(path.stat().st_mtime)

    def parse(
        self, content: Mapping[str, Any], rules: Mapping[str, Rule], sources: Mapping[str, date]
    ) -> tuple[dict[str, Rule], dict[str, date]]:
        known = dict(rules)
        if content.get("version") != VERSION:
            self._refuse((), f"version = {VERSION} expected, not {content.get('version')!r}", key="version")
        dates = dict(sources)
        for section, entries in content.items():
            if section == "version":
                continue
            if section not in ("sources", "signal", *NUMBERED):
                self._refuse((section,), "unknown section; there are sources, xid, recovery_action and signal")
            if not isinstance(entries, dict):
                self._refuse((), "must be a table", key=section)
        for name, source in self._entries(content, "sources"):
            if not isinstance(source.get("date"), date):
                self._refuse(("sources", name), "a source needs a `date = YYYY-MM-DD`")
            dates[name] = source["date"]
        for section in (*NUMBERED, "signal"):
            for key, fields in self._entries(content, section):
                signal = self._signal(section, key, known, bool(rules))
                known[signal] = self._rule(section, key, signal, fields, known.get(signal), dates)
        return known, dates

    def _entries(self, content: Mapping[str, Any], section: str) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for key, fields in content.get(section, {}).items():
            if not isinstance(fields, dict):
                self._refuse((section, key), 'must be a table such as { class = "suspect" }')
            found.append((key, fields))
        return found

    def _signal(self, section: str, key: str, known: Mapping[str, Rule], site: bool) -> str:
        if section in NUMBERED:
            if key != "other" and not (key.isascii() and key.isdigit() and str(int(key)) == key):
                self._refuse((section, key), "a number or `other` expected")
            return f"{NUMBERED[section]}:{key}"
        if site and key not in known:
            near = ", ".join(sorted(name for name in known if ":" not in name))
            self._refuse((section, key), f"no such signal; there are {near}")
        return key

    def _rule(
        self,
        section: str,
        key: str,
        signal: str,
        fields: Mapping[str, Any],
        old: Rule | None,
        dates: Mapping[str, date],
    ) -> Rule:
        where = (section, key)
        for field, value in fields.items():
            self._check(where, field, value)
        changes: dict[str, Any] = {name: fields[name] for name in (*_NUMBERS, "name") if name in fields}
        if "class" in fields:
            changes["cls"] = SignalClass(fields["class"])
        if "alone" in fields:
            changes["alone"] = SignalClass(fields["alone"])
        if "companions" in fields:
            changes["companions"] = tuple(f"xid:{number}" for number in fields["companions"])
        source = fields.get("source", self._path.name)
        if "source" in fields and source not in dates:
            self._refuse(where, f"unknown source {source!r}; [sources] has {', '.join(sorted(dates))}", "source")
        changes["source"] = source
        changes["date"] = fields.get("date", dates.get(source, self._modified))
        if old is None:
            if "class" not in fields:
                self._refuse(where, "a new entry needs a `class`")
            rule = Rule(signal, **{"name": signal, **changes})
        else:
            rule = replace(old, **changes)
        if rule.cls is SignalClass.COMPANIONS and not rule.companions:
            self._refuse(where, "class `companions` needs `companions = [XID, ...]`")
        if rule.cls is SignalClass.RE_READ and section == "recovery_action":
            self._refuse(where, "a recovery action cannot ask to be read again")
        return rule

    def _check(self, where: tuple[str, str], field: str, value: Any) -> None:
        if field not in _FIELDS:
            self._refuse(where, f"unknown field {field!r}; there are {', '.join(sorted(_FIELDS))}", field)
        if field == "class" and value not in list(SignalClass):
            self._refuse(where, f"unknown class {value!r}; there are {', '.join(SignalClass)}", field)
        if field == "alone" and value not in ALONE:
            self._refuse(where, f"`alone` cannot be {value!r}; it can be {', '.join(ALONE)}", field)
        if field in _TEXTS and not (isinstance(value, str) and value):
            self._refuse(where, f"{field} must be a text", field)
        if field == "date" and not isinstance(value, date):
            self._refuse(where, "date must be YYYY-MM-DD", field)
        if field == "companions" and not (
            isinstance(value, list)
            and value
            and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        ):
            self._refuse(where, "companions must be a list of Xids", field)
        if field in _NUMBERS:
            kind = int if field == "count" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not _NUMBERS[field] <= value < 1e9:
                what = "a whole number" if field == "count" else "a number"
                self._refuse(where, f"{field} must be {what} of at least {_NUMBERS[field]:g}, not {value!r}", field)

    def _refuse(self, where: tuple[str, ...], reason: str, key: str | None = None) -> Any:
        line = self._line((*where, key) if key else where)
        entry = f"[{where[0]}] {where[1]}: " if len(where) == 2 else f"[{where[0]}]: " if where else ""
        raise SignalsError(f"{self._path}:{line}: {entry}{reason}")

    def _line(self, path: tuple[str | None, ...]) -> int:
        """The line of the longest leading part of a dotted path that can be found; 1 when there is none."""
        best, depth = 1, 0
        section: tuple[str, ...] = ()
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[([^\]]+)\]", line):
                section = tuple(part.strip().strip("\"'") for part in header[1].split("."))
                here = section
            elif key := re.match(r"\s*([\w\"'.-]+)\s*=", line):
                here = (*section, *(part.strip("\"'") for part in key[1].split(".")))
            else:
                continue
            common = 0
            for ours, theirs in zip(path, here, strict=False):
                if ours != theirs:
                    break
                common += 1
            if common > depth:
                best, depth = number, common
        return best
