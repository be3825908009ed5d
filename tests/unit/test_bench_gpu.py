"""The GPU drill without a GPU and without a daemon: budget, tables, what is read from events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_drill
from bench.changes import Kind, change_of
from bench.gpu import budget as budget_module
from bench.gpu import drills
from bench.gpu import running as running_module
from bench.gpu.budget import STOP_S, Budget, Life, Wanted, fitting, lives, plan
from bench.gpu.driver import Mapping
from bench.gpu.life import Refused, Setting, pauses, strike_of
from bench.gpu.parts import PARTS, listing, options
from bench.gpu.results import CUT, FAILED, PASSED, REFUSED, Bar, Findings, file_of, read_all, table, write
from bench.gpu.running import Running, cell_of
from bench.load import Traffic
from elastic_daemon.errors import ElasticError, StartError


def event(name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": time, **fields}


EAGER, OTHER = ("--enforce-eager",), ("--other",)
KILL, HANG, GRAPHS = Wanted("kill", EAGER, 100), Wanted("hang", EAGER, 50), Wanted("graphs", OTHER, 60)


def test_parts_with_the_same_flags_share_a_life() -> None:
    assert lives([KILL, GRAPHS, HANG]) == [Life(EAGER, (KILL, HANG)), Life(OTHER, (GRAPHS,))]


@pytest.mark.parametrize(
    ("left", "run", "skipped"),
    [
        (1000.0, [KILL, HANG, GRAPHS], []),
        (float("inf"), [KILL, HANG, GRAPHS], []),
        (220.0, [KILL, HANG], [GRAPHS]),
        (170.0, [KILL], [HANG, GRAPHS]),
        (125.0, [HANG], [KILL, GRAPHS]),  # a shorter one is run though a longer one is not
        (119.0, [], [KILL, HANG, GRAPHS]),
    ],
)
def test_plan_leaves_out_what_does_not_fit(left: float, run: list[Wanted], skipped: list[Wanted]) -> None:
    assert plan(lives([KILL, HANG, GRAPHS]), 70.0, left) == (run, skipped)


def test_a_life_that_would_only_start_is_not_begun() -> None:
    assert fitting(Life(EAGER, (KILL,)), 70.0, 169.0) == ([], [KILL])


def test_budget_keeps_time_to_stop() -> None:
    now = [10.0]
    budget = Budget(100.0, lambda: now[0])
    now[0] += 30
    assert (budget.spent, budget.left) == (30.0, 70.0 - STOP_S)
    assert Budget(None, lambda: now[0]).left == float("inf")


def test_flags_of_the_user_are_added() -> None:
    assert options(("--enforce-eager",), ("--async-scheduling",)) == ("--enforce-eager", "--async-scheduling")
    assert options(("--enforce-eager",), ("--no-enforce-eager", "--x")) == ("--x",)
    merged = options(("--eplb-config", '{"window_size": 16}'), ("--eplb-config", '{"use_async": true}', "--x"))
    assert (merged[0], json.loads(merged[1]), merged[2:]) == (
        "--eplb-config",
        {"window_size": 16, "use_async": True},
        ("--x",),
    )


def test_most_parts_share_a_life_and_all_are_listed() -> None:
    setting = Setting()
    first = lives([part.wanted(setting) for part in PARTS.values()])[0]
    assert [part.name for part in first.parts] == [
        "kill",
        "hang",
        "rejoin",
        "scale",
        "nvml",
        "straggler",
        "ties",
        "leak",
    ]
    assert all(f"{name}: " in listing(setting) for name in PARTS)


def test_time_of_a_part_follows_what_is_asked_of_it() -> None:
    kill, nvml = PARTS["kill"], PARTS["nvml"]
    assert kill.seconds(Setting(trials=1)) < kill.seconds(Setting()) < 560
    assert nvml.seconds(Setting(watch_minutes=5)) - nvml.seconds(Setting(watch_minutes=1)) == 240


@pytest.mark.parametrize(
    ("flags", "environment", "cell"),
    [
        (("--enforce-eager",), {}, "default runner, default scheduling, eager"),
        (("--async-scheduling",), {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "V2, async, graphs"),
        (
            ("--enforce-eager", "--no-async-scheduling", "--eplb-config", '{"use_async": true}'),
            {"VLLM_USE_V2_MODEL_RUNNER": "0"},
            "V1, sync, eager, async EPLB",
        ),
    ],
)
def test_cell_of_the_matrix(flags: tuple[str, ...], environment: dict[str, str], cell: str) -> None:
    assert cell_of(flags, environment) == cell
    assert cell_of(flags, environment, "mixed") == f"{cell}, mixed streams"


STRIKE = [
    event("rank_excluded", 100.2, rank=2),
    event("recovery_started", 100.2),
    event("recovery_done", 100.8, kind="shrink", seconds={"fence": 0.3, "resume": 0.1, "total": 0.6}),
    event("rank_starting", 101.0, rank=2),
    event("rank_standby", 110.0, rank=2),
    event("recovery_started", 110.0),
    event("recovery_done", 110.2, kind="grow", seconds={"total": 0.2}),
]


def traffic(*ends: float) -> Traffic:
    found = Traffic()
    for begin, end in zip((0.0, *ends), ends, strict=False):
        found.add(begin, end, 1)
    return found


def test_strike_from_events_and_traffic() -> None:
    change = change_of(Kind.REJOIN, 50.0, STRIKE, -50.0, [])
    got = traffic(49.9, 50.05, 50.5, 50.9, 59.9, 60.4)
    found = strike_of(2, change, STRIKE, -50.0, got)
    assert found["detect_s"] == pytest.approx(0.2)
    assert found["first_token_s"] == pytest.approx(0.9)  # what came at 50.5 had been computed before
    assert found["back_s"] == pytest.approx(10.2)
    assert (found["fence_s"], found["total_s"], found["excluded"]) == (0.3, 0.6, [2])
    assert found["loss_pause_s"] == pytest.approx([9.0])  # to 59.9: that wait began in the window, too
    assert found["join_pause_s"] == pytest.approx([0.5])
    assert pauses(change, got)["other_pause_s"] == []


def test_strike_that_nobody_noticed() -> None:
    grow = STRIKE[3:]
    change = change_of(Kind.REJOIN, 50.0, grow, -50.0, [])
    found = strike_of(2, change, grow, -50.0, traffic(49.0))
    assert (found["detect_s"], found["first_token_s"], found["excluded"]) == (None, None, [])


def test_rank_0_is_among_the_first_victims() -> None:
    class Some:
        setting = Setting(ranks=4)

    assert drills.victims(Some(), 6) == [3, 0, 1, 2, 3, 0]  # type: ignore[arg-type]
    assert 0 in drills.victims(Some(), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pids", "seen", "verdict", "agrees"),
    [
        ({0: 5, 1: 6}, {5: 1.0, 6: 1.0}, "agrees", True),
        ({0: 5}, {5: 1.0, 9: 1.0}, "agrees; 1 processes of others", True),
        ({0: 5}, {}, "the driver lists no processes", True),
        ({0: 5, 1: 6}, {105: None, 106: None}, "as many processes as ranks, with pids of another namespace", True),
        ({0: 5, 1: 6}, {5: 1.0}, "DISAGREES: ranks [5, 6], the driver sees [5]", False),
    ],
)
def test_processes_of_the_driver(
    pids: dict[int, int], seen: dict[int, float | None], verdict: str, agrees: bool
) -> None:
    assert (Mapping(pids, seen).verdict, Mapping(pids, seen).agrees) == (verdict, agrees)


def test_verdicts() -> None:
    met, missed, unknown = Bar("a", "<=", 2, 1), Bar("a", "==", 0, 1), Bar("a", "<=", 2, None)
    assert Findings(bars=[met]).verdict == PASSED
    assert Findings(bars=[met, missed]).verdict == FAILED
    assert Findings(bars=[unknown]).verdict == FAILED
    assert Findings(bars=[met], problems=["x"]).verdict == FAILED
    assert Findings(refused="not supported").verdict == REFUSED
    assert Findings(problems=["x"], cut=True).verdict == CUT
    assert str(missed) == "a == 0 (is 1)"


def test_spread_is_in_milliseconds_over_trials_and_lists() -> None:
    findings = Findings(trials=[{"x_s": 0.1}, {"x_s": [0.3, 0.2]}, {"x_s": None}, {}])
    assert findings.spread("x") == 0.3
    assert findings.spread("y") is None
    assert findings.figures == {"x ms": {"p50": 200.0, "max": 300.0, "n": 3}}


def test_results_are_kept_one_by_one_and_merged(tmp_path: Path) -> None:
    findings = Findings(trials=[{"x_s": 0.5}], bars=[Bar("lost", "==", 0, 0)])
    findings.spread("x")
    write(tmp_path, "hang", "v2", {**findings.to_json(), "trial": True, "versions": {"vllm": "0.32.0"}})
    write(tmp_path, "kill", "v2", {**Findings(cut=True).to_json(), "gpu": "1 x H100"})
    assert not file_of(tmp_path, "kill", "v2").exists()  # so that it is run again
    (tmp_path / "notes.json").write_text("[]")
    text = table(read_all(tmp_path), tuple(PARTS))
    kill, hang = text.splitlines()[2:]
    assert "| kill | v2 |" in kill and "cut off" in kill and "H100" in kill
    assert "trial run on CPU" in hang and "x ms 500 (max 500)" in hang and "lost == 0" in hang and "passed" in hang
    write(tmp_path, "kill", "v2", findings.to_json())
    assert [one["verdict"] for one in read_all(tmp_path)] == [PASSED, PASSED]


def test_broken_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kill.json").write_text("{")
    with pytest.raises(SystemExit):
        gpu_drill.main(["--report", str(tmp_path)])
    assert "kill.json" in capsys.readouterr().err


async def test_what_has_a_result_or_no_model_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "kill", None, Findings().to_json())
    running = Running(Setting(), tmp_path, None, Budget(10.0))
    await running.run(["kill", "fp8", "hang"])
    assert running.skipped["kill"] == "there is a result" and running.skipped["fp8"] == "needs --model"
    assert running.skipped["hang"].startswith("takes about ")
    assert not running.verdicts and running.good


class FakeLives:
    """In place of daemons. `script`: of each life, what its start raises; `parts`: what a part does in its turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *starts: Exception | None, **parts: Any) -> None:
        self.begun: list[list[str]] = []
        self._starts = list(starts)
        monkeypatch.setattr(running_module, "lived", self.lived)
        for name in ("kill", "hang", "rejoin", "graphs"):
            part = replace(PARTS[name], run=self.turn_of(name, parts.get(name)))
            monkeypatch.setattr(running_module, "PARTS", {**running_module.PARTS, name: part})

    @contextlib.asynccontextmanager
    async def lived(self, setting: Setting, flags: Any, log: Path, *_: Any) -> AsyncIterator[Any]:
        self.begun.append([])
        if self._starts and (error := self._starts.pop(0)) is not None:
            raise error
        log.write_text("the log\n")
        calm = {"tokens_per_s": 100.0, "longest_wait_s": 0.1}
        yield SimpleNamespace(start_s=1.0, model="m", calm=calm, setting=setting, tail=lambda: "the log")

    def turn_of(self, name: str, does: Any) -> Any:
        async def run(_: Any, findings: Findings, __: int) -> None:
            self.begun[-1].append(name)
            findings.trials.append({"x_s": 0.1})
            if isinstance(does, Exception):
                raise does
            if does is not None:
                await does()

        return run

    async def run(self, out: Path, *names: str, seconds: float | None = None, device: str = "cpu") -> Running:
        running = Running(Setting(device=device), out, None, Budget(seconds))
        await running.run(list(names))
        return running


