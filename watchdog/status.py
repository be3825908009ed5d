"""The status file: what the watchdog knows, for `elastic-watchdog status`, and its sign of life for the daemon.

`watchdog.json` in the runtime directory, mode 0600, is replaced twice a second by the same loop that judges. So its
modification time is the watchdog's heartbeat: if it is older than `STALE_S`, the watchdog is dead or hangs. `pid` says
which process wrote it; the file is removed at an orderly end.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from watchdog.errors import NotRunning
from watchdog.state import write_atomically

FILE_NAME = "watchdog.json"
WRITE_S = 0.5
STALE_S = 3.0
VERSION = 1


def status_path(runtime_dir: Path) -> Path:
    return runtime_dir / FILE_NAME


def write_status(runtime_dir: Path, status: dict[str, Any]) -> None:
    write_atomically(
        status_path(runtime_dir),
        json.dumps({"version": VERSION, **status}, separators=(",", ":")).encode(),
        durable=False,
    )


def read_status(runtime_dir: Path) -> dict[str, Any]:
    """The file's contents with `age_s`. Raises NotRunning when there is none."""
    path = status_path(runtime_dir)
    try:
        age = time.time() - path.stat().st_mtime
        status: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotRunning(f"no watchdog in {runtime_dir}: start one with `elastic-watchdog run`") from error
    except (OSError, ValueError) as error:
        raise NotRunning(f"{path}: {error}") from error
    return {**status, "age_s": round(max(0.0, age), 2)}


def describe(status: dict[str, Any]) -> str:
    """One sentence: what is watched, and what is wrong."""
    gpus, ranks = status["gpus"], status["ranks"]
    wrong = [f"GPU {gpu['uuid']}: {gpu['verdict']} ({gpu['reason']})" for gpu in gpus if gpu["verdict"] != "ok"]
    wrong += [f"rank {rank['rank']}: {rank['verdict']} ({rank['reason']})" for rank in ranks if rank["verdict"] != "ok"]
    if status["driver"]["trouble"]:
        wrong.append(f"driver: {status['driver']['trouble']}")
    if not status["daemon"]["reachable"]:
        wrong.append("daemon not reachable")
    watching = f"watching {len(gpus)} GPUs and {len(ranks)} ranks, {_group(status)}, mode {status['mode']}"
    return "; ".join((watching, *wrong))


def render(status: dict[str, Any]) -> str:
    """For people: each GPU with verdict and evidence, each rank with its heartbeat."""
    age = status["age_s"]
    stale = f"  STALE: not written for {age:.0f} s, the watchdog is dead or hangs" if age > STALE_S else ""
    lines = [f"watchdog pid {status['pid']}, mode {status['mode']}, {_group(status)}{stale}"]
    driver = status["driver"]
    lines.append(
        f"driver {driver['version'] or 'not yet known'}{', ' + driver['trouble'] if driver['trouble'] else ''}"
    )
    for name, pids in driver["stuck"].items():
        lines += [f"  process {pid} is stuck in the kernel ({name})" for pid in pids]
    if not status["daemon"]["reachable"]:
        lines.append(f"daemon not reachable: {status['daemon']['error']}")
    lines.append("")
    lines.append(f"{'GPU':>3}  {'UUID':40}  {'VERDICT':<12}  {'TEMP':>5}  {'EVENTS':<8}  RANKS  EVIDENCE")
    for gpu in status["gpus"]:
        lines += _gpu_lines(gpu)
    if not status["gpus"]:
        lines.append("     none")
    if status["ranks"]:
        lines.append("")
        lines.append(f"{'RANK':>4}  {'INC.':>4}  {'HEARTBEAT':<12}  {'PHASE':<10}  {'STEP':>9}  {'SILENT':>8}  VERDICT")
        lines += [_rank_line(rank) for rank in status["ranks"]]
    return "\n".join(lines)


def _group(status: dict[str, Any]) -> str:
    """Epochs count from 1: in 0, ranks are bound and start, and are no group yet."""
    if status["epoch"]:
        return f"epoch {status['epoch']}"
    return f"no group yet ({len(status['ranks'])} ranks bound)" if status["ranks"] else "no ranks bound"


def _gpu_lines(gpu: dict[str, Any]) -> list[str]:
    index = "-" if gpu["index"] is None else gpu["index"]
    celsius = "-" if gpu["celsius"] is None else f"{gpu['celsius']} C"
    ranks = ",".join(map(str, gpu["ranks"])) or "-"
    first = gpu["reason"] or "-"
    if gpu["held"]:
        first += f" [held: {gpu['held']}]"
    events = "heard" if gpu["listening"] else "NOT YET" if gpu["present"] else "-"
    lines = [f"{index:>3}  {gpu['uuid']:40}  {gpu['verdict']:<12}  {celsius:>5}  {events:<8}  {ranks:<5}  {first}"]
    others = [one["signal"] for one in gpu["evidence"] if one["signal"] != gpu["signal"]]
    if others:
        lines.append(f"{'':>5}also: {', '.join(others)}")
    if used_by := gpu.get("used_by"):
        lines.append(f"{'':>5}in use by processes that are no ranks: pid {', '.join(map(str, used_by))}")
    return lines


def _rank_line(rank: dict[str, Any]) -> str:
    silent = "-" if rank["silent_s"] is None else f"{rank['silent_s']:.1f} s"
    step = "-" if rank["step"] is None else rank["step"]
    verdict = rank["verdict"] + (f": {rank['reason']}" if rank["reason"] else "")
    if rank["held"]:
        verdict += f" [held: {rank['held']}]"
    if rank["nccl_error"]:
        verdict += f" [its NCCL: {rank['nccl_error']}]"
    return (
        f"{rank['rank']:>4}  {rank['incarnation']:>4}  {rank['finding']:<12}  {rank['phase'] or '-':<10}  {step:>9}  "
        f"{silent:>8}  {verdict}"
    )
