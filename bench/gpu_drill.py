"""The drill on a GPU host: ranks that share one GPU, real NCCL, SIGKILL of each rank under load.

    python -m bench.gpu_drill --part kill --out results.json    # run what is not in results.json yet
    python -m bench.gpu_drill --report results.json             # the table

A cell is one life of a daemon: started, drilled, stopped. Each is written to the results as soon as it is over, so a
run that was cut off goes on where it was. `docs/gpu.md` has the results and what a host needs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.machine import Machine

START_TIMEOUT_S = 240.0
DRILL_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Cell:
    """One life. `runner`: generation of vLLM's model runner. `victim`: the rank that is killed."""

    runner: int
    ranks: int
    victim: int

    @property
    def name(self) -> str:
        return f"V{self.runner}, {self.ranks} ranks, kill {self.victim}"


PARTS: Mapping[str, tuple[Cell, ...]] = {
    "kill": (Cell(1, 2, 1), Cell(1, 2, 0), Cell(2, 2, 1), Cell(2, 2, 0), Cell(1, 3, 1), Cell(2, 3, 0)),
}


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. `drill`: the drill's own report. `events`: of the daemon's log that tell of NCCL."""

    cell: str
    passed: bool
    start_s: float
    drill: dict[str, Any]
    events: list[dict[str, Any]]
    gpu_memory_mib: list[int]
    problem: str | None = None


def gpu_memory_mib() -> int:
    """Memory in use on the first GPU, as the driver says."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout)


def logged_events(log: Path, *names: str) -> list[dict[str, Any]]:
    """Events of these names in a log that is JSON but for what libraries print."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{") and (event := json.loads(line)).get("event") in names:
            found.append(event)
    return found


@contextmanager
def daemon(cell: Cell, home: Path, log: Path) -> Iterator[float]:
    """A daemon on one GPU; yields the seconds until it served."""
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": str(cell.runner - 1), "ELASTIC_LOG_FORMAT": "json"}
    ranks = str(cell.ranks)
    command = [sys.executable, "-m", "elastic_daemon.cli", "serve", "--device", "cuda", "--port", "0"]
    command += ["--data-parallel-size", ranks, "--ranks-per-gpu", ranks, "--runtime-dir", str(home / "run")]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        while not logged_events(log, "recovery_done"):
            if process.poll() is not None or time.monotonic() > started + START_TIMEOUT_S:
                raise RuntimeError(f"not serving after {time.monotonic() - started:.0f} s:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield time.monotonic() - started
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_cell(cell: Cell, log: Path) -> Outcome:
    start_s, report, memory, problem = 0.0, {}, [gpu_memory_mib()], None
    with TemporaryDirectory(prefix="gpu-drill-") as directory:
        home = Path(directory)
        drill = [sys.executable, "-m", "elastic_daemon.cli", "drill", "--runtime-dir", str(home / "run"), "--json"]
        drill += ["--kill", str(cell.victim), "--streams", "8", "--tokens", "120"]
        try:
            with daemon(cell, home, log) as start_s:
                memory.append(gpu_memory_mib())
                said = subprocess.run(drill, capture_output=True, text=True, timeout=DRILL_TIMEOUT_S, check=False)
                memory.append(gpu_memory_mib())
                report = json.loads(said.stdout) if said.stdout.startswith("{") else {"problems": [said.stderr[-2000:]]}
        except (RuntimeError, subprocess.SubprocessError) as error:
            problem = str(error)
    memory.append(gpu_memory_mib())
    events = logged_events(log, "nccl_connected", "nccl_aborted", "recovery_done", "parked", "group_abandoned")
    passed = problem is None and bool(report.get("passed"))
    return Outcome(cell.name, passed, round(start_s, 1), report, events, memory, problem)


def run_part(part: str, out: Path) -> bool:
    """Run the cells of a part that `out` does not hold yet. Returns whether all of the part passed."""
    results = json.loads(out.read_text()) if out.exists() else {}
    for cell in PARTS[part]:
        if cell.name not in results:
            print(f"{cell.name} ...", flush=True)
            log = out.with_name(re.sub(r"\W+", "-", cell.name.lower()) + ".log")
            outcome = run_cell(cell, log)
            results[cell.name] = {**asdict(outcome), "machine": asdict(Machine.here())}
            out.write_text(json.dumps(results, indent=1))
            print(f"  {'passed' if outcome.passed else 'FAILED: ' + str(outcome.problem or outcome.drill)[:1500]}")
    return all(results[cell.name]["passed"] for cell in PARTS[part])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one line a cell; milliseconds."""
    columns = "cell", "passed", "start s", "detect", "NCCL abort", "fence", "regroup", "repair", "total", "longest gap"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, result in results.items():
        drill, events = result["drill"], result["events"]
        recoveries = [e for e in events if e["event"] == "recovery_done" and e["kind"] == "shrink"]
        seconds = recoveries[0]["seconds"] if recoveries else {}
        aborts = [event["seconds"] for event in events if event["event"] == "nccl_aborted"]
        phases = [_ms(seconds.get(phase)) for phase in ("fence", "regroup", "repair", "total")]
        gap = f"{_ms(_gap(drill, 'disturbed'))} (undisturbed {_ms(_gap(drill, 'reference'))})"
        detect = _ms((drill.get("strike") or {}).get("detection_s"))
        cells = [name, "yes" if result["passed"] else "no", result["start_s"], detect, _ms(max(aborts, default=None))]
        lines.append("| " + " | ".join(map(str, [*cells, *phases, gap])) + " |")
    return "\n".join(lines)


def _gap(drill: Mapping[str, Any], run: str) -> float | None:
    return ((drill.get(run) or {}).get("gaps") or {}).get("max")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_drill", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="what to run")
    parser.add_argument("--out", type=Path, default=Path("gpu-drill.json"), help="results (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the table of these results")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    chosen = parser.parse_args(arguments)
    if chosen.report:
        print(table(json.loads(chosen.report.read_text())))
        return 0
    if not chosen.part:
        parser.error("one of --part and --report is needed")
    return 0 if run_part(chosen.part, chosen.out) else 1


if __name__ == "__main__":
    sys.exit(main())
