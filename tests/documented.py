"""What becomes of each command in the documents: which test runs it, or why none can."""

from __future__ import annotations

import re

RUN = (
    "elastic-daemon status",
    "elastic-daemon status --url http://127.0.0.1:8000",
    "elastic-daemon status --json | jq .last_recovery.seconds",
    "elastic-daemon status --runtime-dir /run/elastic-daemon",
    "elastic-daemon events",
    "elastic-daemon events --url http://127.0.0.1:8000",
    "elastic-daemon events --runtime-dir /run/elastic-daemon",
    "elastic-daemon config",
    "elastic-daemon config --config /etc/elastic-daemon.toml",
    "elastic-daemon config --json",
    "elastic-daemon config --json | jq .port",
    *(f"elastic-daemon completion {shell} > ~/{where}" for shell, where in (
        ("bash", ".local/share/bash-completion/completions/elastic-daemon"),
        ("zsh", ".zfunc/_elastic-daemon"),
        ("fish", ".config/fish/completions/elastic-daemon.fish"),
    )),
    *(f"elastic-watchdog completion {shell} > ~/{where}" for shell, where in (
        ("bash", ".local/share/bash-completion/completions/elastic-watchdog"),
        ("zsh", ".zfunc/_elastic-watchdog"),
        ("fish", ".config/fish/completions/elastic-watchdog.fish"),
    )),
    "elastic-daemon plan ./model --data-parallel-size 16 --gpu-memory 80",
    "elastic-daemon plan ./model --data-parallel-size 72 --gpu-memory 141 --mtbf-hours 20000 --repair-hours 72",
    "elastic-daemon plan --experts 256 --layers 58 --expert-bytes 44e6 --other-bytes 17e9 --data-parallel-size 16 "
    "--gpu-memory 80",
    "elastic-daemon plan --experts 256 --layers 58 --expert-bytes 44e6 --other-bytes 17e9 --data-parallel-size 16 "
    "--gpu-memory 80 --json",
    "curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "tiny-moe", "prompt": "add 384 + 729 =", "max_tokens": 20, "temperature": 0}'""",
    "curl -s http://127.0.0.1:8000/experts/verify",
    "elastic-watchdog status",
    "elastic-watchdog status --runtime-dir /run/elastic-daemon",
    """elastic-watchdog status --json | jq '.gpus[] | select(.verdict != "ok")'""",
    "elastic-watchdog simulate list",
    "elastic-daemon automation",
    "elastic-daemon automation off",
    "elastic-daemon automation on",
    "openssl rand -hex 32 >> /etc/elastic-daemon/api-keys",
    "openssl rand -hex 32 >> /etc/elastic-daemon/admin-key",
    "elastic-daemon scale 3 --retire 1",
    "elastic-daemon scale 4",
    """curl http://127.0.0.1:8000/scale_elastic_ep -H 'Content-Type: application/json' """
    """-d '{"new_data_parallel_size": 3}'""",
    "elastic-daemon scale 3",
    "elastic-daemon scale 6 --timeout 600 --no-wait",
    "elastic-daemon scale 4",
    "ELASTIC_ADMIN_KEY=… elastic-daemon scale 4 --url http://10.0.0.5:8000",
    "elastic-daemon drain 2",
    "elastic-daemon release 2",
    "elastic-daemon drain 2 --timeout 30",
    "elastic-daemon release 2",
    "elastic-daemon exclude 2",
    "elastic-daemon release 2",
    "elastic-daemon release GPU-5d0a1f6c",
    "elastic-daemon release GPU-5d0a1f6c-0000-0000-0000-000000000002",
    "elastic-daemon drill",
    "elastic-daemon drill --kill 0,2 --at 40% --streams 32",
    "elastic-daemon drill --streams 32 --tokens 500 --at 2s --seed 7",
    "elastic-daemon drill --url http://127.0.0.1:8000 --json > drill.json",
    "elastic-watchdog simulate xid --gpu 2 --code 79",
    "elastic-watchdog simulate flap --gpu 1 --period 4",
    "elastic-watchdog simulate hang --gpu 1",
    "elastic-watchdog simulate hang --gpu GPU-1c5bf4a2-...",
    "elastic-watchdog simulate lose --gpu 2",
    "elastic-watchdog simulate replace --gpu 2",
    "elastic-watchdog simulate heal --gpu all",
)  # fmt: skip
"""On a deployment, in this order: from the looks to the orders to the faults. tests/e2e/test_documented_commands.py."""

