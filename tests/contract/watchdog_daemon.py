"""What the watchdog tests share: a daemon's routes on a Unix socket, and a real watchdog over simulated GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar

from watchdog.simulator import Simulator, create

T = TypeVar("T")
ROOT = Path(__file__).parents[2]

QUICK = """
version = 1
[signal]
thermal_slowdown = { hold_s = 0.6 }
power_brake = { hold_s = 0.6 }
sw_thermal_slowdown = { hold_s = 0.2 }
hw_slowdown = { hold_s = 0.2 }
nvlink_down = { hold_s = 0.6 }
fabric_unhealthy = { hold_s = 0.6 }
pcie_replay_rate = { hold_s = 0.6, threshold = 50 }
nvlink_error_rate = { hold_s = 0.6, threshold = 50 }
ecc_corrected_rate = { threshold = 50 }
driver_error = { hold_s = 0.2 }
driver_late = { window_s = 5 }
[recovery_action]
3 = { hold_s = 0.4 }
4 = { hold_s = 0.4 }
other = { hold_s = 0.4 }
"""
"""A site's table of signals that does not make tests wait."""

# Faults that share one watchdog must not meet its limits, which have tests of their own.
NO_LIMITS = ("--max-exclusions", "1000", "--quarantine-failures", "0", "--repeat-restarts", "0", "--probation", "1")


@dataclass
class DaemonRoutes:
    """The daemon's side of the contract: bindings to give, verdicts taken in."""

    socket: Path
    epoch: int = 1
    instance: str = "first"
    ranks: list[dict[str, Any]] = field(default_factory=list)
    min_ranks: int = 1
    released: dict[str, float] = field(default_factory=dict)
    verdicts: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """(arrival in monotonic seconds, body)"""
    refused: list[dict[str, Any]] = field(default_factory=list)
    gpus: list[list[dict[str, Any]]] = field(default_factory=list)
    """What came to `PUT /watchdog/gpus`, oldest first."""
    asked: int = 0

    def bind(self, gpus: list[str], pages: dict[int, Path] | None = None) -> None:
        pages = pages or {}
        self.ranks = [
            {"rank": rank, "incarnation": 10 + rank, "gpu": gpu, "pids": [os.getpid()],
             "heartbeat": str(pages[rank]) if rank in pages else None}
            for rank, gpu in enumerate(gpus)
        ]  # fmt: skip

    def bindings(self) -> dict[str, Any]:
        self.asked += 1
        return {
            "instance": self.instance,
            "epoch": self.epoch,
            "min_ranks": self.min_ranks,
            "ranks": self.ranks,
            "released": self.released,
        }

    def take(self, id_: str, body: dict[str, Any]) -> int:
        assert id_ == body["id"]
        if body["epoch"] != self.epoch:
            self.refused.append(body)
            return 409
        self.verdicts.append((time.monotonic(), body))
        return 204

    def of(self, **wanted: Any) -> list[tuple[float, dict[str, Any]]]:
        return [
            (at, body)
            for at, body in list(self.verdicts)
            if all(body.get(name) == value for name, value in wanted.items())
        ]


