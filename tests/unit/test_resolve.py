"""Which value counts, where it was given, and what is said of a bad one."""

from __future__ import annotations

import json
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.config import BUNDLED_FLAGS, Settings
from elastic_daemon.errors import ConfigError
from elastic_daemon.settings.resolve import (
    Given,
    as_flags,
    from_environment,
    from_flags,
    from_toml,
    key_lines,
    resolve,
    with_places,
)
from elastic_daemon.settings.settings_table import MASK, all_settings, mask_flags, shown, to_json, to_toml, toml_value
from elastic_daemon.settings.sources import Sources
from tests.unit.command_line import run

KNOWN = Settings.model_fields.keys() - {"vllm"}

NAMES = st.sampled_from(["port", "host", "max_ranks", "hold_timeout"])
LAYER = st.dictionaries(NAMES, st.integers().map(lambda value: Given(value, f"at {value}", "")))


@given(st.lists(LAYER, max_size=4))
def test_the_first_layer_that_has_a_name_wins(layers: list[dict[str, Given]]) -> None:
    found = resolve(layers)
    assert found.keys() == {name for layer in layers for name in layer}
    for name, winner in found.items():
        assert winner == next(layer[name] for layer in layers if name in layer)


@given(st.lists(LAYER, max_size=4), LAYER, st.integers(0, 4))
def test_a_layer_below_changes_nothing_above(layers: list[dict[str, Given]], more: dict[str, Given], at: int) -> None:
    before = resolve(layers[:at])
    after = resolve([*layers[:at], more])
    assert {name: after[name] for name in before} == before


PORTS = st.none() | st.integers(0, 65535)


@given(PORTS, PORTS, PORTS)
def test_flags_over_environment_over_file(
    tmp_path_factory: pytest.TempPathFactory, flag: int | None, variable: int | None, line: int | None
) -> None:
    file = tmp_path_factory.mktemp("c") / "c.toml"
    file.write_text("" if line is None else f"\nport = {line}\n")
    environ = {"ELASTIC_CONFIG": str(file)} | ({} if variable is None else {"ELASTIC_PORT": str(variable)})
    loaded = Sources({} if flag is None else {"port": flag}, environ).load()
    places = {"--port": flag, "ELASTIC_PORT": variable, f"{file}:2": line, "default": 8000}
    origin = next(place for place, value in places.items() if value is not None)
    assert loaded.settings.port == places[origin]
    (row,) = [row for row in shown(loaded) if row.name == "port"]
    assert (row.value, row.origin) == (places[origin], origin)


def test_the_flag_for_the_file_wins_over_the_variable(tmp_path: Path) -> None:
    one, two = tmp_path / "1.toml", tmp_path / "2.toml"
    one.write_text("port = 1")
    two.write_text("port = 2")
    assert Sources({"config": str(one)}, {"ELASTIC_CONFIG": str(two)}).load().settings.port == 1
    with pytest.raises(ConfigError, match=r"nowhere: .*\(--config names it\)"):
        Sources({"config": str(tmp_path / "nowhere")}, {"ELASTIC_CONFIG": str(two)}).load()


TEXT = '''# a comment
port = 1

watchdog_flags = [
    "[vllm]",   # no header
    "port = 3",
]
model = """
port = 4
[vllm]
"""
 "max-ranks" = 5

[vllm] # flags
max_model_len = 7
"hf-token" = \'\'\'
x\'\'\'
eplb_config = { a = 1,  b = 2 }
'''


def test_lines_of_keys() -> None:
    lines = {".".join(key): line for key, line in key_lines(TEXT).items()}
    assert lines == {
        "port": 2,
        "watchdog_flags": 4,
        "model": 8,
        "max-ranks": 12,
        "vllm": 14,
        "vllm.max_model_len": 15,
        "vllm.hf-token": 16,
        "vllm.eplb_config": 18,
    }


