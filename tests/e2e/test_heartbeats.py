"""What the ranks of a running daemon write about themselves, and whom a judge names by it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.e2e.cluster import PROMPTS, Cluster, Stream, run_streams
from tests.e2e.judging import Judging, stopped, stopped_where
from tests.timing import SLACK_S
from watchdog.heartbeat.findings import FindingKind
from watchdog.heartbeat.layout import Phase, ProcessState, Snapshot
from watchdog.heartbeat.page import page_path
from watchdog.heartbeat.reader import PageDirectory, PageReader

pytestmark = pytest.mark.e2e

NAMED_WITHIN_S = 3.0 + SLACK_S
LEARN_S = 1.0
"""What a judge sees of healthy ranks before one is stopped."""


@contextlib.contextmanager
def start_in(directory: Path) -> Iterator[tuple[Cluster, Judging]]:
    """A daemon that nobody else judges, and what was seen of its start."""
    with Judging(directory) as start:
        cluster = Cluster(directory, "--shutdown-timeout", "1", env={"ELASTIC_WATCHDOG": "off"})
        with cluster:
            yield cluster, start


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Judging]]:
    with start_in(tmp_path_factory.mktemp("hb", numbered=True) / "run") as both:
        yield both


@pytest.fixture
def cluster(watched: tuple[Cluster, Judging]) -> Cluster:
    return watched[0]


def read(cluster: Cluster) -> list[Snapshot]:
    pages = PageDirectory(cluster.runtime_dir)
    snapshots, errors = pages.read()
    pages.close()
    assert not errors
    return snapshots


def at_rest(cluster: Cluster, ranks: int) -> list[Snapshot]:
    """The pages of the living ranks, once all of them are idle at the same point."""

    def find() -> list[Snapshot] | None:
        living = [page for page in read(cluster) if page.process is not ProcessState.GONE]
        same = {(page.epoch, page.step, page.entered, page.completed, page.phase) for page in living}
        return living if len(living) == ranks and len(same) == 1 and living[0].phase is Phase.IDLE else None

    found: list[Snapshot] = cluster.wait_for(find)
    return found


def assert_served(streams: list[Stream], tokens: int) -> None:
    assert [(one.error, len(one.token_ids)) for one in streams] == [(None, tokens)] * len(streams)


@contextlib.contextmanager
def load(cluster: Cluster) -> Iterator[None]:
    """Short requests all the time, which must all be served in full."""
    served: list[list[Stream]] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            served.append(run_streams(cluster, PROMPTS[:8], max_tokens=25))

    clients = threading.Thread(target=run)
    clients.start()
    try:
        yield
    finally:
        over.set()
        clients.join()
    assert served
    for streams in served:
        assert_served(streams, 25)


def test_start_is_told_and_nobody_is_accused(watched: tuple[Cluster, Judging], tmp_path: Path) -> None:
    cluster, start = watched
    pages = at_rest(cluster, 4)
    assert {page.rank: page.pid for page in pages} == {rank: cluster.pid(rank) for rank in range(4)}
    assert {page.epoch for page in pages} == {cluster.health()["epoch"]}
    assert {Phase.LOADING, Phase.IDLE} <= start.phases()
    assert not start.accused()
    phases = start.phases()
    for attempt in range(3):  # on CPU it is short, and a busy machine may let nobody look in time
        if Phase.COMPILING not in phases:
            with start_in(tmp_path / str(attempt)) as (_, again):
                phases = again.phases()
                assert not again.accused()
    assert Phase.COMPILING in phases


def test_idle_ranks_beat_and_stand_still(cluster: Cluster) -> None:
    before = at_rest(cluster, 4)

    def beaten() -> bool:
        """Five times a second, for two seconds; a beat is two steps of the sequence."""
        return all(new.sequence - old.sequence >= 2 * 5 * 2 for old, new in zip(before, read(cluster), strict=True))

    cluster.wait_for(beaten, 2.0 + SLACK_S)
    for old, new in zip(before, at_rest(cluster, 4), strict=True):
        assert (new.step, new.entered, new.phase_since_ns) == (old.step, old.entered, old.phase_since_ns)


def test_steps_and_collectives_are_the_same_on_all_ranks(cluster: Cluster) -> None:
    before = at_rest(cluster, 4)[0]
    with Judging(cluster.runtime_dir) as judging:
        assert_served(run_streams(cluster, max_tokens=30), 30)
        after = at_rest(cluster, 4)[0]
        judging.wait_for(lambda: Phase.IDLE in judging.phases(), 5)
        for _ in range(30):  # a prefill is short, and pages are looked at ten times a second
            if Phase.PREFILL not in judging.phases():
                run_streams(cluster, max_tokens=1)
    steps = after.step - before.step
    dispatched, combined, synced, whole = (new - old for new, old in zip(after.entered, before.entered, strict=True))
    assert steps >= 30
    assert dispatched >= steps and dispatched % steps == 0, "once per layer and step"
    assert combined >= dispatched and synced >= steps and whole == 0
    assert after.entered == after.completed
    assert {Phase.IDLE, Phase.PREFILL, Phase.DECODE} <= judging.phases()
    assert not judging.accused()


def name(judging: Judging, stop: AbstractContextManager[float], rank: int) -> None:
    """Stop a rank. Both judges, the one that is told by the kernel and the one that is not, name it and nobody else."""
    assert not judging.accused()
    with stop as at:
        judging.wait_for(lambda: {seen.blind for seen in judging.confirmed} == {False, True}, 2 * NAMED_WITHIN_S)
        took = {
            blind: min(seen.at for seen in judging.confirmed if seen.blind is blind) - at for blind in (False, True)
        }
        time.sleep(0.3)
    print(f"rank {rank} named after {took[False]:.2f} s, by its page alone after {took[True]:.2f} s")
    assert judging.accused() == {(FindingKind.HUNG, rank)}
    assert max(took.values()) <= NAMED_WITHIN_S


@pytest.mark.parametrize("rank", [0, 2])
def test_idle_rank_that_stops_is_named(cluster: Cluster, rank: int) -> None:
    at_rest(cluster, 4)
    with Judging(cluster.runtime_dir) as judging:
        time.sleep(LEARN_S)
        name(judging, stopped(cluster.pid(rank)), rank)


def test_rank_that_stops_in_decode_is_named(cluster: Cluster) -> None:
    """Its peers sit in a collective; it stopped on the way there, or inside as well."""

    with load(cluster):
        for rank, inside in ((1, True), (3, False), (0, True), (2, False)):
            with Judging(cluster.runtime_dir) as judging:
                time.sleep(LEARN_S)
                name(judging, stopped_where(cluster, rank, inside), rank)


def test_stalls_under_load_accuse_nobody_and_blind_nobody(cluster: Cluster) -> None:
    """Half a minute in which, every second, some rank does not run for 0.5 s. A real stop is named as ever then."""
    noise, over = random.Random(5), threading.Event()
    pids = [cluster.pid(rank) for rank in range(4)]

    def stall() -> None:
        while not over.wait(0.5):
            with stopped(noise.choice(pids)):
                time.sleep(0.5)

    with load(cluster), Judging(cluster.runtime_dir) as judging:
        stalling = threading.Thread(target=stall)
        stalling.start()
        try:
            time.sleep(30)
        finally:
            over.set()
            stalling.join()
        name(judging, stopped_where(cluster, 1, inside=True), 1)


def test_pages_outlive_a_kill_and_follow_the_epochs(cluster: Cluster) -> None:
    """Last in this file: it uses the cluster up."""
    epoch = cluster.health()["epoch"]
    killed = cluster.pid(3)
    # Open before it dies: whoever has seen the end of a rank may remove its page.
    [incarnation] = [page.incarnation for page in read(cluster) if page.rank == 3]
    page_of_the_dead = PageReader(page_path(cluster.runtime_dir, incarnation))
    with Judging(cluster.runtime_dir) as judging:
        time.sleep(LEARN_S)
        assert_served(run_streams(cluster, max_tokens=40, during=lambda: os.kill(killed, signal.SIGKILL)), 40)
        assert judging.accused() <= {(FindingKind.DEAD, 3)}
    dead = page_of_the_dead.read()
    page_of_the_dead.close()
    assert (dead.pid, dead.epoch, dead.process) == (killed, epoch, ProcessState.GONE)
    assert dead.phase in (Phase.PREFILL, Phase.DECODE) and dead.step > 0

    survivors = at_rest(cluster, 3)
    assert {page.epoch for page in survivors} == {epoch + 1}
    assert survivors[0].entered == survivors[0].completed
    assert 0 < survivors[0].step < dead.step, "counted from the start of the epoch"

    cluster.kill(0, 1)
    cluster.wait_for(lambda: cluster.health()["status"] == "unavailable")
    [last] = [page for page in read(cluster) if page.rank == 2]
    assert last.phase is Phase.PARKED
    beats = last.sequence

    def beaten() -> bool:
        """Five times a second, while it is parked."""
        return next(page for page in read(cluster) if page.rank == 2).sequence - beats >= 2 * 5

    cluster.wait_for(beaten, 1.0 + SLACK_S)
