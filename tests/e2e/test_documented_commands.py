"""The commands of README and docs, as they stand there, on a real deployment."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from elastic_daemon.config import BUNDLED_MODEL
from tests.documented import ENDLESS, RUN, WATCHDOGS
from tests.documents import ROOT
from tests.e2e.cluster import Cluster
from tests.tools import have, require
from watchdog.simulator import create
from watchdog.status import FILE_NAME as STATUS_NAME

pytestmark = pytest.mark.e2e

URL = "http://127.0.0.1:8000"
SMALL_DRILL = "--streams 2 --tokens 40"
"""All but the plain one: what they do differently takes no longer runs."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of its own: the commands change it."""
    with Cluster(tmp_path_factory.mktemp("doc") / "run", env={"ELASTIC_RESTORE": "auto"}) as running:
        yield running


class Desk:
    """Where a reader sits: with a model, settings, and the folders that a shell completes from."""

    def __init__(self, home: Path, cluster: Cluster) -> None:
        self.home, self._cluster = home, cluster
        self._gpus = [row["gpu"] for row in cluster.health()["ranks"]]
        (home / "model").symlink_to(BUNDLED_MODEL)
        completions = ".local/share/bash-completion/completions", ".zfunc", ".config/fish/completions"
        for folder in (*completions, "elastic-daemon"):
            (home / folder).mkdir(parents=True)
        (home / "elastic-daemon.toml").write_text("survive_losses = 2\n")
        (home / "elastic-daemon" / "signals.toml").write_text('version = 1\n[xid.79]\nclass = "suspect"\n')

    def typed(self, line: str) -> str:
        """`line` with the addresses, GPUs and files that are here; without jq where there is none."""
        for pattern, own in (
            (r"http://(127\.0\.0\.1|10\.0\.0\.5):8000", self._cluster.url),
            (r"GPU-5d0a1f6c\S*", self._gpus[2]),
            (r"GPU-1c5bf4a2\S*", self._gpus[1]),
            (r"/run/elastic-daemon", str(self._cluster.runtime_dir)),
            (r"/etc/", f"{self.home}/"),
            (r"=…", "=key"),
            (r"scale 6", "scale 4"),
            (r"--streams 32( --tokens 500 --at 2s)?", lambda found: SMALL_DRILL + (" --at 0.1s" if found[1] else "")),
            (r"--json > drill.json", f"--json {SMALL_DRILL} > drill.json"),
        ):
            line = re.sub(pattern, own, line)
        return line if " | jq" not in line or have("jq") else line.partition(" | jq")[0]

    def environment(self, runtime_dir: Path | None = None) -> dict[str, str]:
        path = f"{ROOT / '.venv' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PATH": path, "HOME": str(self.home), "TERM": "xterm"}
        own |= {"RUNTIME_DIRECTORY": str(runtime_dir or self._cluster.runtime_dir)}
        return {**os.environ, **own, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="module")
def desk(deployment: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), deployment)


@pytest.mark.parametrize("number", range(len(RUN)), ids=lambda number: f"{number}-{RUN[number][:50]}")
def test_it_runs(number: int, deployment: Cluster, desk: Desk) -> None:
    """In the order of the list. Whatever changes the group has it whole again before the next one."""
    line = RUN[number]
    if line.startswith(("curl", "openssl")):
        require(line.split()[0])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", desk.typed(line)],
        cwd=desk.home,
        env=desk.environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r'"error":\s*\{', done.stdout), done.stdout  # curl ends well whatever the status
    if re.search("drill|release 2|no-wait", line):
        deployment.wait_for(lambda: deployment.health()["status"] == "ok", 40)


@pytest.mark.parametrize("line", ENDLESS)
def test_it_goes_on_until_ctrl_c(line: str, deployment: Cluster, desk: Desk) -> None:
    """On a terminal, which has to show something, or in a file."""
    if line.startswith("watch "):
        require("watch")
    if "rank_excluded" in line and not deployment.events("rank_excluded"):
        deployment.kill(3)
    (file := desk.home / "status.jsonl").write_text("")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 250))
    process = subprocess.Popen(
        ["bash", "-c", desk.typed(line)],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.STDOUT,
        cwd=desk.home,
        env=desk.environment(),
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # who runs the tests may ignore it
    )
    os.close(theirs)
    shown = bytearray()

    def said() -> str:
        if select.select([ours], [], [], 0)[0]:
            shown.extend(os.read(ours, 65536))
        return file.read_text() if ">>" in line else shown.decode(errors="replace")

    try:
        deployment.wait_for(lambda: ENDLESS[line] in said(), 20)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) in (130, -signal.SIGINT, 0), shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("line", WATCHDOGS)
def test_a_watchdog_runs_until_ctrl_c(line: str, deployment: Cluster, desk: Desk, socket_dir: Path) -> None:
    """Of GPUs that nobody uses, and all of them simulated."""
    create(socket_dir, 2).close()
    command = re.sub(r"( --simulated)?$", " --simulated", desk.typed(line))
    with subprocess.Popen(command.split(), cwd=desk.home, env=desk.environment(socket_dir)) as process:
        deployment.wait_for((socket_dir / STATUS_NAME).exists, 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_the_readme_s_python(deployment: Cluster) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code.replace(URL, deployment.url)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["7", "15", "42", "93"]