class _Handler(BaseHTTPRequestHandler):
    routes: DaemonRoutes

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps(self.routes.bindings()).encode()
        self.send_response(200 if self.path == "/watchdog/bindings" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/watchdog/gpus":
            self.routes.gpus.append(body["gpus"])
            self.send_response(204)
        else:
            self.send_response(self.routes.take(self.path.rpartition("/")[2], body))
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        request, _ = super().get_request()
        return request, ("unix", 0)


@contextlib.contextmanager
def serving(routes: DaemonRoutes) -> Iterator[DaemonRoutes]:
    routes.socket.unlink(missing_ok=True)
    handler = type("Handler", (_Handler,), {"routes": routes})
    with _Server(str(routes.socket), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield routes
        finally:
            server.shutdown()
            thread.join()
            routes.socket.unlink(missing_ok=True)


@dataclass
class Watchdog:
    """A running `elastic-watchdog run`."""

    process: subprocess.Popen[bytes]
    runtime_dir: Path
    log: Path
    sim: Simulator
    daemon: DaemonRoutes
    gpus: list[str]

    def status(self) -> dict[str, Any]:
        return json.loads((self.runtime_dir / "watchdog.json").read_bytes())

    def gpu(self, uuid: str) -> dict[str, Any]:
        return next((gpu for gpu in self.status()["gpus"] if gpu["uuid"] == uuid), {})

    def verdict(self, timeout_s: float = 15.0, **wanted: Any) -> tuple[float, dict[str, Any]]:
        """The first verdict with these fields."""
        return until(lambda: self.daemon.of(**wanted), f"a verdict with {wanted}", timeout_s, self.explain)[0]

    def until_listening(self, timeout_s: float = 20.0) -> None:
        """Events of all GPUs are waited for, said since this call: NVML keeps none for who listens later."""
        asked = time.time()

        def heard() -> bool:
            status = self.status()
            driver = status["driver"]
            everyone = {gpu.uuid for gpu in self.sim.list() if not gpu.lost}
            return status["written"] > asked and not driver["isolated"] and set(driver["listening"]) == everyone

        until(heard, "a watchdog that listens to all GPUs", timeout_s, self.explain)

    def explain(self) -> str:
        return f"verdicts: {[body for _, body in self.daemon.verdicts]}\nlog: {self.log.read_text()[-3000:]}"

    def events(self, name: str) -> list[dict[str, Any]]:
        whole = self.log.read_text().rpartition("\n")[0]  # it may be writing a line
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]


def until(condition: Callable[[], T], what: str, timeout_s: float, explain: Callable[[], str] = str) -> T:
    """The condition's value as soon as it is true."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{timeout_s:g} s without {what}\n{explain()}"
        time.sleep(0.005)
    return found


def start(runtime_dir: Path, *options: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = runtime_dir / "watchdog.log"
    command = [sys.executable, "-m", "watchdog.cli", "run", "--simulated", "--runtime-dir", str(runtime_dir)]
    command += ["--state-dir", str(runtime_dir / "state"), *options]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "ELASTIC_LOG_FORMAT": "json"}, cwd=ROOT)
    return process, log


@contextlib.contextmanager
def watching(runtime_dir: Path, sim: Simulator, daemon: DaemonRoutes, *options: str) -> Iterator[Watchdog]:
    """A watchdog that has read all GPUs and the bindings."""
    process, log = start(runtime_dir, *options)
    gpus = [gpu.uuid for gpu in sim.list()]
    watchdog = Watchdog(process, runtime_dir, log, sim, daemon, gpus)
    try:
        until(lambda: _ready(watchdog), "a watchdog that is ready", 20, lambda: log.read_text()[-3000:])
        yield watchdog
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@contextlib.contextmanager
def watching_quickly(directory: Path, gpus: int) -> Iterator[Watchdog]:
    """One for many faults, with a rank on each GPU: without limits, and quick to confirm."""
    site = directory / "site.toml"
    site.write_text(QUICK)
    sim = create(directory, gpus)
    daemon = DaemonRoutes(directory / "http.sock")
    daemon.bind([gpu.uuid for gpu in sim.list()])
    with serving(daemon), watching(directory, sim, daemon, "--signals", str(site), *NO_LIMITS) as watchdog:
        yield watchdog


def _ready(watchdog: Watchdog) -> bool:
    assert watchdog.process.poll() is None, watchdog.log.read_text()[-3000:]
    with contextlib.suppress(FileNotFoundError):
        status = watchdog.status()
        read = sum(bool(gpu["reading"].get("celsius")) for gpu in status["gpus"])
        return (
            read == len(watchdog.gpus)
            and len(status["driver"]["listening"]) == len(watchdog.gpus)
            and status["daemon"]["reachable"]
            and {"poll", "events"} <= status["driver"]["children"].keys()
        )
    return False
