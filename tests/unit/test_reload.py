"""What a reload changes while the daemon serves, and what it leaves for a restart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.config import Settings
from elastic_daemon.errors import ConfigError
from elastic_daemon.settings.reload import Reloader, compare
from elastic_daemon.settings.settings_table import reloadable
from elastic_daemon.settings.sources import Sources
from elastic_daemon.settings.start_policy import with_settings
from elastic_daemon.telemetry.events import EventLog
from tests.unit.operator_plane import POLICY, OperatorPlane

OTHER = {
    "port": 9000,
    "hold_timeout": 7.0,
    "restore": "off",
    "respread": "off",
    "start_timeout": 11.0,
    "log_level": "debug",
    "api_key": ("one",),
    "admin_key": "two",
    "max_ranks": 9,
    "vllm": {"max_model_len": 64},
}


@given(st.sets(st.sampled_from(sorted(OTHER))), st.sets(st.sampled_from(sorted(OTHER))))
def test_every_difference_is_either_applied_or_named(before: set[str], after: set[str]) -> None:
    running, read = (Settings(**{name: OTHER[name] for name in names}) for names in (before, after))  # type: ignore[arg-type]
    change = compare(running, read)
    differing = before ^ after
    assert set(change.applied) == differing & reloadable()
    assert {name.partition(".")[0] for name in change.waiting} == differing - reloadable()
    for name in Settings.model_fields:
        assert getattr(change.settings, name) == getattr(read if name in reloadable() else running, name)
    assert compare(change.settings, read).applied == (), "the same file again changes nothing"


class Daemon:
    """Reloads from a file and keeps what it was told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = EventLog()
        self.settings = (sources := Sources({"config": path}, {})).load().settings
        self.told: list[tuple[str, ...]] = []
        self.steps: list[str] = []
        self.reloader = Reloader(sources, self.settings, self._adopt, self.events)
        self.reloader.around = self._around

    def _adopt(self, settings: Settings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.told.append(names)
        self.steps.append("adopted")

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        self.steps.append("reloading")
        yield
        self.steps.append("ready")

    def reload(self, text: str) -> dict[str, object]:
        self.path.write_text(text)
        self.reloader.reload()
        return self.events.since(0)[-1]


async def test_reloads(tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_text("hold_timeout = 5\nport = 1\n")
    daemon = Daemon(path)
    event = daemon.reload("hold_timeout = 6\nport = 2\n[vllm]\nmax-model-len = 3\n")
    assert event["event"] == "reloaded"
    assert event["applied"] == ["hold_timeout"] and event["values"] == {"hold_timeout": "6.0"}
    assert event["needs_restart"] == ["port", "vllm.max_model_len"]
    assert (daemon.settings.hold_timeout, daemon.settings.port) == (6.0, 1)
    assert daemon.steps == ["reloading", "adopted", "ready"]
    assert daemon.reload("hold_timeout = 6\nport = 2\n")["needs_restart"] == ["port"], "named again, as it still waits"


async def test_a_bad_file_changes_nothing_and_says_why(tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_text("hold_timeout = 5\n")
    daemon = Daemon(path)
    for text, reason in (
        ("hold_timeout = 6\nx = 1", ":2: x: no such"),
        ("hold_timeout = -6", ":1: "),
        ("= =", "line 1"),
    ):
        event = daemon.reload(text)
        assert event["event"] == "reload_failed" and reason in str(event["reason"])
    path.unlink()
    daemon.reloader.reload()
    assert "No such file" in str(daemon.events.since(0)[-1]["reason"])
    assert daemon.told == [] and daemon.settings.hold_timeout == 5
    assert daemon.steps == ["reloading", "ready"] * 4


async def test_flags_that_cannot_be_read_are_not_told(tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_text("hold_timeout = 5\n")
    daemon = Daemon(path)
    for setting in ("engine_flags", "watchdog_flags"):
        for value in ("""'--hf-token s3cret "'""", "['--hf-token', 's3cret', 3]", "{ hf-token = 's3cret' }"):
            event = daemon.reload(f"{setting} = {value}")
            assert event["event"] == "reload_failed" and "s3cret" not in str(event)
            assert str(event["reason"]).startswith(f"{path}:1: {setting}: ")


async def test_keys_are_read_anew_and_not_told(tmp_path: Path) -> None:
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text("# of the team\none\n\n  two\n")
    admin.write_text("boss\n")
    text = f"api-key = ['zero']\napi-key-file = '{keys}'\nadmin-key-file = '{admin}'\n"
    (path := tmp_path / "c.toml").write_text(text)
    daemon = Daemon(path)
    assert daemon.settings.access.keys == ("zero", "one", "two")
    assert daemon.settings.access.admin_key == "boss"
    keys.write_text("three\n")
    admin.write_text("chief\n")
    event = daemon.reload(text)
    assert event["applied"] == ["api_key", "admin_key"]
    assert not any(key in str(event) for key in ("three", "chief", "boss", "zero"))
    assert daemon.settings.access.keys == ("zero", "three")
    assert daemon.settings.access.admin_key == "chief"
    keys.write_text("\n")
    assert f"{path}:2: api-key-file: {keys} has no key in it" == daemon.reload(text)["reason"]
    assert daemon.settings.access.keys == ("zero", "three"), "an empty file must not open the daemon"


def test_bad_key_files(tmp_path: Path) -> None:
    (two := tmp_path / "two").write_text("a\nb\n")
    with pytest.raises(ConfigError, match="there is one admin key"):
        Sources({"admin_key_file": two}, {}).load()
    (tmp_path / "one").write_text("a")
    with pytest.raises(ConfigError, match="given once"):
        Sources({"admin_key_file": tmp_path / "one"}, {"ELASTIC_ADMIN_KEY": "b"}).load()
    with pytest.raises(ConfigError, match=r"^--api-key-file: .*nowhere cannot be read: No such file"):
        Sources({"api_key_file": tmp_path / "nowhere"}, {}).load()
    (tmp_path / "bad").write_text("sécret key\n")
    with pytest.raises(ConfigError, match="bad: expected printable") as error:
        Sources({"api_key_file": tmp_path / "bad"}, {}).load()
    assert "cret" not in str(error.value)


def test_exposed_keys_are_told_of(tmp_path: Path) -> None:
    (keys := tmp_path / "keys").write_text("one")
    keys.chmod(0o600)
    assert Sources({"api_key_file": keys}, {}).load().doubts == ()
    keys.chmod(0o644)
    assert Sources({"api_key_file": keys}, {}).load().doubts == (
        f"{keys}: others on this machine can read the keys in it: chmod 600",
    )
    keys.chmod(0o640)
    assert Sources({"api_key_file": keys}, {}).load().doubts, "its own user's file: 600 does"
    (doubt,) = Sources({"api_key": ["secret"]}, {}).load().doubts
    assert doubt.startswith("--api-key: others") and "secret" not in doubt


def test_keys_of_root_s_that_the_daemon_reads_through_its_group_are_not_exposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As deployed: 0640 root:elastic-daemon, so that a service cannot write its own keys."""
    (keys := tmp_path / "keys").write_text("one")
    monkeypatch.setattr(os, "geteuid", lambda: keys.stat().st_uid + 1)
    keys.chmod(0o640)
    assert Sources({"api_key_file": keys}, {}).load().doubts == ()
    keys.chmod(0o644)
    (doubt,) = Sources({"api_key_file": keys}, {}).load().doubts
    assert doubt.endswith("can read the keys in it: chmod 640, with a group that the daemon is in")


async def test_restoring_can_be_switched_on_while_it_serves() -> None:
    plane = OperatorPlane(with_settings(POLICY, Settings(restore="off")))  # type: ignore[arg-type]
    plane.lose(2)
    plane.pass_time(60)
    assert plane.active == [0, 1, 3]
    assert plane.controller is not None
    policy = with_settings(POLICY, Settings(restore="auto"))  # type: ignore[arg-type]
    plane.carry_out(plane.controller.adopt(policy, plane.now))
    plane.pass_time(60)
    assert plane.active == [0, 1, 2, 3]
