"""What the benchmark of detection makes of its trials."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from rich.console import Console

from bench.detection import BARS, lives, parser, render, verdicts
from bench.detection_trials import SURVIVE, Kind, Trial

GOOD = Trial(Kind.XID, 3, 0.02, 0.021, 0.3, 3, "xid 79", 0, 0, 0.01)


def test_every_fault_is_tried_as_often_and_no_life_has_too_many() -> None:
    planned = list(lives(tuple(Kind), 20))
    assert Counter(kind for life in planned for kind in life) == dict.fromkeys(Kind, 20)
    assert max(map(len, planned)) <= SURVIVE
    assert len(planned) == 6 * 20 / SURVIVE


def test_every_fault_has_a_bar() -> None:
    assert {bar.kind for bar in BARS} == set(Kind)


def test_good_trials() -> None:
    assert verdicts([GOOD] * 20) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict_s": 0.2}, "Xid 79, verdict: p99 200 ms, bar 100 ms"),
        ({"token_s": 1.6}, "first token from survivors: p99 1600 ms"),
        ({"verdict_s": None}, "no verdict in 1 of 20"),
        ({"named": 2}, "rank 3: named 2"),
        ({"named": None}, "rank 3: named None"),
        ({"lost": 1}, "1 streams lost or changed"),
        ({"changed": 2}, "2 streams lost or changed"),
    ],
)
def test_one_bad_trial_in_twenty_shows(changes: dict[str, object], said: str) -> None:
    bad = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    (wrong,) = verdicts([GOOD] * 19 + [bad])
    assert said in wrong


def test_the_table_has_each_time_beside_its_bar() -> None:
    console = Console(width=160, record=True)
    console.print(render([GOOD] * 2, ["life 2: no port"], 1.5, 60))
    text = console.export_text()
    assert "first token from survivors" in text
    assert "1500" in text
    assert "2/2" in text
    assert "not as it must be: life 2: no port" in text


def test_unknown_faults_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--faults", "xid,meteor"])
    assert ended.value.code == 2
    assert "meteor" in capsys.readouterr().err
    assert parser().parse_args(["--faults", "xid,death"]).faults == (Kind.XID, Kind.DEATH)
