"""The real watchdog and the daemon's real routes: which GPUs are fit, quarantine, and its release."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from elastic_daemon import protocol as p
from elastic_daemon.watch.desk import WatchdogDesk
from elastic_daemon.watch.routes import with_watchdog_routes
from tests.contract.watchdog_daemon import DaemonRoutes, Watchdog, until, watching
from tests.unit.test_watch_desk import Plane
from watchdog.simulator import create

pytestmark = pytest.mark.contract


class Setting:
    """A desk with a deployment of two ranks behind it, and a watchdog of four GPUs."""

    def __init__(self, plane: Plane, desk: WatchdogDesk, watchdog: Watchdog) -> None:
        self.plane, self.desk, self.watchdog = plane, desk, watchdog

    def seen(self) -> dict[str, p.GpuSeen]:
        """The latest list of GPUs."""
        lists = [event for event in list(self.plane.told) if isinstance(event, p.GpusSeen)]
        return {gpu.uuid: gpu for gpu in lists[-1].gpus} if lists else {}

    def verdicts(self, gpu: str) -> list[p.VerdictKind]:
        told = list(self.plane.told)
        return [event.verdict for event in told if isinstance(event, p.TelemetryVerdict) and event.subject == gpu]

    def until_fit(self, gpu: str, fit: bool = True) -> p.GpuSeen:
        def as_wanted() -> p.GpuSeen | None:
            seen = self.seen().get(gpu)
            return seen if seen is not None and seen.fit is fit else None

        found = until(as_wanted, f"{gpu} as {'fit' if fit else 'unfit'}", 20, self.explain)
        assert found is not None
        return found

    def explain(self) -> str:
        return f"{self.plane.told[-6:]}\n{self.watchdog.log.read_text()[-2000:]}"


@contextlib.contextmanager
def setting(directory: Path, *options: str) -> Iterator[Setting]:
    sim = create(directory, 4)
    plane = Plane()
    desk = WatchdogDesk(plane, directory)
    app = with_watchdog_routes(FastAPI(), desk)
    server = uvicorn.Server(uvicorn.Config(app, uds=str(directory / "http.sock"), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with watching(directory, sim, DaemonRoutes(directory / "http.sock"), *options) as watchdog:
            yield Setting(plane, desk, watchdog)
    finally:
        server.should_exit = True
        thread.join()


def test_the_daemon_knows_which_gpus_are_fit(tmp_path: Path) -> None:
    with setting(tmp_path) as its:
        sim, gpus = its.watchdog.sim, its.watchdog.gpus
        for gpu in gpus:
            its.until_fit(gpu)

        new = sim.replace(3)
        its.until_fit(new)
        assert gpus[3] not in its.seen()

        its.watchdog.until_listening()
        sim.xid(gpus[1], 79)
        assert "xid 79" in its.until_fit(gpus[1], False).reason
        assert its.verdicts(gpus[1]) == [p.VerdictKind.EXCLUDE]
        unfit = next(
            number
            for number, event in enumerate(its.plane.told)
            if isinstance(event, p.GpusSeen) and any(gpu.uuid == gpus[1] and not gpu.fit for gpu in event.gpus)
        )
        verdict = next(n for n, event in enumerate(its.plane.told) if getattr(event, "subject", "") == gpus[1])
        assert verdict < unfit, "the list came before the verdict"

        sim.lose(0)
        until(lambda: gpus[0] not in its.seen(), "a list without the GPU that is gone", 10, its.explain)
        lists = len(its.plane.told)
        its.desk._instance = "another life"  # a daemon that was restarted and knows nothing
        until(lambda: len(its.plane.told) > lists and gpus[0] not in its.seen(), "all of it again", 5, its.explain)


def test_quarantine_is_left_by_release_only(tmp_path: Path) -> None:
    with setting(tmp_path, "--quarantine-failures", "1", "--probation", "0.2") as its:
        gpu = its.watchdog.gpus[2]
        its.until_fit(gpu)
        its.watchdog.sim.xid(gpu, 79)
        until(lambda: its.watchdog.gpu(gpu)["signal"] == "quarantine", "quarantine after probation", 5, its.explain)
        assert not its.seen()[gpu].fit
        assert p.VerdictKind.OK not in its.verdicts(gpu)
        its.desk.release_gpu(gpu)
        until(lambda: its.verdicts(gpu)[-1] is p.VerdictKind.OK, "the end of quarantine", 5, its.explain)
        its.until_fit(gpu)
        until(lambda: its.watchdog.gpu(gpu)["quarantined"] is None, "the status without quarantine", 5, its.explain)

        its.watchdog.sim.xid(gpu, 79)  # a release is for what was, not for what comes
        its.until_fit(gpu, False)
        assert its.verdicts(gpu)[-1] is p.VerdictKind.EXCLUDE
