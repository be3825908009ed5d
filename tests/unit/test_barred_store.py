"""GPUs that are barred stay so over a restart of the daemon, and nothing in their file stops a start."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings
from elastic_daemon.settings.sources import load_settings
from elastic_daemon.state.barred_store import FILE_NAME, load_barred, store_barred
from elastic_daemon.state.state_writer import StateWriter
from elastic_daemon.state.target_store import load_target, store_target

pytestmark = pytest.mark.usefixtures("clean_environment")

BARRED = {"GPU-a": "rank 2 did not start on it in 3 attempts, the last: signal 9", "GPU-b": "neither did rank 1"}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def settings_with(state: Path) -> Settings:
    return load_settings({"state_dir": state})


def test_what_is_stored_is_loaded(state: Path) -> None:
    assert load_barred(settings_with(state)) == {}
    for barred in (BARRED, {}):
        store_barred(settings_with(state), barred)
        assert load_barred(settings_with(state)) == barred
    assert (state.stat().st_mode & 0o777, (state / FILE_NAME).stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"version": 2, "barred": {}}',
        '{"version": 1}',
        '{"version": 1, "barred": ["GPU-a"]}',
        '{"version": 1, "barred": {"GPU-a": null}}',
        '{"version": 1, "barred": {"GPU-a": ""}}',
        '{"version": 1, "barred": {"": "why"}}',
    ],
)
def test_a_file_that_cannot_be_read_is_put_aside(state: Path, text: str) -> None:
    state.mkdir()
    (state / FILE_NAME).write_text(text)
    with capture_logs() as logs:
        assert load_barred(settings_with(state)) == {}
    [line] = logs
    assert (line["event"], line["log_level"]) == ("barred_gpus_corrupt", "warning")
    [aside] = state.iterdir()
    assert (str(aside), aside.read_text()) == (line["moved_to"], text)


def test_wherever_a_file_is_torn_it_is_put_aside(state: Path) -> None:
    store_barred(settings_with(state), BARRED)
    whole = (state / FILE_NAME).read_bytes()
    for length in range(len(whole)):
        (state / FILE_NAME).write_bytes(whole[:length])
        assert load_barred(settings_with(state)) == {}
        assert not (state / FILE_NAME).exists()


def test_a_write_that_is_cut_off_leaves_what_was_there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_barred(settings_with(state), BARRED)

    def cut(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", cut)
    with pytest.raises(OSError, match="No space"):
        store_barred(settings_with(state), {})
    assert [path.name for path in state.iterdir()] == [FILE_NAME]
    assert load_barred(settings_with(state)) == BARRED


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.dictionaries(texts, texts))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_reason_says(tmp_path_factory: pytest.TempPathFactory, barred: dict[str, str]) -> None:
    directory = tmp_path_factory.mktemp("state")
    store_barred(settings_with(directory), barred)
    assert load_barred(settings_with(directory)) == barred


async def test_the_last_of_several_is_kept_beside_the_target(state: Path) -> None:
    writer = StateWriter(settings_with(state))
    orders: list[p.StoreBarred | p.StoreTarget]
    orders = [*(p.StoreBarred({f"GPU-{number}": "why"}) for number in range(9)), p.StoreTarget(3)]
    await asyncio.gather(*(writer.store(order) for order in orders))
    assert load_barred(settings_with(state)) == {"GPU-8": "why"}
    assert load_target(settings_with(state)) == 3
    assert json.loads((state / FILE_NAME).read_text())["version"] == 1


async def test_a_disk_that_fails_stops_nothing(state: Path) -> None:
    state.write_text("a file where the directory should be")
    with capture_logs() as logs:
        await StateWriter(settings_with(state)).store(p.StoreBarred(BARRED))
    assert [(line["event"], line["log_level"]) for line in logs] == [("barred_gpus_not_stored", "error")]


def test_the_target_has_a_file_of_its_own(state: Path) -> None:
    store_target(settings_with(state), 3)
    (state / FILE_NAME).write_text("{")
    assert (load_barred(settings_with(state)), load_target(settings_with(state))) == ({}, 3)