ENDLESS = {
    "elastic-daemon status --watch": "epoch",
    "elastic-daemon status --watch 5 --json >> status.jsonl": '"epoch":',
    "watch -n1 elastic-watchdog status": "mode act",
    "elastic-daemon events --follow": "starting",
    "elastic-daemon events --follow | grep rank_excluded": "rank_excluded",
}
"""There too, ended with Ctrl-C when they have shown this."""

WATCHDOGS = (
    "elastic-watchdog run",
    "elastic-watchdog run --mode observe",
    "elastic-watchdog run --signals /etc/elastic-daemon/signals.toml",
    "elastic-watchdog run --simulated",
)
"""There too, each with simulated GPUs of its own."""

OVER_TLS = (
    "elastic-daemon status --url https://gpu-host:8000 --cacert ca.pem",
    "elastic-daemon status --url https://gpu-host:8000 --cert operator.pem --cert-key operator-key.pem",
    "elastic-daemon drill --url https://gpu-host:8000 --cacert ca.pem",
)
"""Of a daemon that asks its clients for certificates. tests/e2e/test_configuration.py."""

# What follows is run by tests/unit/test_documented_programs.py.

MADE = r"make (setup|check|format|test|serve|drill)\b"
"""In a copy of the tree whose programs only note how they were called: it is `make test` that runs the tests."""
INSTALLED = r"make (install|uninstall)\b"
"""Below a folder, with an environment that exists."""
SERVED = r"(\.venv/bin/)?elastic-daemon serve\b"
"""With --print-config: as far as the settings. All end-to-end tests start it, with a port and a directory of theirs."""
SCRIPTS = r"\.venv/bin/python scripts/\w+_doc\.py"
"""With --check, so that no document is written."""
EDITED = r"sed -i \S+ alerts\.yml"
"""On a copy."""
HELP = r"elastic-daemon COMMAND --help"
"""For each command."""
BENCHES = r"(\.venv/bin/)?python -m (bench(?:\.\w+)+)"
SMALLEST = {
    "bench.placement": ("--trials", "1"),  # of two layers
    "bench.heartbeat_cost": ("--seconds", "0.02"),
    "bench.gpu.draws": ("--streams", "1", "--tokens", "2", "--otherwise", "1"),
    "bench.gpu_drill": ("--list",),  # tests/e2e/test_gpu_drill.py holds one on CPU ranks
    "bench.recovery": ("--help",),  # tests/chaos/test_recovery_time.py runs it with --quick
    "bench.detection": ("--help",),  # minutes, as all below
    "bench.elasticity": ("--help",),
    "bench.soak": ("--help",),
    "bench.straggler": ("--help",),
    "bench.control_plane": ("--help",),
    "bench.frontend_restart": ("--help",),
    "bench.gpu.aborts": ("--help",),
}
"""What each is run with. The documented arguments are parsed only."""

ELSEWHERE = (
    (r"systemd-analyze security", "tests/unit/test_units.py", '"systemd-analyze", "security"'),
    (r"systemd-analyze verify", "tests/unit/test_units.py", '"systemd-analyze", "verify"'),
    (r"python -m bench\.gpu\.fp8 DIR", "tests/contract/test_fp8_checkpoint.py", "fp8.main("),
)
"""The start of a line, the test that runs it, and what stands there."""

EXCEPTIONS = (
    (r"systemctl (daemon-reload|enable|start|stop|status|reload|restart|reset-failed|edit)\b", "systemd as PID 1"),
    (r"journalctl ", "systemd's journal, and a service that writes to it"),
    (r"systemd-(sysusers|tmpfiles) ", "root: it makes a user and directories of the machine"),
    (r"pip install '\.\[cuda\]'", "the network, and gigabytes of it"),
    (r"ssh -L ", "another host"),
)
"""The start of a line that no test runs, and what it would take."""

PLACEHOLDERS = {"RANK": "2", "GPU-…": "GPU-5d0a1f6c"}
"""In commands between backticks, and what a test gives for them."""

_EXACT = (*RUN, *ENDLESS, *WATCHDOGS, *OVER_TLS)
PATTERNS = (
    *(MADE, INSTALLED, SERVED, SCRIPTS, EDITED, HELP),
    *(rf"(\.venv/bin/)?python -m {re.escape(module)}(?![\w.])" for module in SMALLEST),
    *(start for start, _, _ in ELSEWHERE),
    *(start for start, _ in EXCEPTIONS),
)


def filled(line: str) -> str:
    """`line` with something for each placeholder."""
    return " ".join(PLACEHOLDERS.get(word, word) for word in line.split(" "))


def accounted_for(line: str) -> bool:
    """Whether a test runs it, runs a longer one that begins with it, or a reason says why none does."""
    line = filled(line)
    return any(f"{run} ".startswith(f"{line} ") for run in _EXACT) or any(re.match(it, line) for it in PATTERNS)
