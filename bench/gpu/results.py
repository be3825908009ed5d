"""What parts have found: kept in one file each, merged into one table."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elastic_daemon.drill.report import percentile

PASSED, FAILED, REFUSED, CUT = "passed", "FAILED", "refused", "cut off"
"""Verdicts. A part that the daemon refuses at its start says why; one that is cut off has not come to its end."""

COLUMNS = ("GPU", "driver", "versions", "date", "part", "variant", "trials", "figures", "bar", "verdict")

RELATIONS: Mapping[str, Callable[[Any, Any], bool]] = {"<=": operator.le, "==": operator.eq, ">=": operator.ge}


@dataclass(frozen=True)
class Bar:
    """What has to hold of one figure. `value` is None where it was not measured, which does not meet the bar."""

    what: str
    relation: str
    limit: Any
    value: Any

    @property
    def met(self) -> bool:
        return self.value is not None and RELATIONS[self.relation](self.value, self.limit)

    def __str__(self) -> str:
        return f"{self.what} {self.relation} {_short(self.limit)}" + ("" if self.met else f" (is {_short(self.value)})")


@dataclass
class Findings:
    """Of one part, as it goes on."""

    trials: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: str | None = None
    cut: bool = False

    def spread(self, name: str, *, of: Sequence[str] = ()) -> float | None:
        """Take a time of all trials (`name_s`) into the figures, in milliseconds. Returns the worst, in seconds."""
        values: list[float] = []
        for trial in self.trials:
            for key in of or (f"{name}_s",):
                value = trial.get(key)
                values += value if isinstance(value, list) else [value] if value is not None else []
        if not values:
            return None
        self.figures[f"{name} ms"] = {"p50": ms(percentile(values, 0.5)), "max": ms(max(values)), "n": len(values)}
        return max(values)

    @property
    def verdict(self) -> str:
        if self.refused is not None:
            return REFUSED
        if self.cut:
            return CUT
        return FAILED if self.problems or not all(bar.met for bar in self.bars) else PASSED

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        body["bars"] = [{**asdict(bar), "met": bar.met, "text": str(bar)} for bar in self.bars]
        return {**body, "verdict": self.verdict}


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def file_of(directory: Path, part: str, variant: str | None) -> Path:
    return directory / (f"{part}-{variant}.json" if variant else f"{part}.json")


def write(directory: Path, part: str, variant: str | None, body: Mapping[str, Any]) -> Path:
    """A part that was cut off is not there the next time, and its file makes way for one that was not."""
    whole = file_of(directory, part, variant)
    cut = whole.with_suffix(".cut.json")
    path = cut if body["verdict"] == CUT else whole
    path.write_text(json.dumps({"part": part, "variant": variant or "", **body}, indent=1, default=str) + "\n")
    if path is whole:
        cut.unlink(missing_ok=True)
    return path


def read_all(directory: Path) -> list[dict[str, Any]]:
    """Raises ValueError for a file that is no result."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            body = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if isinstance(body, dict) and {"part", "verdict"} <= body.keys():
            found.append(body)
    return found


def table(results: Iterable[Mapping[str, Any]], order: Sequence[str]) -> str:
    """Markdown, one line for each part and variant; `order` of the parts."""
    rank = {name: number for number, name in enumerate(order)}
    lines = [_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    for one in sorted(results, key=lambda one: (one.get("variant", ""), rank.get(one["part"], len(rank)))):
        lines.append(_row(_cells(one)))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cells(one: Mapping[str, Any]) -> list[str]:
    where = "**trial run on CPU**" if one.get("trial") else one.get("gpu") or "?"
    versions = ", ".join(f"{name} {version}" for name, version in one.get("versions", {}).items())
    cell = f"{one.get('variant') or '-'} ({one['cell']})" if one.get("cell") else one.get("variant") or "-"
    figures = {name: value for name, value in one.get("figures", {}).items() if name != "changes"}
    bars = "; ".join(bar["text"] for bar in one.get("bars", ())) or "-"
    verdict = one["verdict"]
    why = one.get("refused") or "; ".join(one.get("problems", ())[:2])
    return [
        where,
        one.get("driver") or "-",
        versions or "-",
        str(one.get("date", "-"))[:16],
        one["part"],
        cell,
        str(len(one.get("trials", ()))),
        "; ".join(f"{name} {_short(value)}" for name, value in figures.items()) or "-",
        bars,
        f"{verdict}: {why[:300]}" if why else verdict,
    ]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and {"p50", "max"} <= value.keys():
        return f"{value['p50']:g} (max {value['max']:g})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
