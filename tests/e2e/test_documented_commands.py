"""The commands of README and docs, as they stand there, on a real deployment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_daemon.config import BUNDLED_MODEL
from tests.documents import ENDLESS, ROOT, RUN
from tests.e2e.cluster import Cluster
from tests.tools import have, require

pytestmark = pytest.mark.e2e

URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of its own: the commands change it."""
    with Cluster(tmp_path_factory.mktemp("doc") / "run", env={"ELASTIC_RESTORE": "auto"}) as running:
        yield running


@pytest.fixture(scope="module")
def desk(deployment: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader sits: with a model, and the folders that a shell completes from."""
    home = tmp_path_factory.mktemp("desk")
    (home / "model").symlink_to(BUNDLED_MODEL)
    for folder in (".local/share/bash-completion/completions", ".zfunc", ".config/fish/completions"):
        (home / folder).mkdir(parents=True)
    return home


def typed(line: str, cluster: Cluster) -> str:
    """`line` with the address and the GPU of this deployment; without jq where there is none."""
    line = re.sub(r"GPU-5d0a1f6c\S*", cluster.health()["ranks"][2]["gpu"], line.replace(URL, cluster.url))
    return line if " | jq" not in line or have("jq") else line.partition(" | jq")[0]


def environment(cluster: Cluster, home: Path) -> dict[str, str]:
    path = f"{ROOT / '.venv' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "HOME": str(home), "RUNTIME_DIRECTORY": str(cluster.runtime_dir)}
    return {**os.environ, **own, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.parametrize("line", ENDLESS)
def test_it_goes_on_until_ctrl_c(line: str, deployment: Cluster, desk: Path) -> None:
    with subprocess.Popen(line.split(), stdout=subprocess.PIPE, cwd=desk, env=environment(deployment, desk)) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == 130


@pytest.mark.parametrize("number", range(len(RUN)), ids=lambda number: f"{number}-{RUN[number][:50]}")
def test_it_runs(number: int, deployment: Cluster, desk: Path) -> None:
    """In the order of the list. Whatever changes the group has it whole again before the next one."""
    if RUN[number].startswith("curl"):
        require("curl")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", typed(RUN[number], deployment)],
        cwd=desk,
        env=environment(deployment, desk),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error": {' not in done.stdout
    if "drill" in RUN[number] or "release 2" in RUN[number]:
        deployment.wait_for(lambda: deployment.health()["status"] == "ok", 40)


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
