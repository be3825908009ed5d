"""The probe of a device, on this machine's CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from elastic_daemon.engine.probe import probe
from elastic_daemon.errors import StartError

pytestmark = pytest.mark.contract

CPU = torch.device("cpu")


def test_a_device_that_computes_passes() -> None:
    probe(CPU)


def test_one_wrong_bit_is_found() -> None:
    def flip(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[17, 4] += 1
        return product

    with pytest.raises(StartError, match=r"1 of 65536 products differ"):
        probe(CPU, flip)


def test_a_device_that_never_answers_ends_the_process() -> None:
    code = (
        "import time, torch\n"
        "from elastic_daemon.engine.probe import probe\n"
        "probe(torch.device('cpu'), lambda left, right: time.sleep(60), deadline_s=0.2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -14, "SIGALRM"
