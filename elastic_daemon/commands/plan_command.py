"""`elastic-daemon plan`: which redundancy buys what, before anything is bought or started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from elastic_daemon.commands.capacity_plan import GIB, Failures, ModelSize, Option, options, recommended
from elastic_daemon.commands.model_size import read_model_size
from elastic_daemon.commands.operator_commands import age, make_console
from elastic_daemon.errors import ConfigError
from elastic_daemon.placement import PlacementError

MIB: Final = 2**20


def plan(arguments: argparse.Namespace) -> int:
    """Print the options for a model and a number of GPUs. Returns 0 if one of them can be recommended, else 1.

    Raises:
        ConfigError: the model cannot be read, or a number makes no sense.
    """
    gpu_bytes = arguments.gpu_memory * GIB
    try:
        model = model_size(arguments)
        failures = Failures(arguments.mtbf_hours, arguments.repair_hours, arguments.recovery_seconds)
        found = options(model, arguments.data_parallel_size, gpu_bytes, failures)
    except PlacementError as error:
        raise ConfigError(str(error)) from error
    best = recommended(found, gpu_bytes)
    if arguments.json:
        print(json.dumps(as_json(model, failures, found, best), indent=2))
    else:
        make_console().print(plan_view(model, arguments.data_parallel_size, failures, found, best))
    return 0 if best else 1


def model_size(arguments: argparse.Namespace) -> ModelSize:
    """From MODEL, or from the four sizes. Raises ConfigError if neither is complete."""
    sizes = {name: getattr(arguments, name) for name in ("experts", "layers", "expert_bytes", "other_bytes")}
    if arguments.model is not None:
        if arguments.experts is not None or arguments.layers is not None:
            raise ConfigError("--experts and --layers describe a model by hand: leave them out with MODEL")
        return read_model_size(Path(arguments.model), arguments.expert_bytes, arguments.other_bytes)
    if lacking := [f"--{name.replace('_', '-')}" for name, size in sizes.items() if size is None]:
        raise ConfigError(f"give MODEL, a directory with config.json, or else {', '.join(lacking)}")
    return ModelSize(**sizes)


def as_json(model: ModelSize, failures: Failures, found: Sequence[Option], best: Option | None) -> dict[str, object]:
    rows = [
        {
            **asdict(option),
            "fits": option.fits,
            "availability": option.availability,
            "unavailability": option.unavailability,
            "downtime_s_per_year": option.downtime_s_per_year,
        }
        for option in found
    ]
    recommended_losses = best.survive_losses if best else None
    return {
        "model": asdict(model),
        "failures": asdict(failures),
        "options": rows,
        "recommended_survive_losses": recommended_losses,
    }


def plan_view(model: ModelSize, ranks: int, failures: Failures, found: Sequence[Option], best: Option | None) -> Group:
    size = (
        f"{model.experts} experts in {model.layers} layers, {model.expert_bytes / MIB:,.3g} MiB each, "
        f"{model.other_bytes / GIB:,.3g} GiB besides; {ranks} GPUs"
    )
    rates = (
        f"a GPU fails every {failures.mtbf_hours:,.0f} h, is back after {failures.repair_hours:,.0f} h; "
        f"a recovery takes {failures.recovery_s:g} s"
    )
    return Group(Text(size), Text(rates), _table(found, best), _verdict(best))


def _table(found: Sequence[Option], best: Option | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        *("survive losses", "slots per rank", "redundant experts", "weights GiB", "left GiB"),
        *("expert safety", "survivable losses", "availability", "down per year"),
    ):
        table.add_column(column, justify="right")
    for option in found:
        table.add_row(
            str(option.survive_losses),
            str(option.slots_per_rank),
            str(option.redundant_experts),
            gib(option.weight_bytes),
            gib(option.kv_bytes) if option.fits else "does not fit",
            str(option.expert_safety),
            str(option.survivable_losses),
            percent(option.unavailability),
            age(option.downtime_s_per_year) if option.downtime_s_per_year >= 1 else "< 1 s",
            style="bold green" if option is best else None if option.fits else "dim",
        )
    return table


def gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:.2g}"


def percent(unavailability: float) -> str:
    """Availability in per cent with two digits beyond its nines."""
    down = 100 * unavailability
    digits = 2
    while digits < 12 and down < 10 ** (1 - digits):
        digits += 1
    return f"{100 - down:.{digits}f}%"


def _verdict(best: Option | None) -> Text:
    if best is None:
        return Text("recommended: nothing fits; more GPUs, or more memory each", style="bold red")
    text = f"recommended: --survive-losses {best.survive_losses}"
    if best.no_capacity > best.pauses:
        text += " (the most that leaves room for KV cache; more GPUs would buy more)"
    if best.expert_safety == 0:
        text += "; some experts have one copy: a loss reads theirs from host memory or disk"
    return Text(text, style="bold")
