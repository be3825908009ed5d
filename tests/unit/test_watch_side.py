"""What the supervisor asks of the watchdog's side, beside verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.settings.sources import load_settings
from elastic_daemon.state.barred_store import load_barred, store_barred
from elastic_daemon.state.target_store import load_target, store_target
from elastic_daemon.watch.driver import GpusUnknown, known_gpus
from elastic_daemon.watch.gpus import Listing
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
    store_barred(settings, {"GPU-a": "no rank starts on it"})
    remembered = settings.simulated_state_dir / FILE_NAME
    remembered.write_text("{}")
    side(tmp_path, Plane())._forget_simulated()
    assert not remembered.exists()
    assert (load_target(settings), load_barred(settings)) == (3, {})


def test_but_not_where_they_are_remembered_elsewhere(tmp_path: Path) -> None:
    kept = {"state_dir": tmp_path / "kept"}
    store_barred(load_settings({"runtime_dir": tmp_path, **kept}), {"GPU-a": "no rank starts on it"})
    side(tmp_path, Plane(), **kept)._forget_simulated()
    assert load_barred(load_settings({"runtime_dir": tmp_path, **kept})) == {"GPU-a": "no rank starts on it"}


Driver = Callable[[Listing | GpusUnknown], None]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """What the driver answers on CUDA."""

    def answers(answer: Listing | GpusUnknown) -> None:
        async def ask() -> Listing:
            if isinstance(answer, GpusUnknown):
                raise answer
            return answer

        monkeypatch.setattr("elastic_daemon.watch.side.ask_driver", ask)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return answers


def listing(*uuids: str | None) -> Listing:
    made = Listing()
    made.hear(json.dumps({"count": len(uuids)}).encode())
    for index, uuid in enumerate(uuids):
        said = {"error": "GPU is lost"} if uuid is None else {"uuid": uuid, "slot": f"slot-{index}"}
        made.hear(json.dumps({"index": index, **said}).encode())
    return made


async def test_seven_of_eight_are_known_where_one_is_wedged(tmp_path: Path, driver: Driver) -> None:
    plane = Plane()
    watched = side(tmp_path, plane, device="cuda", state_dir=tmp_path / "state")
    driver(listing("GPU-a", None, "GPU-c"))
    await watched.prepare()
    assert watched.uuids == ("GPU-a", "GPU-c")
    [said] = plane.events.since(0)
    assert (said["event"], said["gpus"]) == ("gpus_unread", {"1": "GPU is lost"})


async def test_a_driver_that_tells_nothing_leaves_them_unknown(tmp_path: Path, driver: Driver) -> None:
    plane = Plane()
    watched = side(tmp_path, plane, device="cuda", state_dir=tmp_path / "state")
    driver(GpusUnknown("it hangs"))
    await watched.prepare()
    assert watched.uuids is None
    [said] = plane.events.since(0)
    assert (said["event"], said["reason"]) == ("gpus_unknown", "it hangs")


async def test_cuda_visible_devices_of_the_start_is_what_counts(
    tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    watched = side(tmp_path, Plane(), device="cuda", state_dir=tmp_path / "state")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    driver(listing("GPU-a", "GPU-b", "GPU-c"))
    await watched.prepare()
    assert watched.uuids == ("GPU-c", "GPU-a")


async def test_what_was_barred_is_known_at_the_start_and_can_be_released(tmp_path: Path, driver: Driver) -> None:
    plane = Plane()
    watched = side(tmp_path, plane, device="cuda", state_dir=tmp_path / "state")
    store_barred(load_settings({"state_dir": tmp_path / "state"}), {"GPU-gone": "no rank starts on it"})
    driver(listing("GPU-a"))
    await watched.prepare()
    assert watched.barred == {"GPU-gone": "no rank starts on it"}
    [said] = plane.events.since(0)
    assert (said["event"], said["gpus"]) == ("gpus_still_barred", watched.barred)
    watched.release_gpu("GPU-gone")
    assert plane.told == [p.GpuReleased("GPU-gone")]
