"""Settings: flags over environment over file, and errors that name the setting."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from elastic_daemon.config import BUNDLED_MODEL, BUNDLED_NAME, Device, admin_header, default_runtime_dir
from elastic_daemon.errors import ConfigError
from elastic_daemon.settings.sources import CONFIG_VARIABLE, load_settings

pytestmark = pytest.mark.usefixtures("clean_environment")


def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    path = tmp_path / "elastic.toml"
    path.write_text(text)
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    return path


def test_defaults_serve_the_bundled_model() -> None:
    settings = load_settings({})
    assert settings.bundled
    assert (settings.data_parallel_size, settings.device, settings.losses_to_survive) == (4, Device.CPU, 2)
    assert (settings.host, settings.port, settings.hold_timeout) == ("127.0.0.1", 8000, 60.0)
    flags = settings.vllm_flags
    assert flags[flags.index("--model") + 1] == str(BUNDLED_MODEL)
    assert flags[flags.index("--served-model-name") + 1] == BUNDLED_NAME
    assert flags[flags.index("--dtype") + 1] == "float32"


def test_a_model_of_ones_own_gets_none_of_the_bundled_flags() -> None:
    settings = load_settings({"model": "org/model", "engine_flags": ("--max-model-len", "64")})
    assert not settings.bundled
    assert settings.vllm_flags == ("--model", "org/model", "--max-model-len", "64")
    assert settings.losses_to_survive == 1


def test_flags_of_the_user_come_last_and_win() -> None:
    flags = load_settings({"engine_flags": ("--dtype", "bfloat16")}).vllm_flags
    assert flags[-2:] == ("--dtype", "bfloat16")
    assert flags.count("--dtype") == 2


@pytest.mark.parametrize(("ranks", "survive"), [(1, 0), (2, 1), (3, 2), (8, 2)])
def test_no_more_losses_survived_than_ranks_can_be_lost(ranks: int, survive: int) -> None:
    assert load_settings({"data_parallel_size": ranks}).losses_to_survive == survive


def test_given_losses_are_kept_as_given() -> None:
    assert load_settings({"data_parallel_size": 2, "survive_losses": 0}).losses_to_survive == 0


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file(tmp_path, monkeypatch, "port = 1001\nhost = '0.0.0.0'\ndata_parallel_size = 3\n")
    monkeypatch.setenv("ELASTIC_PORT", "1002")
    monkeypatch.setenv("ELASTIC_HOST", "::1")
    settings = load_settings({"port": 1003})
    assert (settings.port, settings.host, settings.data_parallel_size) == (1003, "::1", 3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data_parallel_size", 0),
        ("data_parallel_size", "four"),
        ("port", 65536),
        ("hold_timeout", -1),
        ("start_timeout", 0),
        ("device", "tpu"),
        ("survive_losses", -1),
    ],
)
def test_a_bad_flag_is_named_with_its_value(setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings({setting: value})
    text = str(error.value)
    assert text.startswith(f"--{setting.replace('_', '-')}: ")
    assert repr(value) in text
    assert "\n" not in text


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_PORT", "http")
    with pytest.raises(ConfigError, match=r"^ELASTIC_PORT: .*'http'"):
        load_settings({})


def test_a_bad_value_in_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file(tmp_path, monkeypatch, "hold_timeout = 'long'\n")
    with pytest.raises(ConfigError, match=r"elastic\.toml:1: hold_timeout: .*'long'"):
        load_settings({})


def test_an_unknown_setting_in_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file(tmp_path, monkeypatch, "holdtimeout = 3\n")
    with pytest.raises(ConfigError, match="holdtimeout"):
        load_settings({})


def test_a_file_that_is_not_toml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_file(tmp_path, monkeypatch, "port = = 3\n")
    with pytest.raises(ConfigError) as error:
        load_settings({})
    assert str(error.value).startswith(f"{path}: ")
    assert "line 1" in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_settings({})


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: Is a directory"):
        load_settings({})


def test_no_file_is_read_where_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    assert load_settings({}).port == 8000


def test_settings_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_runtime_dir().name.startswith("elastic-daemon-"), "one of this user's under the temporary one"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_runtime_dir() == Path("/run/user/1000/elastic-daemon")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/elastic-daemon:/run/other")
    assert default_runtime_dir() == Path("/run/elastic-daemon")


def test_keys_and_engine_flags_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_API_KEY", "one,two")
    monkeypatch.setenv("ELASTIC_ENGINE_FLAGS", "--max-model-len 512 --served-model-name 'my model'")
    settings = load_settings({})
    assert settings.api_key == ("one", "two")
    assert settings.engine_flags == ("--max-model-len", "512", "--served-model-name", "my model")
    assert load_settings({"api_key": ["three"]}).api_key == ("three",)


def test_flags_of_a_watchdog_that_others_start_are_refused_and_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, monkeypatch, 'port = 1\nwatchdog_flags = "--mode observe"\n')
    with pytest.raises(ConfigError) as error:
        load_settings({"watchdog": "external"})
    assert str(error.value).startswith(f"{path}:2: watchdog_flags: of no use with --watchdog external: ")
    assert "WATCHDOG_FLAGS in watchdog.env" in str(error.value)
    for mode in ("spawn", "off"):
        assert load_settings({"watchdog": mode}).watchdog_flags == ("--mode", "observe")
    path.write_text("watchdog = 'external'\n")
    assert load_settings({}).watchdog_flags == ()


def test_levels_that_a_library_has_added_are_none_of_ours() -> None:
    """Other processes of the daemon, which get the level, need not have loaded that library."""
    logging.addLevelName(5, "TRACE")  # as uvicorn does
    with pytest.raises(ConfigError, match="--log-level: expected debug, info, warning"):
        load_settings({"log_level": "trace"})
    assert load_settings({"log_level": "WARN"}).log_level == "warn"


def test_most_ranks_are_no_fewer_than_those_to_start_with() -> None:
    assert load_settings({"max_ranks": 4}).max_ranks == 4
    with pytest.raises(ConfigError, match=r"^--max-ranks: .*fewer than the 5 ranks"):
        load_settings({"data_parallel_size": 5, "max_ranks": 4})


def test_the_admin_key_reaches_the_rules_and_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_ADMIN_KEY", "top-secret")
    monkeypatch.setenv("ELASTIC_API_KEY", "less-secret")
    settings = load_settings({})
    assert (settings.access.admin_key, settings.access.keys) == ("top-secret", ("less-secret",))
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "top-secret" not in text
    assert "less-secret" not in repr(settings)


@pytest.mark.parametrize("key", ["", "two words", "ключ", "tab\t", 17])
def test_a_bad_admin_key_is_not_shown(key: object) -> None:
    with pytest.raises(ConfigError, match="--admin-key: ") as error:
        load_settings({"admin_key": key})
    assert not str(key) or str(key) not in str(error.value)


def test_an_empty_admin_key_does_not_open_what_it_should_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_ADMIN_KEY", "")
    with pytest.raises(ConfigError, match="ELASTIC_ADMIN_KEY: "):
        load_settings({})


def test_an_api_key_cannot_be_the_admin_key_too() -> None:
    with pytest.raises(ConfigError, match="must not be an API key") as error:
        load_settings({"admin_key": "the-same", "api_key": ["the-same"]})
    assert "the-same" not in str(error.value)


def test_what_our_commands_send(monkeypatch: pytest.MonkeyPatch) -> None:
    assert admin_header() == {}
    monkeypatch.setenv("ELASTIC_API_KEY", "one,two")
    assert admin_header() == {"Authorization": "Bearer one"}
    monkeypatch.setenv("ELASTIC_ADMIN_KEY", "admin")
    assert admin_header() == {"Authorization": "Bearer admin"}
