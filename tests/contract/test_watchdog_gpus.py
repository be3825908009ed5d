"""The real watchdog and the daemon's real routes: which GPUs are fit and ours, quarantine, and its release."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from elastic_daemon import protocol as p
from elastic_daemon.watch.desk import WatchdogDesk
from elastic_daemon.watch.driver import ask_driver
from elastic_daemon.watch.gpus import AllowList
from elastic_daemon.watch.routes import with_watchdog_routes
from tests.contract.watchdog_daemon import DaemonRoutes, Watchdog, until, watching
from tests.unit.test_watch_desk import Plane
from watchdog.simulator import create, driver_environment
from watchdog.status import render

pytestmark = pytest.mark.contract


STALLS = ("NVML answers slowly", "an NVML call missed its deadline")


class Setting:
    """A desk with a deployment of two ranks behind it, and a watchdog of four GPUs."""

    def __init__(self, plane: Plane, desk: WatchdogDesk, watchdog: Watchdog) -> None:
        self.plane, self.desk, self.watchdog = plane, desk, watchdog

    def seen(self) -> dict[str, p.GpuSeen]:
        """The latest list of GPUs."""
        lists = [event for event in list(self.plane.told) if isinstance(event, p.GpusSeen)]
        return {gpu.uuid: gpu for gpu in lists[-1].gpus} if lists else {}

    def verdicts(self, gpu: str) -> list[p.VerdictKind]:
        """Without the suspicion of a GPU that was fine, which a stall of this machine brings, and the end of it."""
        kinds: list[p.VerdictKind] = []
        stalled = False
        for event in list(self.plane.told):
            if not isinstance(event, p.TelemetryVerdict) or event.subject != gpu:
                continue
            was_fine = not kinds or kinds[-1] is p.VerdictKind.OK
            suspect = was_fine and event.verdict is p.VerdictKind.SUSPECT
            stalls = suspect and any(name in event.reason for name in STALLS)
            if not stalls and not (stalled and event.verdict is p.VerdictKind.OK):
                kinds.append(event.verdict)
            stalled = stalls
        return kinds

    def told_of_others(self) -> list[str]:
        return [event["gpu"] for event in self.plane.events.since(0) if event["event"] == "gpu_not_ours"]

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
def setting(directory: Path, *options: str, allowed: AllowList | None = None) -> Iterator[Setting]:
    sim = create(directory, 4)
    plane = Plane()
    desk = WatchdogDesk(plane, directory, allowed)
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


def test_only_gpus_that_the_start_named_are_ours_a_wedged_one_included(tmp_path: Path) -> None:
    with create(tmp_path, 4) as sim:
        gpus = [gpu.uuid for gpu in sim.list()]
        sim.hang(1)
        listing = asyncio.run(ask_driver({**os.environ, **driver_environment(tmp_path)}))
    allowed = AllowList("0,1")
    assert allowed.begin(listing.gpus) == (gpus[0],)
    with setting(tmp_path, allowed=allowed) as its:  # which heals it
        its.until_fit(gpus[1])
        assert its.seen().keys() == set(gpus[:2])

        its.watchdog.sim.lose(0)  # the others get other indices
        until(lambda: its.seen().keys() == {gpus[1]}, "a list without the GPU that is gone", 10, its.explain)
        foreign = its.watchdog.sim.replace(3)
        until(its.told_of_others, "word of a GPU of others", 20, its.explain)
        assert its.told_of_others() == [foreign]
        new = its.watchdog.sim.replace(0)
        its.until_fit(new)
        assert its.seen().keys() == {new, gpus[1]}


def test_a_gpu_that_somebody_else_uses_is_not_fit_and_those_of_ranks_are(tmp_path: Path) -> None:
    with setting(tmp_path) as its:
        gpus, sim = its.watchdog.gpus, its.watchdog.sim
        for gpu in gpus:
            its.until_fit(gpu)
        assert its.plane.now is not None
        ranks = (dataclasses.replace(its.plane.now.ranks[0], gpu=gpus[0]), *its.plane.now.ranks[1:])
        its.plane.now = dataclasses.replace(its.plane.now, ranks=ranks)
        until(lambda: its.watchdog.gpu(gpus[0])["ranks"] == [0], "the binding", 5, its.explain)

        sim.occupy(0, 999)  # whose GPU it is we know
        sim.occupy(1, 4712)  # of rank 1, wherever that is
        sim.occupy(3, 999)
        assert "in use by a process that is no rank (pid 999)" in its.until_fit(gpus[3], False).reason
        time.sleep(3.0)  # two more looks
        assert {gpu: its.seen()[gpu].fit for gpu in gpus} == dict.fromkeys(gpus[:3], True) | {gpus[3]: False}
        assert its.verdicts(gpus[3]) == [], "there is nothing wrong with it"
        shown = render({**its.watchdog.status(), "age_s": 0.0})
        assert shown.count("in use by processes that are no ranks: pid 999") == 1
        sim.heal(3)
        its.until_fit(gpus[3])
