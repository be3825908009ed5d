"""The units, as `make install` renders them, before systemd's own judges; and what must hold between them and the code.

Nothing here starts anything: no systemd runs these units in the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from elastic_daemon.config import Device, Settings
from elastic_daemon.errors import ConfigError
from elastic_daemon.processes.service_manager import END_S
from elastic_daemon.settings.settings_table import reloadable
from elastic_daemon.settings.sources import CONFIG_VARIABLE, load_settings
from tests.tools import require
from watchdog import ras
from watchdog.journal import SOCKET
from watchdog.service import WATCH_S

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("elastic-daemon.service", "elastic-watchdog.service")
MAX_EXPOSURE = 2.5
KEY_FILES = {"api_key_file": "api-keys", "admin_key_file": "admin-key"}
CONFIGURATION = ("elastic-daemon.toml", "secrets.env", *KEY_FILES.values())
"""What an operator writes to: it outlives upgrades, and the end of the service too."""

unit = pytest.mark.parametrize("name", UNITS)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with everything that `make install` puts there, its programs being those of an environment that exists.

    `systemd-analyze verify` looks for the programs of a unit, so the prefix is where the units say.
    """
    prefix = tmp_path_factory.mktemp("prefix")
    make("install", prefix, environment(tmp_path_factory.mktemp("venv")))
    return prefix


def environment(venv: Path) -> Path:
    """What `install` takes for an environment that has the daemon. Its programs say how they were called."""
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    return venv


