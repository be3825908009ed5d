"""An operator's number of ranks outlives a restart of the daemon, and nothing in its file stops a start."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings
from elastic_daemon.settings.sources import load_settings
from elastic_daemon.state.state_writer import StateWriter
from elastic_daemon.state.target_store import FILE_NAME, load_target, start_target, store_target

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def settings_with(state: Path, **more: object) -> Settings:
    return load_settings({"state_dir": state, **more})


def test_what_is_stored_is_loaded(state: Path) -> None:
    settings = settings_with(state)
    assert load_target(settings) is None
    for target in (3, 5):
        store_target(settings, target)
        assert load_target(settings) == target
    body = json.loads((state / FILE_NAME).read_text())
    assert (body["version"], body["target"]) == (1, 5)
    assert abs(body["at"] - time.time()) < 60
    assert (state.stat().st_mode & 0o777, (state / FILE_NAME).stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"version": 2, "target": 3}',
        '{"version": 1}',
        '{"version": 1, "target": "3"}',
        '{"version": 1, "target": true}',
        '{"version": 1, "target": 0}',
        '{"version": 1, "target": 2.5}',
    ],
)
def test_a_file_that_cannot_be_read_is_put_aside(state: Path, text: str) -> None:
    state.mkdir()
    (state / FILE_NAME).write_text(text)
    with capture_logs() as logs:
        assert load_target(settings_with(state)) is None
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("target_corrupt", "warning")
    (aside,) = state.iterdir()
    assert str(aside) == line["moved_to"]
    assert aside.read_text() == text
    assert load_target(settings_with(state)) is None


def test_a_file_that_is_not_ours_to_read(state: Path) -> None:
    (state / FILE_NAME).mkdir(parents=True)
    with capture_logs() as logs:
        assert load_target(settings_with(state)) is None
    assert [line["event"] for line in logs] == ["target_unreadable"]


def test_reset_discards_it_for_good(state: Path) -> None:
    store_target(settings_with(state), 3)
    assert load_target(settings_with(state, reset_target=True)) is None
    assert load_target(settings_with(state)) is None
    assert load_target(settings_with(state, reset_target=True)) is None


def test_which_wins(state: Path) -> None:
    settings = settings_with(state, data_parallel_size=4)
    assert (start_target(settings, None, 2, 6).target, start_target(settings, None, 2, 6).event) == (4, None)
    restored = start_target(settings, 3, 2, 6)
    assert (restored.target, restored.event) == (3, "target_restored")
    assert restored.fields == {"target": 3, "stored": 3, "data_parallel_size": 4}
    for stored in (1, 7):
        ignored = start_target(settings, stored, 2, 6)
        assert (ignored.target, ignored.event) == (4, "target_ignored")
        assert "2 and 6" in ignored.fields["reason"]
    reset = start_target(settings_with(state, reset_target=True), None, 2, 6)
    assert (reset.target, reset.event) == (4, "target_reset")


async def test_the_last_of_several_is_kept(state: Path) -> None:
    settings = settings_with(state)
    writer = StateWriter(settings)
    await asyncio.gather(*(writer.store(p.StoreTarget(target)) for target in range(1, 20)))
    assert load_target(settings) == 19
    assert [path.name for path in state.iterdir()] == [FILE_NAME]


async def test_a_disk_that_fails_stops_nothing(state: Path) -> None:
    state.write_text("a file where the directory should be")
    with capture_logs() as logs:
        await StateWriter(settings_with(state)).store(p.StoreTarget(3))
    assert [(line["event"], line["log_level"]) for line in logs] == [("target_not_stored", "error")]


def test_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    run = tmp_path / "run"
    assert load_settings({"runtime_dir": run}).effective_state_dir == run / "state"
    assert load_settings({"runtime_dir": run, "device": "cuda"}).effective_state_dir == tmp_path / "home/elastic-daemon"
    assert load_settings({"runtime_dir": run, "state_dir": tmp_path / "s"}).effective_state_dir == tmp_path / "s"
