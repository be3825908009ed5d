"""The connections of one epoch on GPUs: NCCL for tensors on the device, gloo for what the hosts agree on.

A collective whose peer died does not fail on NCCL: its kernel waits on the device for ever, and the host waits in the
next synchronization. Aborting the communicator from another thread ends the kernel, and the host comes back, with
rubbish in the tensors that the kernel was to fill. So everything that leaves a step is checked against the abort
first: a group is marked as aborted before its kernels are. Nobody waits for the rest of an abort (`nccl_abort.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import structlog
import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroupNCCL, Store

from elastic_daemon.engine.gloo import COLLECTIVE_TIMEOUT, KINDS, GlooGroup
from elastic_daemon.engine.heartbeat import Page
from elastic_daemon.engine.leavable import never
from elastic_daemon.engine.nccl_abort import NcclAbort
from elastic_daemon.engine.nccl_errors import ErrorPoll, async_error_of
from elastic_daemon.engine.nccl_meeting import Meeting, meet
from elastic_daemon.engine.stream_counters import CollectiveCount
from elastic_daemon.errors import PeerLost
from watchdog.heartbeat.layout import Collective

log = structlog.get_logger(__name__)

RANK_ENVIRONMENT = {
    # torch's own watchdog ends a process whose collective fails or lasts too long: here, the survivor's.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    # It would sleep four times as long, with the lock that every collective takes, when NCCL has found an error.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""What a rank on a GPU needs in its environment before its first NCCL communicator is made."""

MEETING_TIMEOUT = timedelta(seconds=30)
"""How long NCCL's id is waited for at the store. Who gives it has met the others over gloo just before; so this bounds
the life of a thread that was left there."""

ROOM_FOR_A_GROUP = 2 << 30
"""Bytes that have to be free for a communicator to be made while another still holds its memory."""
ABORT_PATIENCE_S = 1.5
"""How long a group waits for memory of those before it: less than a regroup may take. An abort took 0.9 s at most."""
FIRST_BYTES = 1 << 16
"""What each member sends to each in the first collectives, which are there to connect them."""


def _free_bytes(device: torch.device) -> int:
    """Of the GPU's memory, whoever uses it: others that share the GPU change it at the same time."""
    return int(torch.cuda.mem_get_info(device)[0])


class NcclWork:
    """A collective that was put on a stream. `work` is None where the current stream has it already."""

    def __init__(self, work: Any, complete: Callable[[], None]) -> None:
        """`complete`: puts the count of completed collectives on the stream."""
        self._work = work
        self._complete = complete

    def wait(self, *_: Any) -> bool:
        """Let the stream wait, not the host. Raises PeerLost where torch can say already that it has failed."""
        try:
            waited = self._work is None or bool(self._work.wait())
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        self._complete()
        return waited


def _wait_for_room(device: torch.device, is_void: Callable[[], bool]) -> None:
    """Where a group would find too little memory beside those that are taken down, wait for these."""
    deadline = time.monotonic() + ABORT_PATIENCE_S
    while (running := NcclAbort.running()) and _free_bytes(device) < ROOM_FOR_A_GROUP and not is_void():
        if time.monotonic() > deadline:
            log.warning("nccl_abort_slow", seconds=ABORT_PATIENCE_S, free_mib=_free_bytes(device) >> 20)
            break
        running[0].wait(0.05)


def _connect(store: Store, position: int, members: int, device: torch.device, meeting: Meeting[Any]) -> Any:
    """A group whose first collectives are complete. Waits for members, for ever if one is gone. Raises RuntimeError.

    What a communicator needs for a kind of collective it makes in the first of that kind: so there is one here of each
    that a step has. Later, the main thread would wait there for members.
    """
    torch.cuda.set_device(device)  # which is current differs from thread to thread
    options = ProcessGroupNCCL.Options()
    options._timeout = COLLECTIVE_TIMEOUT
    group = ProcessGroupNCCL(store, position, members, options)
    try:
        group.eager_connect_single_device(device)
    finally:
        meeting.made(group)  # also one that has failed: its end would have to be waited for
    group.allreduce([torch.ones(1, device=device)]).wait()
    if members > 1:
        sent, received = torch.zeros(2, members * FIRST_BYTES, dtype=torch.uint8, device=device)
        splits = [FIRST_BYTES] * members
        group._allgather_base(received, sent[:FIRST_BYTES]).wait()
        group.alltoall_base(received, sent, splits, splits).wait()
    # Not asked for with `query`: that holds the GIL, while the driver may hold it up until an older group is freed.
    first = torch.cuda.Event(blocking=True)
    first.record()
    first.synchronize()
    return group


