"""A rank rehearses the groups to come with vLLM's own model runner, and is as before afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from elastic_daemon.config import BUNDLED_MODEL
from elastic_daemon.engine.rehearsal import tokens_per_rank

LIMIT_S = 180


def test_a_rank_steps_as_in_smaller_groups_and_is_as_before(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.contract.rehearsing_rank", str(BUNDLED_MODEL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    expected = [
        [members, tokens, members * found["slots"]] for members in (4, 3, 2) for tokens in tokens_per_rank(members, 256)
    ]
    assert found["steps"] == expected
    assert found["unchanged"]
