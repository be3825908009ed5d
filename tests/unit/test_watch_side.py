"""What the supervisor asks of the watchdog's side, beside verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_daemon.sources import load_settings
from elastic_daemon.target_store import load_target, store_target
from elastic_daemon.watch.driver import known_gpus
from elastic_daemon.watch.side import WatchdogSide
from tests.unit.test_watch_desk import Plane
from watchdog.state import FILE_NAME
from watchdog.status import status_path, write_status

pytestmark = pytest.mark.usefixtures("clean_environment")


def side(runtime_dir: Path, plane: Plane, **settings: object) -> WatchdogSide:
    return WatchdogSide(load_settings({"runtime_dir": runtime_dir, **settings}), plane, ())


def test_gpus_that_the_watchdog_has_seen(tmp_path: Path) -> None:
    assert known_gpus(tmp_path) == frozenset()
    write_status(tmp_path, {"gpus": [{"uuid": "GPU-a"}, {"uuid": "GPU-b"}]})
    assert known_gpus(tmp_path) == {"GPU-a", "GPU-b"}
    for broken in ("{", "[]", '{"gpus": [{}]}', '{"gpus": null}'):
        status_path(tmp_path).write_text(broken)
        assert known_gpus(tmp_path) == frozenset()


def test_only_a_known_gpu_is_released(tmp_path: Path) -> None:
    plane = Plane()
    watched = side(tmp_path, plane)
    write_status(tmp_path, {"gpus": [{"uuid": "GPU-a"}]})
    with pytest.raises(LookupError, match="no GPU GPU-spare is known; known are GPU-a"):
        watched.release_gpu("GPU-spare")
    write_status(tmp_path, {"gpus": [{"uuid": "GPU-a"}, {"uuid": "GPU-spare"}]})
    watched.release_gpu("GPU-a")
    watched.release_gpu("GPU-spare")
    assert set(watched._desk.bindings()["released"]) == {"GPU-a", "GPU-spare"}


def test_without_a_watchdog_nothing_is_in_quarantine(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="--watchdog off"):
        side(tmp_path, Plane(), watchdog="off").release_gpu("GPU-a")


def test_a_start_forgets_simulated_gpus_and_not_the_target(tmp_path: Path) -> None:
    settings = load_settings({"runtime_dir": tmp_path})
    store_target(settings, 3)
    remembered = settings.simulated_state_dir / FILE_NAME
    remembered.write_text("{}")
    side(tmp_path, Plane())._forget_simulated()
    assert not remembered.exists()
    assert load_target(settings) == 3