class NcclProcessGroup:
    """An NCCL process group that another thread may abort. Passes for a torch ProcessGroup where vLLM wants one."""

    def __init__(
        self,
        store: Store,
        position: int,
        members: int,
        device: torch.device,
        is_void: Callable[[], bool] = never,
        count: CollectiveCount | None = None,
    ) -> None:
        """Meet the others and make the communicator, first collective included, which does not count.

        Raises:
            PeerLost: NCCL could not connect all members; or `is_void()` said meanwhile that nobody waits for it.
        """
        self._device = device
        self._position, self._members = position, members
        self._is_void = is_void
        self._count = count
        _wait_for_room(device, is_void)
        try:
            own = store.clone()  # one that a thread waits at is locked for all others
            own.set_timeout(MEETING_TIMEOUT)
            self._group, self._abort = meet(partial(_connect, own, position, members, device), is_void)
        except (RuntimeError, PeerLost) as error:
            raise PeerLost(f"NCCL group of {members} was not complete: {error}") from error
        self._async_error = async_error_of(self._group)

    def size(self) -> int:
        return self._members

    def rank(self) -> int:
        return self._position

    def void(self) -> None:
        """From here on nothing is started, and nothing that was started counts."""
        self._abort.void()

    def abort(self) -> bool:
        """Have the kernels of this group ended, which takes milliseconds. Returns whether this call did it."""
        return self._abort.begin()

    @property
    def ended(self) -> NcclAbort:
        """The abort of this group."""
        return self._abort

    def async_error(self) -> int | None:
        """What NCCL has found by itself, 0 for nothing; None when the group is over, or NCCL cannot be asked.

        From any thread. This call never waits for an abort, nor for a collective that is being started.
        """
        return None if self._async_error is None else self._abort.unless_void(self._async_error.read)

    def synchronize(self) -> None:
        """Wait until all that was started is complete.

        Raises PeerLost if it may not have been completed but aborted, here or by a peer: that is after the fence.
        """
        torch.cuda.current_stream(self._device).synchronize()
        if self._abort.is_void or self._is_void():
            raise PeerLost("the group was aborted")

    def close(self) -> None:
        """Abort, and wait until the device is done with what was started: buffers may be used again afterwards."""
        self.abort()
        torch.cuda.synchronize(self._device)
        self._group = None

    def allreduce(self, tensors: Sequence[torch.Tensor], *options: Any) -> NcclWork:
        return self._start("allreduce", tensors, *options)

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor) -> NcclWork:
        return self._start("_allgather_base", output, tensor)

    def alltoall_base(
        self, output: torch.Tensor, tensor: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> NcclWork:
        return self._start("alltoall_base", output, tensor, output_splits, input_splits)

    def _start(self, name: str, *arguments: Any) -> NcclWork:
        kind = KINDS[name]
        with self._abort.in_use():
            if self._count is not None:
                self._count.enter(kind)
            try:
                work = getattr(self._group, name)(*arguments)
            except RuntimeError as error:
                self._leave_nccl_group()
                raise PeerLost(str(error)) from error
        return NcclWork(work, lambda: self._complete(kind))

    def _leave_nccl_group(self) -> None:
        """An all-to-all is a group of sends and receives for NCCL, which torch leaves open when one of them fails.

        NCCL's depth of groups is one for all communicators of a thread: until it is 0 again, it takes all collectives
        of later epochs without starting any. In no group this is an error of NCCL's, and nothing else.
        """
        with contextlib.suppress(RuntimeError):
            self._group._group_end()

    def _complete(self, kind: Collective) -> None:
        if self._count is not None:
            self._count.complete(kind)


def prepare(device: torch.device) -> NcclAbort:
    """Do now what NCCL does once in a process, with a group of this rank alone: later, all members would wait for it.

    Returns the abort of that group, which holds memory of the GPU until it is over. Raises PeerLost if NCCL fails.
    """
    started = time.monotonic()
    group = NcclProcessGroup(HashStore(), 0, 1, device)
    group.close()
    log.info("nccl_prepared", seconds=round(time.monotonic() - started, 3))
    return group.ended


class NcclGroup:
    """The connections among the members of one epoch on GPUs."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        position: int,
        members: int,
        device: torch.device,
        is_void: Callable[[], bool] = never,
        page: Page | None = None,
        count: CollectiveCount | None = None,
    ) -> None:
        """Meet the other members at `store` under `prefix`, first over gloo: NCCL has no patience of its own.

        `page`: heartbeat of this rank. What the hosts agree on is counted in it, and NCCL's asynchronous error is
        reported there. `count`: counts collectives on the device, where it can; else the engine core counts steps.

        Raises:
            PeerLost: a member did not show up in time.
        """
        self._gloo = GlooGroup(store, prefix, position, members, is_void, page)
        self.host = self._gloo.host
        started, free = time.monotonic(), _free_bytes(device)
        try:
            meeting = PrefixStore(f"{prefix}/nccl", store)
            self.device = NcclProcessGroup(meeting, position, members, device, is_void, count)
        except PeerLost:
            self._gloo.close()
            raise
        self._poll = ErrorPoll(self.device.async_error, page) if page is not None else None
        seconds, mib = round(time.monotonic() - started, 3), (free - _free_bytes(device)) >> 20
        log.info("nccl_connected", position=position, members=members, seconds=seconds, mib=mib)

    def abort(self) -> int:
        """Free whoever is blocked in a collective of either kind. Returns how much was still open."""
        self.device.void()  # first: a host freed from gloo must not go on with tensors of the device
        return self._gloo.abort() + self.device.abort()

    def close(self) -> None:
        self.device.close()
        if self._poll is not None:
            self._poll.close()
        self._gloo.close()