def make(target: str, prefix: Path, venv: Path, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {"PREFIX": str(prefix), "SYSCONFDIR": str(prefix / "etc"), "VENV": str(venv), **more}
    return subprocess.run(
        ["make", "--no-print-directory", target, *(f"{name}={value}" for name, value in variables.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def path_of(installed: Path, name: str) -> Path:
    return installed / "lib" / "systemd" / "system" / name


def setting(installed: Path, name: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", path_of(installed, name).read_text(), re.MULTILINE)


def seconds(span: str) -> int:
    match = re.fullmatch(r"(\d+)(s|min|h)", span)
    assert match is not None, span
    return int(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def test_systemd_finds_nothing_to_say_about_the_units(installed: Path) -> None:
    require("systemd-analyze")
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(path_of(installed, name)) for name in UNITS)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{path_of(installed, UNITS[0]).parent}:"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


@unit
def test_exposure_is_low(name: str, installed: Path) -> None:
    require("systemd-analyze")
    run = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path_of(installed, name))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = re.search(rf"Overall exposure level for {re.escape(name)}: ([\d.]+)", run.stdout)
    assert found is not None, run.stdout
    assert float(found[1]) <= MAX_EXPOSURE, run.stdout


@unit
def test_nothing_is_left_to_fill_in(name: str, installed: Path) -> None:
    assert not re.findall(r"^[^#].*@[A-Z]+@", path_of(installed, name).read_text(), re.MULTILINE)


@unit
def test_the_program_of_a_unit_is_installed(name: str, installed: Path) -> None:
    [command] = setting(installed, name, "ExecStart")
    assert os.access(command.split()[0], os.X_OK)


@pytest.mark.parametrize(
    ("program", "module"), [("elastic-daemon", "elastic_daemon.cli"), ("elastic-watchdog", "watchdog.cli")]
)
def test_a_program_runs_in_the_environment_and_what_completes_it_is_installed(
    program: str, module: str, installed: Path
) -> None:
    """-I: neither the user's packages nor the directory that it is called in get in the way."""
    run = subprocess.run([installed / "bin" / program, "run", "two words"], capture_output=True, text=True, check=True)
    assert run.stdout == f"-I -m {module} run two words\n"
    for shell, path in {
        "bash": f"bash-completion/completions/{program}",
        "zsh": f"zsh/site-functions/_{program}",
        "fish": f"fish/vendor_completions.d/{program}.fish",
    }.items():
        assert (installed / "share" / path).read_text() == f"-I -m {module} completion {shell}\n"


@unit
def test_the_page_of_a_unit_is_installed(name: str, installed: Path) -> None:
    [page] = setting(installed, name, "Documentation")
    assert Path(page.removeprefix("file://")).is_file()


def test_links_between_installed_pages_hold(installed: Path) -> None:
    home = installed / "share" / "doc" / "elastic-daemon"
    pages = list(home.rglob("*.md"))
    assert {page.name for page in pages} == {"README.md", *(page.name for page in (ROOT / "docs").glob("*.md"))}
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text())]
    assert len(links) > 50
    assert not [(page, link) for page, link in links if "://" not in link and not (page.parent / link).exists()]
    assert (home / "deploy" / "prometheus" / "alerts.yml").is_file()


@unit
@pytest.mark.parametrize("key", ["RuntimeDirectory", "StateDirectory", "User", "Group"])
def test_both_units_meet_in_one_place(name: str, key: str, installed: Path) -> None:
    assert setting(installed, name, key) == ["elastic-daemon"]


@unit
def test_the_end_of_one_unit_does_not_take_the_directory_of_both(name: str, installed: Path) -> None:
    assert setting(installed, name, "RuntimeDirectoryPreserve") == ["yes"]


@unit
def test_a_service_speaks_for_itself_and_leaves_a_clean_cgroup(name: str, installed: Path) -> None:
    for key, value in (("Type", "notify"), ("NotifyAccess", "main"), ("KillMode", "mixed"), ("OOMPolicy", "continue")):
        assert setting(installed, name, key) == [value]


@unit
def test_an_error_in_the_configuration_is_not_tried_again(name: str, installed: Path) -> None:
    assert setting(installed, name, "RestartPreventExitStatus") == ["2"]


def test_the_watchdog_is_another_unit_and_serving_does_not_hang_on_it(installed: Path) -> None:
    [command] = setting(installed, UNITS[0], "ExecStart")
    assert command.endswith("serve --watchdog external")
    assert "elastic-watchdog.service" in setting(installed, UNITS[0], "Wants")[0].split()
    assert not setting(installed, UNITS[0], "Requires")


def test_the_watchdog_reaches_nccl_s_ras_and_nothing_beyond_loopback(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an address family or in a network of its own, the second source of evidence would be silent."""
    monkeypatch.delenv("NCCL_RAS_ADDR", raising=False)
    assert ras.address()[0] == "localhost", "which is 127.0.0.1, ::1 or both"
    [families] = setting(installed, UNITS[1], "RestrictAddressFamilies")
    assert set(families.split()) == {"AF_UNIX", "AF_INET", "AF_INET6"}
    assert not setting(installed, UNITS[1], "PrivateNetwork")
    assert setting(installed, UNITS[1], "IPAddressAllow") == ["localhost"]
    assert setting(installed, UNITS[1], "IPAddressDeny") == ["any"]


@pytest.mark.parametrize("name", UNITS)
def test_the_journals_socket_can_be_reached(installed: Path, name: str) -> None:
    """Else all events would be lines of text."""
    [families] = setting(installed, name, "RestrictAddressFamilies")
    assert "AF_UNIX" in families.split()
    calls = setting(installed, name, "SystemCallFilter")
    assert calls[0].split()[0] == "@system-service" and "~@privileged" in calls, "sendto is in the first only"
    assert SOCKET.startswith("/run/")
    for hiding in ("InaccessiblePaths", "TemporaryFileSystem", "RootDirectory", "RootImage", "StandardError"):
        assert not setting(installed, name, hiding)


def test_ranks_are_watched_from_their_first_step_on_devices_that_are_up(installed: Path) -> None:
    drivers = {"nvidia-persistenced.service", "nvidia-fabricmanager.service"}
    for name, after in zip(UNITS, ({"network-online.target", "elastic-watchdog.service"}, set[str]()), strict=True):
        [line] = setting(installed, name, "After")
        assert set(line.split()) == drivers | after
    [wants] = setting(installed, UNITS[0], "Wants")
    assert "network-online.target" in wants.split(), "After= alone starts nothing"


def test_starts_are_limited_where_a_restart_does_not_help(installed: Path) -> None:
    """Starts that each use up their time must fit into the interval: else the limit would never be reached."""
    daemon, watchdog = (
        (seconds(*setting(installed, name, "StartLimitIntervalSec")), int(*setting(installed, name, "StartLimitBurst")))
        for name in UNITS
    )
    assert daemon == (7200, 5)
    assert daemon[1] * Settings().start_timeout < daemon[0]
    assert watchdog == (600, 30)
    [pause] = setting(installed, UNITS[1], "RestartSec")
    assert watchdog[1] * seconds(pause) < watchdog[0], "else it would be tried without end"


def test_loops_turn_often_enough_for_their_pings(installed: Path) -> None:
    [daemon], [watchdog] = (setting(installed, name, "WatchdogSec") for name in UNITS)
    assert seconds(daemon) >= 20
    assert seconds(watchdog) >= 20 * WATCH_S


def test_a_stop_lasts_as_long_as_the_example_lets_requests_finish(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("ELASTIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(CONFIG_VARIABLE, str(installed / "etc" / "elastic-daemon" / "elastic-daemon.toml"))
    settings = load_settings({})
    assert settings.device is Device.CUDA
    [limit] = setting(installed, UNITS[0], "TimeoutStopSec")
    assert settings.shutdown_timeout + END_S <= seconds(limit)


def test_the_example_is_where_the_unit_looks(installed: Path) -> None:
    environment = setting(installed, UNITS[0], "Environment")
    assert f"{CONFIG_VARIABLE}={installed}/etc/elastic-daemon/elastic-daemon.toml" in environment


def test_keys_have_files_of_their_own_which_a_reload_reads(
    installed: Path, tmp_path: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    """With the two lines of the example in force. Variables, as in secrets.env, would wait for a restart."""
    conf = installed / "etc" / "elastic-daemon"
    text = (conf / "elastic-daemon.toml").read_text()
    for name, key in KEY_FILES.items():
        assert (conf / key).stat().st_mode & 0o777 == 0o640
        assert f'#{name} = "{conf / key}"' in text
        assert name in reloadable()
        text = text.replace(f"#{name} = ", f"{name} = ").replace(str(conf / key), str(tmp_path / key))
        (tmp_path / key).write_text((conf / key).read_text())
    (config := tmp_path / "elastic-daemon.toml").write_text(text)
    clean_environment.setenv(CONFIG_VARIABLE, str(config))
    with pytest.raises(ConfigError, match="api-keys has no key in it"):
        load_settings({})
    for key in KEY_FILES.values():
        with (tmp_path / key).open("a") as file:
            file.write(f"of-{key}\n")
    access = load_settings({}).access
    assert (access.keys, access.admin_key) == (("of-api-keys",), "of-admin-key")
    assert "ELASTIC_" not in (conf / "secrets.env").read_text()


def test_the_user_and_its_groups_are_made(installed: Path) -> None:
    lines = (installed / "lib" / "sysusers.d" / "elastic-daemon.conf").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'u elastic-daemon - "Elastic daemon" /var/lib/elastic-daemon -',
        "g video - -",
        "g render - -",
        "m elastic-daemon video",
        "m elastic-daemon render",
    ]


def test_directories_are_the_service_s_alone_and_keys_are_root_s_for_it_to_read(installed: Path) -> None:
    lines = (installed / "lib" / "tmpfiles.d" / "elastic-daemon.conf").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        *(
            f"d /{place}/elastic-daemon 0700 elastic-daemon elastic-daemon -"
            for place in ("run", "var/lib", "var/cache")
        ),
        *(f"z {installed}/etc/elastic-daemon/{key} 0640 root elastic-daemon -" for key in KEY_FILES.values()),
    ]


def test_an_install_is_taken_away_again_but_not_the_configuration(tmp_path: Path, installed: Path) -> None:
    """Into DESTDIR, as packagers do: nothing of the machine itself is touched, and paths do not name DESTDIR."""
    stage, venv = tmp_path / "stage", environment(tmp_path / "venv")
    make("install", Path("/opt/elastic"), venv, DESTDIR=str(stage), SYSCONFDIR="/etc")
    files = {str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()}
    below = "opt/elastic"
    configuration = {f"etc/elastic-daemon/{name}" for name in CONFIGURATION}
    assert files >= configuration | {
        f"{below}/bin/elastic-daemon",
        f"{below}/bin/elastic-watchdog",
        f"{below}/lib/systemd/system/elastic-daemon.service",
        f"{below}/lib/systemd/system/elastic-watchdog.service",
        f"{below}/lib/sysusers.d/elastic-daemon.conf",
        f"{below}/lib/tmpfiles.d/elastic-daemon.conf",
    }
    assert not [file for file in files if str(stage).encode() in (stage / file).read_bytes()]
    secrets = stage / "etc/elastic-daemon/secrets.env"
    assert secrets.stat().st_mode & 0o777 == 0o600

    for file in configuration:
        (stage / file).write_text("port = 1\n")
    (stale := stage / below / "share/doc/elastic-daemon/docs/of-another-version.md").touch()
    make("install", Path("/opt/elastic"), venv, DESTDIR=str(stage), SYSCONFDIR="/etc")
    assert {(stage / file).read_text() for file in configuration} == {"port = 1\n"}, "an upgrade undoes nothing"
    assert not stale.exists()

    make("uninstall", Path("/opt/elastic"), venv, DESTDIR=str(stage), SYSCONFDIR="/etc")
    left = {str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()}
    assert left == configuration
