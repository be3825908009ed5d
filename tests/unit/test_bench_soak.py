"""What the soak makes of what it counted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from bench.soak import Load, Seen, Soak, as_json, parser, render, wrong
from bench.soak_noise import APPLICATION_XIDS, QUIET_XIDS, Made, Noise
from elastic_daemon.drill.report import StreamResult
from watchdog.signals import SignalClass, load_table

STREAM = StreamResult("count", (1, 2, 3), "a b c", "length", 3, None, 0.0, 1.0, (0.1, 0.2, 0.9))
QUIET_VERDICT = {"event": "verdict", "verdict": "suspect", "signal": "xid:13", "act": False,
                 "evidence": [{"signal": "xid:13"}, {"signal": "ecc_single_bit"}]}  # fmt: skip


def good() -> Soak:
    soak = Soak(10.0, 0)
    soak.made = Made(Counter(dict.fromkeys(Noise, 5)), Counter({13: 2}), {"xid:13", "ecc_single_bit"}, 0.55)
    soak.seen.take(QUIET_VERDICT)
    soak.load.take([STREAM], [STREAM])
    return soak


def event(name: str, **fields: Any) -> Callable[[Soak], None]:
    return lambda soak: soak.seen.take({"id": 1, "time": 0.0, "event": name, **fields})


def lost(soak: Soak) -> None:
    soak.load.take([STREAM], [dataclasses.replace(STREAM, error="503: gone")])


def changed(soak: Soak) -> None:
    soak.load.take([STREAM], [dataclasses.replace(STREAM, token_ids=(1, 2, 4))])


def test_what_is_seen_and_not_acted_on_is_fine() -> None:
    soak = good()
    assert wrong(soak) == []
    event("verdict", verdict="ok", signal=None, act=False)(soak)
    event("verdict", verdict="suspect", signal="straggler", act=False, reason="slow")(soak)
    assert wrong(soak) == []
    assert soak.load.longest_gap_s == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (event("rank_excluded", rank=2, reason="hung"), "disturbed: rank_excluded {'rank': 2, 'reason': 'hung'}"),
        (event("watchdog_down", reason="killed"), "watchdog_down"),
        (event("recovery_started", cause="a fault"), "recovery_started"),
        (
            event("verdict", verdict="restart-rank", signal="hung", act=True, reason="behind"),
            "restart-rank hung: behind",
        ),
        (event("verdict", verdict="drain", signal="xid:74", act=False, reason="x"), "drain xid:74: x (held back)"),
        (lost, "1 streams lost, 0 changed: ['503: gone']"),
        (changed, "0 streams lost, 1 changed"),
        (lambda soak: soak.made.expected.add("xid:31"), "not seen: xid:31"),
        (lambda soak: soak.made.counts.pop(Noise.STALL), "not made: stalled rank"),
        (lambda soak: setattr(soak, "load", Load()), "no load"),
        (lambda soak: setattr(soak, "problem", "TimeoutError"), "could not go on: TimeoutError"),
    ],
)
def test_what_is_not_as_it_must_be(spoil: Callable[[Soak], None], said: str) -> None:
    soak = good()
    spoil(soak)
    (found,) = wrong(soak)
    assert said in found


def test_short_runs_need_not_make_all_noise() -> None:
    soak = dataclasses.replace(good(), minutes=1.0)
    soak.made.counts.pop(Noise.BURN)
    assert wrong(soak) == []


def test_the_report_has_all_counts() -> None:
    soak = good()
    event("rank_excluded", rank=2)(soak)
    console = Console(width=160, record=True)
    console.print(render(soak, 1.5))
    text = console.export_text()
    for part in ("throttle blip", "suspect xid:13", "exclusions 1", "requests 1, lost 0", "13 x2", "not as it must be"):
        assert part in text
    body = json.loads(json.dumps(as_json(soak)))
    assert body["noise"]["stalled rank"] == 5 and body["verdicts"] == {"suspect xid:13": 1} and body["wrong"]


def test_seen_counts_each_verdict() -> None:
    seen = Seen()
    for _ in range(3):
        seen.take(QUIET_VERDICT)
    assert seen.verdicts == {"suspect xid:13": 3}
    assert seen.signals == {"xid:13", "ecc_single_bit"}


def test_the_xids_are_of_programs_and_quiet_ones_are_ignored() -> None:
    table = load_table()
    for code in APPLICATION_XIDS:
        cls = table.rule(f"xid:{code}").cls
        expected = (SignalClass.IGNORE,) if code in QUIET_XIDS else (SignalClass.RESTART_RANK, SignalClass.SUSPECT)
        assert cls in expected


def test_minutes() -> None:
    assert parser().parse_args([]).minutes == 10.0
    assert parser().parse_args(["--minutes", "0.5"]).minutes == 0.5
    for text in ("0", "-1", "2000", "x"):
        with pytest.raises(SystemExit):
            parser().parse_args(["--minutes", text])