async def test_parts_share_a_life_and_another_begins_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeLives(monkeypatch, hang=ElasticError("no return"))
    running = await fake.run(tmp_path, "kill", "graphs", "hang", "rejoin")
    assert fake.begun == [["kill", "hang"], ["rejoin"], ["graphs"]]
    assert running.verdicts == {"kill": PASSED, "hang": FAILED, "rejoin": PASSED, "graphs": PASSED}
    assert not running.good
    found = {one["part"]: one for one in read_all(tmp_path)}
    assert found["hang"]["problems"] == ["ElasticError: no return"] and len(found["hang"]["trials"]) == 1
    assert found["graphs"]["figures"]["graphs to eager, throughput"] == 1.0
    assert found["kill"]["trial"] and found["kill"]["life"]["start_s"] == 1.0


async def test_refused_flags_are_a_result_of_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLives(monkeypatch, Refused("--x is not supported"))
    running = await fake.run(tmp_path, "kill", "hang")
    assert running.verdicts == {"kill": REFUSED, "hang": REFUSED} and running.good
    assert {one["refused"] for one in read_all(tmp_path)} == {"--x is not supported"}


async def test_daemon_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLives(monkeypatch, StartError("not ready"))
    running = await fake.run(tmp_path, "kill", "hang")
    assert running.verdicts == {"kill": FAILED, "hang": FAILED} and len(fake.begun) == 1


