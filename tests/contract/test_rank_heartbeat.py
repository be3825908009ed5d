"""How a rank comes to write its heartbeat: vLLM's idle loop, steps, and collectives of real processes."""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from elastic_daemon.engine.gloo import LOOK_UP, AbortableProcessGroup, AbortableWork, GlooGroup
from elastic_daemon.engine.heartbeat import BEAT_S, BeatingQueue, NoPage, Steps, open_page, step_phase
from elastic_daemon.errors import PeerLost
from tests.contract.group_ranks import Ranks, all_do, build, checked, running
from watchdog.heartbeat.layout import Collective, Granularity, Phase, Snapshot
from watchdog.heartbeat.page import HeartbeatWriter
from watchdog.heartbeat.reader import PageDirectory

pytestmark = pytest.mark.contract


def test_the_queue_is_made_before_the_group_and_read_after_it() -> None:
    """Our queue takes the place of vLLM's in `_init_data_parallel`."""
    source = inspect.getsource(EngineCoreProc.__init__)
    made, group, filled = (
        source.index(text) for text in ("self.input_queue = ", "self._init_data_parallel(", "input_thread.start()")
    )
    assert made < group < filled
    assert source.count("self.input_queue = ") == 1


def test_vllms_idle_loop_beats_until_work_comes() -> None:
    beats: list[float] = []
    source: BeatingQueue[Any] = BeatingQueue(lambda: beats.append(time.monotonic()))
    handled: list[Any] = []

    def handle(kind: EngineCoreRequestType, request: Any) -> None:
        handled.append((kind, request))

    core = SimpleNamespace(
        has_work=lambda: bool(handled),
        is_running=lambda: True,
        _notify_idle_state_callbacks=lambda: None,
        input_queue=source,
        aborts_queue=queue.Queue(),
        process_input_queue_block=True,
        _handle_client_request=handle,
    )
    started = time.monotonic()
    threading.Timer(1.0, source.put, [(EngineCoreRequestType.WAKEUP, None)]).start()
    EngineCoreProc._process_input_queue(core)
    took = time.monotonic() - started
    assert handled == [(EngineCoreRequestType.WAKEUP, None)]
    assert 5 <= len(beats) <= took / (BEAT_S * 0.9)
    gaps = [after - before for before, after in zip([started, *beats], beats, strict=False)]
    assert min(gaps) >= BEAT_S * 0.9


def test_other_ways_to_read_the_queue_are_as_ever() -> None:
    source: BeatingQueue[int] = BeatingQueue(lambda: pytest.fail("a beat without a wait"))
    with pytest.raises(queue.Empty):
        source.get_nowait()
    with pytest.raises(queue.Empty):
        source.get(timeout=0.01)
    source.put(1)
    assert source.get() == 1


def scheduled(tokens: dict[str, int], new: int = 0, drafts: dict[str, list[int]] | None = None) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [SimpleNamespace(req_id=str(index)) for index in range(new)]
    output.scheduled_cached_reqs = CachedRequestData.make_empty()
    output.num_scheduled_tokens = tokens
    output.total_num_scheduled_tokens = sum(tokens.values())
    output.scheduled_spec_decode_tokens = drafts or {}
    return output


@pytest.mark.parametrize(
    ("output", "phase"),
    [
        (scheduled({"a": 1, "b": 1}), Phase.DECODE),
        (scheduled({"a": 7}, new=1), Phase.PREFILL),
        (scheduled({"a": 1}, new=1), Phase.PREFILL),  # all but one token was in the prefix cache
        (scheduled({"a": 1, "b": 16}), Phase.PREFILL),  # a chunk of a long prompt, or after a preemption
        (scheduled({"a": 4}, drafts={"a": [1, 2, 3]}), Phase.DECODE),
    ],
)
def test_phase_of_a_step(output: SchedulerOutput, phase: Phase) -> None:
    assert step_phase(output) is phase


def read(directory: Path) -> Snapshot:
    pages = PageDirectory(directory)
    (snapshot,), errors = pages.read()
    assert not errors
    pages.close()
    return snapshot


@pytest.mark.parametrize("per_step", [False, True])
def test_steps_on_the_page(tmp_path: Path, per_step: bool) -> None:
    granularity = Granularity.STEP if per_step else Granularity.COLLECTIVE
    page = open_page({"heartbeat_dir": str(tmp_path), "rank": 2, "incarnation": 7}, lambda page: granularity)
    steps = Steps(page)
    steps.begin_epoch(3)
    steps.launch(scheduled({"a": 7}, new=1))
    inside = read(tmp_path)
    steps.land()
    steps.land()
    steps.begin(Phase.DECODE)
    steps.end()
    after = read(tmp_path)
    assert (inside.rank, inside.incarnation, inside.epoch, inside.step) == (2, 7, 3, 1)
    assert (inside.phase, after.phase, after.step) == (Phase.PREFILL, Phase.DECODE, 2)
    assert inside.granularity is granularity
    assert inside.collective is (Collective.STEP if per_step else None)
    assert after.entered == after.completed == (0, 0, 0, 2 if per_step else 0)
    steps.launch(scheduled({"a": 1}))  # one that never ends, since a peer was lost
    steps.begin_epoch(4)
    steps.land()
    anew = read(tmp_path)
    assert (anew.epoch, anew.step, anew.entered, anew.completed) == (4, 0, (0,) * 4, (0,) * 4)
    page.close()


