"""What the zygote tells the supervisor when there is no engine to be had. All else of it is covered end to end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_daemon.engine.compat import VLLM_VERSION
from elastic_daemon.errors import ConfigError
from elastic_daemon.messages import decode, encode

ROOT = Path(__file__).parents[2]


def answers(site: Path, *requests: str) -> list[dict[str, object]]:
    """Of a zygote that finds the modules in `site` before those that are installed."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic_daemon.engine.zygote", str(theirs.fileno()), str(os.getpid())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}"},
    )
    theirs.close()
    try:
        received = []
        with ours, ours.makefile("rb") as stream:
            for request in requests:
                ours.sendall(encode({"type": request}))
                received.append(decode(stream.readline()))
        assert process.wait(60) == 0, "it ends with the connection"
        return received
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("vllm", "message"),
    [
        ("__version__ = '0.1.0+cpu'", rf"vLLM {VLLM_VERSION} .* has 0\.1\.0\+cpu"),
        ("raise ModuleNotFoundError(\"No module named 'vllm'\")", r"No module named 'vllm'.*\[cpu\].*\[cuda\]"),
        (f"__version__ = '{VLLM_VERSION}'", r"'vllm' is not a package.*\[cpu\]"),
    ],
    ids=["another version", "not installed", "not whole"],
)
def test_each_request_is_answered_with_what_is_wrong(tmp_path: Path, vllm: str, message: str) -> None:
    (tmp_path / "vllm.py").write_text(vllm)
    (tmp_path / "setproctitle.py").write_text("raise ImportError('comes with vLLM')")
    configure, fork = answers(tmp_path, "configure", "fork")
    assert (configure["exit_code"], fork) == (ConfigError.exit_code, configure)
    error = str(configure["error"])
    assert re.search(message, error), error
    assert "\n" not in error