KEYS = st.text(string.ascii_lowercase + "_-", min_size=1, max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.dictionaries(KEYS, VALUES, max_size=5), st.data())
def test_each_key_is_found_on_its_line(plain: dict[str, Any], table: dict[str, Any], data: st.DataObject) -> None:
    plain.pop("vllm", None)
    rows, expected = [], {}
    for header, entries in (((), plain), (("vllm",), table)):
        if header:
            rows.append("[vllm]")
            expected[header] = len(rows)
        for key, value in entries.items():
            rows += data.draw(st.lists(st.sampled_from(["", "# port = 1", "   "]), max_size=2))
            rows.append(f"{key} = {toml_value(value)}")
            expected[(*header, key)] = len(rows)
    text = "\n".join(rows)
    assert tomllib.loads(text) == {**plain, "vllm": table}
    found = key_lines(text)
    assert {key: found[key] for key in expected} == expected


def problem(text: str, **environ: str) -> str:
    """What is said of a file, without its path."""
    with pytest.raises(ConfigError) as error:
        from_toml(text, "c.toml", KNOWN)
    return str(error.value)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    assert problem("\nprot = 1") == "c.toml:2: prot: no such setting; did you mean port?"
    assert problem("hold-timeuot = 1").endswith("did you mean hold_timeout?")
    assert "[vllm]" in problem("max_model_len = 1") and "--max-model-len" in problem("max_model_len = 1")
    with pytest.raises(ConfigError, match=r"^ELASTIC_PROT: no such setting; did you mean ELASTIC_PORT\?"):
        from_environment({"ELASTIC_PROT": "1"}, KNOWN, ())
    with pytest.raises(ConfigError, match=r"^--prot: no such setting; did you mean --port\?"):
        from_flags({"prot": 1}, KNOWN)


def test_variables_of_others_are_left_alone() -> None:
    others = {"ELASTIC_APM_SERVER_URL": "http://x", "ELASTIC_CLOUD_ID": "y", "PORT": "3", "elastic_port": "4"}
    assert from_environment({**others, "ELASTIC_FAULT_LINKS": "{}"}, KNOWN, {"ELASTIC_FAULT_LINKS"}) == {}


def test_a_name_is_given_once_however_it_is_spelt() -> None:
    assert problem("max-ranks = 4\nmax_ranks = 5") == "c.toml:2: max_ranks: given twice, first at c.toml:1"
    assert from_toml("max-ranks = 4", "c.toml", KNOWN)["max_ranks"] == Given(4, "c.toml:1", "c.toml:1: max-ranks")


def test_what_the_daemon_reads_is_not_for_vllm() -> None:
    assert problem("[vllm]\nport = 3") == (
        "c.toml:2: vllm.port: the daemon reads this one itself: give it above [vllm]"
    )
    assert problem("vllm = 3").startswith("c.toml:1: vllm: expected a table")


def test_the_table_of_vllm_comes_before_flags_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[vllm]\nmax-model-len = 64\ndisable-log-stats = true\nserved-model-name = ["a", "b"]\n')
    loaded = Sources({"config": file, "engine_flags": ("--max-model-len", "32")}, {}).load()
    table = ("--max-model-len=64", "--disable-log-stats", "--served-model-name", "a", "b")
    assert loaded.settings.vllm_flags[-7:] == (*table, "--max-model-len", "32")
    assert loaded.settings.vllm_flags[-9:-7] == BUNDLED_FLAGS[-2:]
    said = with_places("--max-model-len '64' is not supported", loaded.given)
    assert said == f"--max-model-len '64' is not supported ({file}:2)"
    assert with_places("--max-model is not", loaded.given) == "--max-model is not"
    assert with_places("unrecognized arguments: --max-model-len=64", loaded.given).endswith(f"({file}:2)")


def test_values_as_flags() -> None:
    table = {"a_b": 1, "c": False, "d": {"x": [1]}, "e": 0.5, "f": "-x y", "g": [True, 2]}
    assert as_flags(table) == ("--a-b=1", "--no-c", '--d={"x": [1]}', "--e=0.5", "--f=-x y", "--g", "true", "2")


SECRET = "s3cret"