def test_steps_in_flight_land_in_order(tmp_path: Path) -> None:
    """As asynchronous scheduling launches them: one behind the other, some of them empty."""
    page = open_page({"heartbeat_dir": str(tmp_path), "rank": 0, "incarnation": 1}, lambda page: Granularity.STEP)
    steps = Steps(page)
    steps.begin_epoch(1)
    counts = []
    for scheduled_tokens in ({"a": 1}, {}, {"a": 1}):
        steps.launch(scheduled(scheduled_tokens))
    for _ in range(3):
        steps.land()
        counts.append((read(tmp_path).entered[Collective.STEP], read(tmp_path).completed[Collective.STEP]))
    assert counts == [(2, 1), (2, 1), (2, 2)]
    page.close()


def test_without_a_directory_there_is_no_page(tmp_path: Path) -> None:
    assert isinstance(open_page({"rank": 0, "incarnation": 1}), NoPage)


def test_a_page_that_cannot_be_made_is_no_reason_to_end(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").write_text("a file where a directory should be")
    page = open_page({"heartbeat_dir": str(tmp_path), "rank": 0, "incarnation": 1})
    page.begin_epoch(1)
    page.start_step(1, Phase.DECODE)


def test_all_calls_are_those_of_the_writer() -> None:
    for name, method in vars(NoPage).items():
        if callable(method) and not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(HeartbeatWriter, name))


class EndsLate:
    """A collective that ends right after a wait for it timed out. `error`: how it failed, if it did."""

    def __init__(self, error: str | None) -> None:
        self._error = error
        self._waits = 0

    def wait(self, timeout: timedelta) -> bool:
        self._waits += 1
        if self._waits == 1:
            raise RuntimeError("Operation timed out!")
        if self._error is not None:
            raise RuntimeError(self._error)
        return True

    def is_completed(self) -> bool:
        return True


@pytest.mark.parametrize("error", [None, "Connection closed by peer"])
def test_a_collective_that_ends_when_its_wait_times_out_is_no_fault(tmp_path: Path, error: str | None) -> None:
    page = open_page({"heartbeat_dir": str(tmp_path), "rank": 0, "incarnation": 1})
    page.enter(Collective.SYNC)
    work = AbortableWork(EndsLate(error), AbortableProcessGroup(None, page), Collective.SYNC)
    if error is None:
        assert work.wait() and work.wait()
    else:
        with pytest.raises(PeerLost, match=error):
            work.wait()
    assert read(tmp_path).completed == (0, 0, 0 if error else 1, 0)
    page.close()


def test_waiting_for_an_ended_collective_needs_no_time() -> None:
    group = GlooGroup(HashStore(), "epoch/1", 0, 1)
    work = group.host._group.allreduce([torch.ones(1)])
    while not work.is_completed():
        time.sleep(0.001)
    assert work.wait(timedelta(microseconds=1))
    group.close()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with running() as started:
        yield started


def test_collectives_are_counted_waits_beat_and_what_was_cut_short_is_never_complete(
    ranks: Ranks, tmp_path: Path
) -> None:
    members = ranks.spawn(3)
    for index, rank in enumerate(members):
        rank.start("watch", str(tmp_path), index)
        checked(rank.answer())
    build(members, "epoch/1")
    all_do(members, "gather")
    all_do(members, "reduce", 1.0)
    pages = PageDirectory(tmp_path)

    def counts() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(page.entered, page.completed) for page in pages.read()[0]]

    assert counts() == [((1, 0, 1, 0), (1, 0, 1, 0))] * 3

    for rank in members[:2]:
        rank.start("gather")
    time.sleep(0.5)
    began, before = time.monotonic(), pages.read()[0]
    time.sleep(0.5)
    after, took = pages.read()[0], time.monotonic() - began
    assert counts() == [((2, 0, 1, 0), (1, 0, 1, 0))] * 2 + [((1, 0, 1, 0), (1, 0, 1, 0))]
    for waiting in (0, 1):
        looks = (after[waiting].sequence - before[waiting].sequence) / 2
        assert 3 <= looks <= took / LOOK_UP.total_seconds() + 1, "it looks up every 50 ms"
    assert after[2].sequence == before[2].sequence

    for rank in members[:2]:
        checked(rank.ask_meanwhile("abort"))
        assert rank.answer().peer_fault
    assert counts()[:2] == [((2, 0, 1, 0), (1, 0, 1, 0))] * 2
    pages.close()
