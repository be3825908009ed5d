"""One gloo process group of one epoch, and the means to get out of it.

gloo has no abort. A collective whose peer died raises in the ring neighbours of the dead and leaves others blocked;
one that is cut in the middle of a message may never raise at all, though all its connections are gone. So a rank is
freed in two ways: another thread shuts its connections down, and its own waits look up now and then whether that has
happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import structlog
import torch
from torch.distributed import PrefixStore, ProcessGroup, Store
from vllm.distributed.utils import init_gloo_process_group

from elastic_daemon.engine.heartbeat import NoPage, Page
from elastic_daemon.engine.leavable import never, run_leavable
from elastic_daemon.engine.links import Links, connected_sockets
from elastic_daemon.errors import PeerLost
from watchdog.heartbeat.layout import Collective

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT = timedelta(seconds=2)
"""How long building a group may wait for a member. All have reported before: only a death in between is waited for.

gloo takes it five times for a connection that another member opens and closes again meanwhile: see `GlooGroup`."""

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Upper bound for one collective. Survivors are freed long before; this is the last resort."""

LOOK_UP = timedelta(milliseconds=50)
"""How often a waiting rank looks up whether its group was aborted. A collective that completes wakes it at once."""

ABORT_GRACE_S = 0.1
"""How long an aborted collective may take to raise by itself before it counts as stuck."""

KINDS = {
    "_allgather_base": Collective.DISPATCH,
    "alltoall_base": Collective.COMBINE,
    "allreduce": Collective.SYNC,
}
"""What each operation counts as in the heartbeat. A rearrangement's exchange of experts is an all-to-all as well."""

_ABANDONED: list[tuple[ProcessGroup, Any]] = []
"""Groups with the work that is stuck in them: destroying one would block on its thread. Each costs a few threads until
gloo's own timeout ends the work."""


def peer_fault(error: BaseException | None) -> BaseException | None:
    """What in the chain of `error` says that a member of the group is gone. None: it is a defect of our own.

    gloo raises plain RuntimeErrors, with the path of its source in the message; and torch's logging of a failed
    collective raises another error on top, since it does not know groups that were built without its global state. So
    the innermost says what happened.
    """
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    ours = [link for link in chain if isinstance(link, PeerLost)]
    theirs = [link for link in chain if isinstance(link, RuntimeError) and "gloo" in str(link)]
    return (ours or theirs or [None])[-1]


def drop_abandoned() -> None:
    """Destroy the abandoned groups whose collective has ended after all."""
    _ABANDONED[:] = [(group, work) for group, work in _ABANDONED if not work.is_completed()]


class AbortableWork:
    """A collective under way. Waiting for it ends with its group, and is told to the heartbeat."""

    def __init__(self, work: Any, group: AbortableProcessGroup, kind: Collective) -> None:
        self._work = work
        self._group = group
        self._kind: Collective | None = kind

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises PeerLost when the group was aborted or the collective failed."""
        ended = False
        while True:
            try:
                done = bool(self._work.wait(LOOK_UP))
                break
            except RuntimeError as error:
                if ended:
                    raise PeerLost(str(error)) from error
                # It may have ended, well or badly, just after the wait timed out. Another wait tells, without waiting.
                if ended := self._work.is_completed():
                    continue
                if self._group.is_stuck():
                    raise PeerLost("the group was aborted while a collective was stuck in it") from error
                self._group.page.beat()
        if self._kind is not None:
            self._group.page.complete(self._kind)
            self._kind = None
        return done


class AbortableProcessGroup:
    """A gloo process group whose collectives can be left. Passes for a torch ProcessGroup where vLLM wants one."""

    def __init__(self, process_group: ProcessGroup, page: Page) -> None:
        """`page`: where collectives are counted and waits beat."""
        self._group = process_group
        self.page = page
        self._aborted_at: float | None = None
        self._last: Any = None

    def size(self) -> int:
        return int(self._group.size())

    def rank(self) -> int:
        return int(self._group.rank())

    def abort(self) -> None:
        if self._aborted_at is None:
            self._aborted_at = time.monotonic()

    def is_stuck(self) -> bool:
        """Whether what has not raised since the abort never will."""
        return self._aborted_at is not None and time.monotonic() > self._aborted_at + ABORT_GRACE_S

    def synchronize(self) -> None:
        """Collectives in host memory are complete when they were waited for."""

    def close(self) -> None:
        """Destroy the group, unless a collective is stuck in it."""
        group, self._group = self._group, None
        drop_abandoned()
        if self._last is not None and not self._last.is_completed():
            _ABANDONED.append((group, self._last))
            log.warning("group_abandoned", pid=os.getpid(), position=group.rank(), abandoned=len(_ABANDONED))

    def allreduce(self, tensors: Sequence[torch.Tensor], *options: Any) -> AbortableWork:
        return self._start("allreduce", tensors, *options)

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor) -> AbortableWork:
        return self._start("_allgather_base", output, tensor)

    def alltoall_base(
        self, output: torch.Tensor, tensor: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> AbortableWork:
        return self._start("alltoall_base", output, tensor, output_splits, input_splits)

    def _start(self, name: str, *arguments: Any) -> AbortableWork:
        if self._aborted_at is not None:
            raise PeerLost("the group was aborted")
        kind = KINDS[name]
        self.page.enter(kind)
        try:
            self._last = work = getattr(self._group, name)(*arguments)
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return AbortableWork(work, self, kind)


def _build(store: Store, prefix: str, position: int, members: int) -> ProcessGroup:
    return init_gloo_process_group(
        prefix_store=PrefixStore(prefix, store), group_rank=position, group_size=members, timeout=CONNECT_TIMEOUT
    )


class GlooGroup:
    """One gloo process group of one epoch together with the means to break it from another thread."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        position: int,
        members: int,
        is_void: Callable[[], bool] = never,
        page: Page | None = None,
    ) -> None:
        """Meet the other members at `store` under `prefix`, unless `is_void()` says meanwhile that nobody waits for it.

        `page`: the heartbeat of this rank, if it has one.

        Raises:
            PeerLost: a member did not show up, or was gone before all were connected; or it was void.
        """
        try:
            own = store.clone()  # one that a thread waits at is locked for all others
            before = connected_sockets()
            # It can be left, since gloo waits ten seconds for a connection that was broken before it was complete. The
            # thread ends then, and leaves nothing.
            build = partial(_build, own, prefix, position, members)
            group = run_leavable(build, is_void, "gloo-connect")
            group._get_backend(torch.device("cpu"))._set_default_timeout(COLLECTIVE_TIMEOUT)
        except (RuntimeError, PeerLost) as error:
            raise PeerLost(f"group {prefix} of {members} was not complete: {error}") from error
        self.host = self.device = AbortableProcessGroup(group, page or NoPage())
        self.links = Links(connected_sockets() - before)

    def abort(self) -> int:
        """Free whoever is blocked in a collective of this group. Safe from any thread, and more than once.

        Returns the number of connections that were still open.
        """
        self.host.abort()
        return self.links.shutdown()

    def close(self) -> None:
        self.links.shutdown()
        self.links.close()
        self.host.close()
