"""What the zygote tells the supervisor when there is no engine to be had, and which GPU a fork of it sees.

All else of it is covered end to end.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_daemon.engine.compat import VLLM_VERSION
from elastic_daemon.engine.devices import choose_device
from elastic_daemon.engine.zygote import use_gpu
from elastic_daemon.errors import ConfigError
from elastic_daemon.processes.messages import decode, encode

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


MIG = "MIG-b9f0d6f1-8a4e-5c55-a1f7-3c8c2d5a6e10"


@pytest.mark.parametrize(
    ("uuid", "index", "visible", "chosen"),
    [
        ("GPU-c", 0, None, (0, {"CUDA_VISIBLE_DEVICES": "GPU-c"})),
        ("GPU-c", 2, "0,1,2,3", (0, {"CUDA_VISIBLE_DEVICES": "GPU-c"})),
        (MIG, 1, "GPU-a", (0, {"CUDA_VISIBLE_DEVICES": MIG})),
        (None, 2, None, (2, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})),
        (None, 1, "4,5", (1, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})),
        (None, 1, "", (1, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})),
        (None, 1, f"GPU-a, {MIG}", (0, {"CUDA_VISIBLE_DEVICES": MIG})),
        (None, 2, f"GPU-a,{MIG}", (2, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})),
    ],
    ids=["alone", "whatever was visible", "MIG", "by index", "of those visible", "empty", "by name", "too few names"],
)
def test_a_rank_sees_its_gpu_alone_where_it_has_a_name(
    uuid: str | None, index: int, visible: str | None, chosen: tuple[int, dict[str, str]]
) -> None:
    assert choose_device(uuid, index, visible) == chosen


def test_a_fork_of_the_zygote_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert use_gpu("GPU-c", 3) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-c"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert use_gpu(None, 3) == 3
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("0,1,2,3", "PCI_BUS_ID")