def test_secrets_are_masked(tmp_path: Path, clean_environment: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'admin_key = "{SECRET}"\n[vllm]\nhf-token = "{SECRET}"\n')
    clean_environment.setenv("ELASTIC_API_KEY", f"{SECRET}1,{SECRET}2")
    arguments = ("--config", str(file), "--port", "7", f"--hf-token={SECRET}", "--hf-token", SECRET)
    for command in (("config", *arguments), ("config", "--json", *arguments), ("serve", *arguments, "--print-config")):
        assert run(*command) == 0
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        assert MASK in said.out
    assert run("config", "--json", *arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["port"] == {"value": 7, "from": "--port"}
    assert told["api_key"] == {"value": [MASK, MASK], "from": "ELASTIC_API_KEY"}
    assert told["admin_key"] == {"value": MASK, "from": f"{file}:1"}
    assert told["vllm.hf_token"] == {"value": MASK, "from": f"{file}:3"}
    assert told["host"] == {"value": "127.0.0.1", "from": "default"}


@pytest.mark.parametrize(
    "text", [f"admin_key = '{SECRET} x'", f"admin_key = ['{SECRET}']", f"api_key = {{a='{SECRET}'}}"]
)
def test_a_bad_secret_is_not_shown(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch, capsys: Any, text: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    assert run("config", "--config", str(file)) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert f"{file}:1: a" in said.err


@pytest.mark.parametrize("setting", ["engine_flags", "watchdog_flags"])
@pytest.mark.parametrize(
    "value",
    [f"""'--hf-token {SECRET} "'""", f"['--hf-token', '{SECRET}', 3]", f"{{a='{SECRET}'}}", f"[['{SECRET}']]"],
)
def test_flags_that_cannot_be_read_are_not_shown(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch, capsys: Any, setting: str, value: str
) -> None:
    """A token may be among them."""
    file = tmp_path / "c.toml"
    file.write_text(f"{setting} = {value}")
    assert run("config", "--config", str(file)) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert f"{file}:1: {setting}: " in said.err
    if value.startswith("'"):
        clean_environment.setenv(f"ELASTIC_{setting.upper()}", value.strip("'"))
        assert run("config") == 2
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        assert f"ELASTIC_{setting.upper()}: No closing quotation" in said.err


def test_masked_flags() -> None:
    assert mask_flags(["--hf-token", "x", "--y", "--hf_token=z"]) == ["--hf-token", MASK, "--y", f"--hf_token={MASK}"]
    assert mask_flags(["--", "x", "--hf-tokens", "y", "-h", "z"]) == ["--", "x", "--hf-tokens", "y", "-h", "z"]


@pytest.mark.parametrize("flag", ["--hf-tok", "--hf_toke", "--hf-t", "--api-k", "--hf"])
def test_abbreviations_of_secret_flags_are_masked(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch, capsys: Any, flag: str
) -> None:
    """vLLM's parser takes them."""
    (file := tmp_path / "c.toml").write_text(f'[vllm]\n{flag.removeprefix("--")} = "{SECRET}"\n')
    for command in (
        ("config", flag, SECRET),
        ("config", f"{flag}={SECRET}"),
        ("config", "--json", "--config", str(file)),
        ("serve", flag, SECRET, "--print-config"),
    ):
        assert run(*command) == 0
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err and MASK in said.out


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "port": st.integers(0, 65535),
            "hold_timeout": st.floats(0, 1e6),
            "model": st.text(st.characters(codec="utf-8"), min_size=1, max_size=9),
            "restore": st.sampled_from(["auto", "off"]),
            "reset_target": st.booleans(),
            "watchdog_flags": st.lists(st.text(st.characters(codec="utf-8"), max_size=4), max_size=3),
        },
    )
)
def test_what_is_shown_is_a_file_that_says_the_same(values: dict[str, Any]) -> None:
    loaded = Sources(values, {}).load()
    text = to_toml(shown(loaded))
    again = Sources({name: it.value for name, it in from_toml(text, "c.toml", KNOWN).items()}, {}).load()
    assert again.settings == loaded.settings
    assert json.loads(to_json(shown(loaded)))["port"]["value"] == loaded.settings.port


def test_the_list_of_settings() -> None:
    table = {info.name: info for info in all_settings()}
    assert table.keys() == Settings.model_fields.keys()
    port = table["port"]
    assert (port.flag, port.variable, port.default) == ("--port", "ELASTIC_PORT", "8000")
    assert port.type == "whole number (≥ 0, ≤ 65535)"
    assert {name for name, info in table.items() if info.secret} == {"api_key", "admin_key"}
    assert table["restore"].type == "auto | off"
    for info in table.values():
        assert info.help and not info.help.endswith("."), info.name