async def test_part_that_outlasts_the_budget_is_cut_off_and_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forever() -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(running_module, "START_S", {"cpu": 0.0})
    monkeypatch.setattr(budget_module, "STOP_S", 0.0)
    fake = FakeLives(monkeypatch, kill=forever)
    short = replace(running_module.PARTS["kill"], trial_s={"cpu": 0.0}, rest_s=0.1)
    monkeypatch.setattr(running_module, "PARTS", {**running_module.PARTS, "kill": short})
    running = await fake.run(tmp_path, "kill", "hang", seconds=1.0)
    assert running.verdicts == {"kill": CUT} and "hang" in running.skipped
    assert [path.name for path in tmp_path.glob("*.json")] == ["kill.cut.json"]


def test_parts_may_be_named_together_or_one_by_one() -> None:
    chosen = gpu_drill.make_parser().parse_args(["--part", "kill,hang", "--part", "leak", "--logprobs"])
    assert chosen.part == [["kill", "hang"], ["leak"]]
    assert gpu_drill.setting_of(chosen).logprobs == 2
    assert gpu_drill.setting_of(chosen).sampling == "greedy"


@pytest.mark.parametrize(
    "arguments",
    [["--part", "kil"], ["--part", "kill", "--budget", "0"], [], ["--variant", "a/b"], ["--sampling", "hot"]],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_drill.main(arguments)
    assert ended.value.code == 2
