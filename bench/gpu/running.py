"""Runs parts life by life, within a budget, and writes what each has found as soon as it is over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from bench.command import say
from bench.gpu import budget as budgets
from bench.gpu import driver
from bench.gpu.drills import strike_figures
from bench.gpu.life import RUNNER_VARIABLE, Life, Refused, Setting, lived, tail
from bench.gpu.parts import PARTS, START_S
from bench.gpu.results import CUT, PASSED, REFUSED, Findings, file_of, ms, write
from bench.machine import Machine
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Display
from elastic_daemon.errors import DaemonUnreachable, ElasticError

RECORDED = (RUNNER_VARIABLE, "VLLM_BATCH_INVARIANT", "NCCL_MULTI_RANK_GPU_ENABLE", "VLLM_NCCL_SO_PATH")
ERRORS = (ElasticError, DaemonUnreachable, TimeoutError, ValueError, KeyError, OSError, httpx.HTTPError)


@dataclass
class Running:
    """`again`: also parts that have a result. `verdicts` of what was run, `skipped` what was not, and why."""

    setting: Setting
    out: Path
    variant: str | None
    budget: budgets.Budget
    again: bool = False
    verdicts: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """A cell that is refused with a reason is as good as one that is proven."""
        return all(verdict in (PASSED, REFUSED) for verdict in self.verdicts.values())

    async def run(self, names: list[str]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        wanted = []
        for name in names:
            if file_of(self.out, name, self.variant).exists() and not self.again:
                self.skipped[name] = "there is a result"
            elif name == "fp8" and self.setting.model is None:
                self.skipped[name] = "needs --model"
            else:
                wanted.append(PARTS[name].wanted(self.setting))
        lives = budgets.lives(wanted)
        run, rest = budgets.plan(lives, self._start_s, self.budget.left)
        say(
            f"to run: {', '.join(part.name for part in run) or 'nothing'}; for want of time left out: "
            f"{', '.join(part.name for part in rest) or 'nothing'}; left out: {self.skipped or 'nothing'}"
        )
        with Display(make_console(stderr=True)) as display:
            while lives:
                life = lives.pop(0)
                if again := await self._live(life, display):
                    lives.insert(0, budgets.Life(life.flags, again))
        say(f"done in {self.budget.spent:.0f} s: {self.verdicts or 'nothing'}; left out: {self.skipped or 'nothing'}")

    @property
    def _start_s(self) -> float:
        return START_S[self.setting.device]

    async def _live(self, life: budgets.Life, display: Display) -> tuple[budgets.Wanted, ...]:
        """Returns the parts that another life has to be begun for, since this one could not go on."""
        fit, rest = budgets.fitting(life, self._start_s, self.budget.left)
        for part in rest:
            self._leave_out(part)
        if not fit:
            return ()
        pending, begun = list(fit), False
        log = self.out / ("-".join(filter(None, (pending[0].name, self.variant))) + ".log")
        try:
            # The limit holds for all of the life, so that nothing outlives the budget.
            async with asyncio.timeout(_limit(self.budget.left)):
                async with lived(self.setting, life.flags, log, display, self.budget.left) as living:
                    while pending:
                        part = pending.pop(0)
                        if part.seconds > self.budget.left:
                            self._leave_out(part)
                            continue
                        begun = True
                        if not await self._part(part, living):
                            break
        except Refused as error:
            for part in pending:
                self._keep(part, Findings(refused=str(error)), None, 0.0)
            return ()
        except ERRORS as error:
            say(f"the life of this daemon ended: {_say(error)}")
            if not begun:
                say(f"its log ends with:\n{tail(log)}")
                for part in pending:
                    self._keep(part, Findings(problems=[f"no life: {_say(error)}"[:1000]]), None, 0.0)
                return ()
        return tuple(pending)

    async def _part(self, part: budgets.Wanted, life: Life) -> bool:
        """Returns whether the daemon can serve another part."""
        findings, began = Findings(), self.budget.spent
        left, chosen = self.budget.left, PARTS[part.name]
        say(f"[{began:.0f} s] {part.name}: {chosen.does} (about {part.seconds:.0f} s)")
        try:
            async with asyncio.timeout(_limit(min(left, 60 + 2 * part.seconds))):
                await chosen.run(life, findings, chosen.count(self.setting))
            self._beside(part.name, life, findings)
        except asyncio.CancelledError:
            findings.cut = True
            raise
        except ERRORS as error:
            findings.cut = isinstance(error, TimeoutError) and self.budget.left <= 1
            findings.problems.append(_say(error))
            if not isinstance(error, ElasticError | TimeoutError):
                say(traceback.format_exc())
            return False
        finally:
            strike_figures(findings)  # of what there is, where the part has not come to its end
            self._keep(part, findings, life, self.budget.spent - began)
            if findings.verdict not in (PASSED, CUT):
                say(f"the log of the daemon ends with:\n{life.tail()}")
        return True

    def _beside(self, name: str, life: Life, findings: Findings) -> None:
        """What the undisturbed run of the life was like; with graphs, beside that of part kill, which is eager."""
        speed = life.calm["tokens_per_s"]
        findings.figures |= {"undisturbed wait ms": ms(life.calm["longest_wait_s"]), "tokens/s": speed}
        eager = file_of(self.out, "kill", self.variant)
        if name == "graphs":
            with contextlib.suppress(OSError, KeyError, ValueError):
                other = json.loads(eager.read_text())["life"]["calm"]["tokens_per_s"]
                findings.figures["graphs to eager, throughput"] = round(speed / other, 2)

    def _keep(self, part: budgets.Wanted, findings: Findings, life: Life | None, seconds: float) -> None:
        self.verdicts[part.name] = findings.verdict
        seen = driver.ask() if self.setting.device == "cuda" else None
        body: Mapping[str, Any] = {
            **findings.to_json(),
            "seconds": round(seconds, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "trial": self.setting.device != "cuda",
            "gpu": seen.name if seen else "",
            "driver": seen.version if seen else "",
            "versions": {**Machine.here().versions, **driver.nccl_versions()},
            "cell": cell_of(part.flags, os.environ, self.setting.sampling),
            "setting": asdict(self.setting),
            "flags": list(part.flags),
            "environment": {name: os.environ[name] for name in RECORDED if name in os.environ},
            "machine": asdict(Machine.here()),
            "life": {"start_s": life.start_s, "model": life.model, "calm": life.calm} if life else None,
        }
        path = write(self.out, part.name, self.variant, body)
        say(
            f"[{self.budget.spent:.0f} s] {part.name}: {findings.verdict}"
            + "".join(f"\n    {bar}: {'met' if bar.met else 'NOT MET'}" for bar in findings.bars)
            + "".join(f"\n    {problem}" for problem in findings.problems)
            + (f"\n    {findings.refused}" if findings.refused else "")
            + f"\n    written to {path}"
        )

    def _leave_out(self, part: budgets.Wanted) -> None:
        left = max(0.0, self.budget.left)
        self.skipped[part.name] = f"takes about {part.seconds:.0f} s, and {left:.0f} s are left"
        say(f"{part.name} is left out: {self.skipped[part.name]}")


def _limit(seconds: float) -> float | None:
    return None if seconds == float("inf") else max(1.0, seconds)


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def cell_of(flags: tuple[str, ...], environment: Mapping[str, str], sampling: str = "greedy") -> str:
    """Where in the matrix flags and environment lie, as far as they say; how streams are sampled, if not greedily."""
    runner = {"0": "V1", "1": "V2"}.get(environment.get(RUNNER_VARIABLE, ""), "default runner")
    scheduling = "default scheduling"
    for flag in flags:
        scheduling = {"--async-scheduling": "async", "--no-async-scheduling": "sync"}.get(flag, scheduling)
    config = flags[flags.index("--eplb-config") + 1] if "--eplb-config" in flags else ""
    balancing = {True: ", async EPLB", False: ", sync EPLB"}.get(json.loads(config or "{}").get("use_async"), "")
    streams = "" if sampling == "greedy" else f", {sampling} streams"
    return f"{runner}, {scheduling}, {'eager' if '--enforce-eager' in flags else 'graphs'}{balancing}{streams}"
