"""The process of a rank, from its fork to its end."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import structlog
import torch
from torch.distributed import PrefixStore, Store, TCPStore
from vllm.config import VllmConfig
from vllm.v1.engine.utils import EngineZmqAddresses

from elastic_daemon.engine.core import ElasticEngineCore
from elastic_daemon.engine.heartbeat import Steps, open_page
from elastic_daemon.engine.plan import rank_plan
from elastic_daemon.engine.probe import probe
from elastic_daemon.engine.stream_counters import StreamCounters
from elastic_daemon.errors import ControlClosed
from elastic_daemon.processes.fence_word import FenceWord
from elastic_daemon.processes.lifeline import hold
from elastic_daemon.processes.messages import ControlClient, Message
from elastic_daemon.telemetry.logs import configure_logging
from watchdog.heartbeat.layout import Phase

log = structlog.get_logger(__name__)

CPU_NICENESS = 5
"""Of a rank that computes on the host, whose processors it fills: who supervises it and who is asked come first."""


def connect_store(host: str, port: int) -> Store:
    """The rank's one client of the supervisor's rendezvous store."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False)


def _device(config: VllmConfig) -> torch.device:
    kind = config.device_config.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, rank_plan(config).gpu)


def _hold_lifeline(directory: Path, incarnation: int) -> str | None:
    """Where it is; None: the end of this process will be seen a little later."""
    path = directory / f"lifeline-{incarnation}"
    try:
        hold(path)
    except OSError as error:
        log.warning("lifeline_missing", file=str(path), error=str(error))
        return None
    return str(path)


def run_rank(config: VllmConfig, spec: Message) -> None:
    """Be rank `spec["rank"]` until the process ends. Called in a fresh fork of the zygote."""
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks for the stacks of a rank before it gives it up
    configure_logging(spec["log_level"])  # a reload may have changed it since the zygote's start
    control = ControlClient(spec["control"])
    device = _device(config)
    if device.type == "cpu":
        os.nice(CPU_NICENESS)
    counters = StreamCounters(device) if device.type == "cuda" else None
    page = open_page(spec, counters.map if counters is not None else None)
    page.set_phase(Phase.LOADING)
    try:
        lifeline = _hold_lifeline(Path(spec["scratch_dir"]), spec["incarnation"])
        control.send("hello", role="rank", rank=spec["rank"], incarnation=spec["incarnation"], lifeline=lifeline)
        probe(device)
        store = PrefixStore(spec["store_prefix"], connect_store(spec["store_host"], spec["store_port"]))
        core = ElasticEngineCore(
            config,
            spec["incarnation"],
            EngineZmqAddresses(inputs=[spec["input_address"]], outputs=[spec["output_address"]]),
            control,
            FenceWord(Path(spec["fence_word"])),
            store,
            page,
            Steps(page, counters),
            counters,
            spec.get("host_copies_dir"),
        )
        core.serve()
    except ControlClosed:
        page.close()
        log.warning("supervisor_gone", rank=spec["rank"])
