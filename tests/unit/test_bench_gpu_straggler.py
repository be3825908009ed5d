"""The drill's part `straggler`, as far as it needs no GPU: when it is refused, its burners, what it reads."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import stragglers
from bench.gpu.life import Setting
from bench.gpu.results import REFUSED, Findings
from elastic_daemon.errors import ElasticError
from watchdog.heartbeat.layout import Phase, Snapshot
from watchdog.heartbeat.page import HeartbeatWriter
from watchdog.status import write_status


class On:
    """A life whose ranks are on these GPUs."""

    def __init__(self, device: str, *gpus: str | None) -> None:
        self._gpus = gpus
        self.daemon = self
        self.setting = Setting(device)

    async def health(self) -> dict[str, Any]:
        return {"ranks": [{"rank": rank, "gpu": gpu} for rank, gpu in enumerate(self._gpus)]}


@pytest.mark.parametrize(
    "life",
    [
        On("cuda", None, None),
        On("cuda", "GPU-a", "GPU-a"),
        On("cuda", "GPU-a", "GPU-b", "GPU-a"),
        On("cpu", "GPU-a", "GPU-b"),  # simulated ones
    ],
)
async def test_it_is_refused_where_ranks_have_no_gpu_of_their_own(life: On) -> None:
    findings = Findings()
    await stragglers.straggler(life, findings, 1)  # type: ignore[arg-type]
    assert findings.verdict == REFUSED


def burner(directory: Path, code: str) -> Path:
    """One that leaves its pid and its GPU behind."""
    path = directory / "burner.py"
    path.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(directory)!r}, str(os.getpid())).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n{code}\n"
    )
    return path


def started(directory: Path) -> dict[int, str]:
    return {int(path.name): path.read_text() for path in directory.iterdir() if path.name.isdigit()}


async def test_burners_are_on_that_gpu_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "BURNER", burner(tmp_path, "print('burning', flush=True); time.sleep(60)"))
    with pytest.raises(ZeroDivisionError):
        async with stragglers.burning("GPU-a"):
            pids = started(tmp_path)
            assert list(pids.values()) == ["GPU-a"] * stragglers.BURNERS
            raise ZeroDivisionError
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_burner_that_does_not_burn_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "BURNER", burner(tmp_path, "raise SystemExit(3)"))
    with pytest.raises(ElasticError, match="GPU-a ended with status 3"):
        async with stragglers.burning("GPU-a"):
            pass


async def test_it_waits_for_a_name_and_keeps_all_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "LOOK_S", 0.01)
    evidence = [{"signal": "straggler", "detail": {"slowdown": 3.5}}]
    slow = {"rank": 1, "finding": "straggler", "evidence": evidence}
    named: set[int] = set()
    assert await stragglers.until(tmp_path, 0.05, named, bool) is None  # no status yet
    write_status(tmp_path, {"ranks": [slow, {"rank": 0, "finding": "ok", "evidence": []}]})
    assert stragglers.slow_ranks(tmp_path) == {1: 3.5}
    assert await stragglers.until(tmp_path, 5.0, named, lambda slow: 1 in slow) is not None
    assert await stragglers.until(tmp_path, 0.05, named, lambda slow: not slow) is None
    assert named == {1}


async def test_what_pages_say_of_a_stretch(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, 3, 7)
    pages = stragglers.Pages(tmp_path)
    assert [one["worked us"] for one in pages.since_last()] == [None]
    writer.start_step(40, Phase.DECODE)
    writer.add_times(8_000_000, 4_000_000, 2_000_000, 8)
    await asyncio.sleep(0.01)
    [said] = pages.since_last()
    assert (said["rank"], said["worked us"], said["waited us"], said["starved us"]) == (3, 1000.0, 500.0, 250.0)
    assert (said["timed"], said["steps"]) == (8, 40) and said["step ms"] > 0
    pages.close()
    writer.close()


def test_a_new_epoch_in_a_stretch_is_no_error() -> None:
    old = Snapshot(0, 1, 2, step=90, timed=100, worked_ns=10**9)
    said = stragglers.stretch(old, replace(old, step=3, timed=0, worked_ns=0), 1.0)
    assert (said["worked us"], said["step ms"]) == (None, None)
