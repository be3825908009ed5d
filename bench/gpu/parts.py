"""The parts: what each does, needs and has to reach, and the flags of the daemon that it is run with."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import drills, stragglers
from bench.gpu.budget import Wanted
from bench.gpu.life import Life, Setting
from bench.gpu.results import Findings

EAGER = ("--enforce-eager",)
EPLB = {"window_size": 16, "step_interval": 32}
FP8 = ("--dtype", "bfloat16")
FATAL_XID = Path(__file__).with_name("fatal_xid.toml")

START_S = {"cuda": 95.0, "cpu": 40.0}
"""Until a daemon serves, and its undisturbed runs are over."""

NO_STREAM = "0 lost, 0 changed, all expert slots right"


@dataclass(frozen=True)
class Part:
    """`run`: does so many trials. `trials`: how many unless --trials says otherwise; `trial_s`: of each, by device;
    `rest_s`: beside them."""

    name: str
    does: str
    needs: str
    bars: str
    run: Callable[[Life, Findings, int], Awaitable[None]]
    trials: int
    trial_s: Mapping[str, float]
    rest_s: float = 15.0
    flags: tuple[str, ...] = EAGER

    def count(self, setting: Setting) -> int:
        return setting.trials or self.trials

    def seconds(self, setting: Setting) -> float:
        watched = setting.watch_minutes * 60 if self.name == "nvml" else 0.0
        return self.count(setting) * self.trial_s[setting.device] + self.rest_s + watched

    def wanted(self, setting: Setting) -> Wanted:
        return Wanted(self.name, options(self.flags, setting.serve_args), self.seconds(setting))


PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part(
            "kill",
            "SIGKILL of ranks under streams, rank 0 included, each back before the next",
            "2 ranks at least",
            f"{NO_STREAM}; kill to first token <= {drills.FIRST_TOKEN_BAR_S:g} s",
            drills.kill,
            trials=5,
            trial_s={"cuda": 30.0, "cpu": 8.0},
        ),
        Part(
            "hang",
            "SIGSTOP of ranks in decode: found by heartbeats, fenced, replaced",
            "the watchdog",
            f"{NO_STREAM}; the right rank alone is named; stop to exclusion <= {drills.HANG_BAR_S:g} s",
            drills.hang,
            trials=2,
            trial_s={"cuda": 35.0, "cpu": 13.0},
        ),
        Part(
            "rejoin",
            "what clients see of a rank that joins, after SIGKILL",
            "2 ranks at least",
            f"{NO_STREAM}; pause at the join <= {drills.JOIN_BAR_S:g} s",
            drills.rejoin,
            trials=3,
            trial_s={"cuda": 30.0, "cpu": 8.0},
        ),
        Part(
            "scale",
            "to half of the ranks and back by order, under streams",
            "2 ranks at least",
            f"{NO_STREAM}; pause at the join <= {drills.JOIN_BAR_S:g} s",
            drills.scale,
            trials=2,
            trial_s={"cuda": 45.0, "cpu": 14.0},
        ),
        Part(
            "xid",
            "an Xid on the GPU of a rank, which goes on on a spare one (the table of signals makes it fatal)",
            "the watchdog, a GPU more than ranks (with cpu: --serve-args='--spare-gpus 1')",
            f"{NO_STREAM}; the right GPU alone is named; Xid to verdict <= {drills.VERDICT_BAR_S:g} s, to first token "
            f"<= {drills.FIRST_TOKEN_BAR_S:g} s",
            drills.xid,
            trials=2,
            trial_s={"cuda": 80.0, "cpu": 75.0},
            flags=(*EAGER, f"--watchdog-flags=--max-exclusions 100 --signals {FATAL_XID}"),
        ),
        Part(
            "nvml",
            "elastic-watchdog status, process-to-GPU mapping, a watch of --watch-minutes under streams, then an error "
            "of another program on the GPU of a rank",
            "the watchdog",
            f"{NO_STREAM}; no verdict but ok; ranks are where the driver sees them",
            drills.nvml,
            trials=0,
            trial_s={"cuda": 0.0, "cpu": 0.0},
            rest_s=60.0,
        ),
        Part(
            "straggler",
            "processes that compute on the GPU of one rank, which is named as long as they do",
            "the watchdog, a GPU for each rank (--ranks-per-gpu 1)",
            f"{NO_STREAM}; the slow rank alone is named, within {stragglers.NAMED_BAR_S:g} s, and within "
            f"{stragglers.CLEARED_BAR_S:g} s of the end no more; no exclusion",
            stragglers.straggler,
            trials=3,
            trial_s={"cuda": 80.0, "cpu": 1.0},
        ),
        Part(
            "ties",
            "no fault: each stream is taken up from its middle, which may change tokens that are about as likely",
            "streams that are greedy, or seeded with runner V2",
            "at least one stream is taken up; it says how often tokens differ",
            drills.ties,
            trials=0,
            trial_s={"cuda": 0.0, "cpu": 0.0},
            rest_s=75.0,
        ),
        Part(
            "leak",
            "SIGKILL and rejoin, with memory by NVML at rest before, between and after",
            "2 ranks at least",
            f"0 lost, 0 changed; growth after the first cycle <= {drills.LEAK_BAR_MIB:g} MiB",
            drills.leak,
            trials=5,
            trial_s={"cuda": 38.0, "cpu": 14.0},
        ),
        Part(
            "eplb",
            f"kills while experts are rearranged every {EPLB['step_interval']} steps",
            "balancing",
            f"{NO_STREAM}; experts have moved; kill to first token <= {drills.FIRST_TOKEN_BAR_S:g} s",
            drills.eplb,
            trials=2,
            trial_s={"cuda": 45.0, "cpu": 15.0},
            flags=(*EAGER, "--survive-losses", "1", "--eplb-config", json.dumps(EPLB)),
        ),
        Part(
            "checkpoint",
            "SIGKILL of ranks that alone have some of the experts, with no copies in host memory",
            "3 ranks at least",
            f"{NO_STREAM}; kill to first token <= {drills.FIRST_TOKEN_BAR_S:g} s; experts come from the checkpoint",
            drills.checkpoint,
            trials=2,
            trial_s={"cuda": 30.0, "cpu": 8.0},
            flags=(*EAGER, "--survive-losses", "1", "--host-expert-copies", "off"),
        ),
        Part(
            "graphs",
            "as kill, without --enforce-eager; throughput beside that of part kill of the same variant",
            "run kill first",
            f"as kill, and the log tells of graphs; kill to first token <= {drills.FIRST_TOKEN_BAR_S:g} s",
            drills.graphs,
            trials=5,
            trial_s={"cuda": 35.0, "cpu": 8.0},
            flags=(),
        ),
        Part(
            "fp8",
            "as kill, with an FP8 checkpoint",
            "--model DIR (python -m bench.gpu.fp8 DIR makes one)",
            f"{NO_STREAM}; kill to first token <= {drills.FIRST_TOKEN_BAR_S:g} s",
            drills.fp8,
            trials=3,
            trial_s={"cuda": 30.0, "cpu": 8.0},
            flags=(*EAGER, *FP8),
        ),
    )
}


def options(flags: Sequence[str], serve_args: Sequence[str]) -> tuple[str, ...]:
    """Of a part and of the user, who wins: for vLLM the last of each counts, but --eplb-config is merged."""
    ours, theirs = list(flags), list(serve_args)
    if "--no-enforce-eager" in theirs:
        ours = [flag for flag in ours if flag != "--enforce-eager"]
        theirs.remove("--no-enforce-eager")
    name = "--eplb-config"
    if name in ours and name in theirs:
        at, there = ours.index(name), theirs.index(name)
        merged = {**json.loads(ours[at + 1]), **json.loads(theirs[there + 1])}
        ours[at + 1] = json.dumps(merged)
        del theirs[there : there + 2]
    return (*ours, *theirs)


def listing(setting: Setting) -> str:
    lines = []
    for part in PARTS.values():
        lines += [
            f"{part.name}: {part.does}",
            f"    needs {part.needs}; flags {' '.join(part.flags) or '-'}",
            f"    bars  {part.bars}",
            f"    takes about {part.seconds(setting):.0f} s on {setting.device}, and a start of "
            f"{START_S[setting.device]:.0f} s that parts with the same flags share",
        ]
    return "\n".join(lines)
