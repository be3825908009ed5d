"""Communication groups that survive a change of membership.

vLLM keeps references to its DP, EP and EPLB groups in layers, managers and metadata. An `EpochGroup` is created once
per process and stays; what changes with every epoch is the process group that it is bound to. Binding costs one
attribute swap, so a regroup never has to hunt for stale references inside vLLM.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup, ReduceOp, Store
from vllm.distributed import parallel_state
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.distributed.utils import init_gloo_process_group
from vllm.forward_context import get_forward_context

from elastic_daemon.errors import PeerLost

CONNECT_TIMEOUT = timedelta(seconds=2)
"""How long building a group may wait for a member. All have reported before: only a death in between is waited for."""

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Upper bound for one collective. Survivors are freed by `GlooLinks.shutdown` long before; this is the last resort."""


@dataclass(frozen=True)
class PlannedProcessGroup:
    """Stands for a process group that does not exist yet: layers are built from its size and rank alone."""

    members: int
    position: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return self.position


class GlooLinks:
    """The established TCP connections of one gloo group, so that another thread can break them.

    gloo tells only the ring neighbours of a dead member about its death and has no abort that frees a blocked
    collective; shutting its sockets down does, for every survivor.
    """

    def __init__(self, fds: Iterable[int]) -> None:
        self._sockets = [socket.socket(fileno=os.dup(fd)) for fd in sorted(fds)]

    def shutdown(self) -> int:
        """Break all connections; blocked collectives raise at once. Returns how many were open."""
        broken = 0
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
                broken += 1
        return broken

    def close(self) -> None:
        for link in self._sockets:
            link.close()
        self._sockets = []


def established_tcp_sockets() -> frozenset[tuple[int, int]]:
    """Connected TCP sockets of this process: file descriptor and inode.

    The descriptor alone does not tell a socket: gloo's threads may close one at any time, and the next gets its number.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as probe:
                if probe.family in (socket.AF_INET, socket.AF_INET6) and probe.getpeername():
                    found.add((fd, os.fstat(probe.fileno()).st_ino))
        except OSError:
            continue
    return frozenset(found)


class GlooGroup:
    """One gloo process group of one epoch together with the means to break it from another thread."""

    def __init__(self, store: Store, prefix: str, position: int, members: int) -> None:
        """Meet the other members at `store` under `prefix`.

        Raises:
            PeerLost: a member did not show up within `CONNECT_TIMEOUT`.
        """
        before = established_tcp_sockets()
        try:
            self.process_group: ProcessGroup = init_gloo_process_group(
                prefix_store=PrefixStore(prefix, store),
                group_rank=position,
                group_size=members,
                timeout=CONNECT_TIMEOUT,
            )
            self.process_group._get_backend(torch.device("cpu"))._set_default_timeout(COLLECTIVE_TIMEOUT)
        except Exception as error:
            raise PeerLost(f"group {prefix} of {members} was not complete: {error}") from error
        self.links = GlooLinks(fd for fd, _ in established_tcp_sockets() - before)

    def abort(self) -> int:
        """Free whoever is blocked in a collective of this group. Safe from any thread, and more than once."""
        return self.links.shutdown()

    def close(self) -> None:
        self.links.shutdown()
        self.links.close()


@contextlib.contextmanager
def _peer_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


class GlooCommunicator:
    """Dispatch and combine of expert-parallel layers over gloo, for groups of any size including one.

    vLLM's CPU communicator has neither `all_gatherv` nor `reduce_scatterv`, and its all2all manager is bound to groups
    of the start. Here one `all_gather` moves hidden states, weights and ids together, and one `all_to_all` brings
    partial outputs home, where they are added in rank order, so that the sum does not depend on timing.
    """

    def __init__(self, group: EpochGroup) -> None:
        self._group = group
        self.all2all_manager = self
        self.support_fault_tolerance = False  # of vLLM's kind, which masks ranks inside kernels

    @property
    def world_size(self) -> int:
        return self._group.world_size

    def destroy(self) -> None:
        """Nothing of its own to release; the group owns the connections."""

    def _token_counts(self, own: int) -> list[int]:
        metadata = get_forward_context().dp_metadata
        if metadata is None:
            return [own] * self.world_size
        counts = metadata.get_chunk_sizes_across_dp_rank()
        assert counts is not None and len(counts) == self.world_size
        return counts

    def all_gatherv(self, tensors: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """Concatenate every rank's rows. `tensors[i]` is [rows, ...]; `counts` are the rows of each rank, or zero."""
        rows = max(counts)
        if rows == 0:
            return list(tensors)  # on every rank alike: nobody waits for a collective
        flat = [t.reshape(t.shape[0], math.prod(t.shape[1:])).contiguous().view(torch.uint8) for t in tensors]
        widths = [t.shape[1] for t in flat]
        packed = torch.zeros((rows, sum(widths)), dtype=torch.uint8)
        torch.cat(flat, dim=1, out=packed[: flat[0].shape[0]])
        gathered = torch.empty((self.world_size * rows, packed.shape[1]), dtype=torch.uint8)
        with _peer_loss():
            self._group.cpu_group._allgather_base(gathered, packed).wait()
        if any(count != rows for count in counts):
            gathered = torch.cat([gathered[i * rows : i * rows + count] for i, count in enumerate(counts)])
        outputs, start = [], 0
        for tensor, width in zip(tensors, widths, strict=True):
            part = gathered[:, start : start + width].contiguous().view(tensor.dtype)
            outputs.append(part.reshape(-1, *tensor.shape[1:]))
            start += width
        return outputs

    def reduce_scatterv(self, tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Sum [total rows, width] over ranks; returns this rank's rows."""
        if not any(counts):
            return tensor
        own = counts[self._group.rank_in_group]
        received = torch.empty((self.world_size * own, tensor.shape[1]), dtype=tensor.dtype)
        with _peer_loss():
            self._group.cpu_group.alltoall_base(received, tensor.contiguous(), [own] * self.world_size, counts).wait()
        return received.view(self.world_size, own, tensor.shape[1]).sum(dim=0)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Every rank gets the tokens, routing weights and physical expert ids of all ranks."""
        tensors = [hidden_states, topk_weights, topk_ids, *(extra_tensors or [])]
        if self.world_size > 1:
            tensors = self.all_gatherv(tensors, self._token_counts(hidden_states.shape[0]))
        head = tuple(tensors[:3])
        return head if extra_tensors is None else (*head, tensors[3:])

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Bring each token's partial expert outputs back to its rank and add them."""
        if self.world_size == 1:
            return hidden_states
        return self.reduce_scatterv(hidden_states, self._token_counts(hidden_states.shape[0] // self.world_size))

    def combine_into_output(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        return output.copy_(self.combine(hidden_states, is_sequence_parallel))

    def allocate_combine_input(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            with _peer_loss():
                self._group.cpu_group.allreduce([tensor], ReduceOp.SUM).wait()
        return tensor


class EpochTransfers(EplbCommunicator):
    """Moves expert weights between ranks over the group of the current epoch.

    vLLM's communicators are bound to groups that torch knows globally, for good. Messages between two ranks are matched
    by their number, so both sides must add them in the same order, which vLLM's plan ensures.
    """

    def __init__(self, group: EpochGroup) -> None:
        self._group = group
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._receives: list[tuple[torch.Tensor, int]] = []

    def add_send(self, tensors: list[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        self._sends += [(tensor, dst_rank) for tensor in tensors]

    def add_recv(self, tensors: list[torch.Tensor], src_rank: int, expert_id: int) -> None:
        self._receives += [(tensor, src_rank) for tensor in tensors]

    def execute(self) -> None:
        """Complete all transfers. Raises PeerLost; what was to be received is then undefined."""
        sends, receives = self._sends, self._receives
        self._sends, self._receives = [], []
        group = self._group.cpu_group
        with _peer_loss():
            works = [group.recv([tensor], src, tag) for tensor, src, tag in _numbered(receives)]
            works += [group.send([tensor.contiguous()], dst, tag) for tensor, dst, tag in _numbered(sends)]
            for work in works:
                work.wait()


def _numbered(transfers: list[tuple[torch.Tensor, int]]) -> Iterator[tuple[torch.Tensor, int, int]]:
    count: Counter[int] = Counter()
    for tensor, peer in transfers:
        yield tensor, peer, count[peer]
        count[peer] += 1


class EpochGroup(GroupCoordinator):
    """A vLLM group coordinator whose process group is replaced with every epoch."""

    def __init__(self, name: str, position: int, members: int) -> None:
        self.unique_name = f"{name}:elastic"
        self.local_rank = 0
        self.device_index = 0
        self.device = torch.device("cpu")
        self.backend = "gloo"
        self.mq_broadcaster = None
        self.use_custom_op_call = False
        self.use_cpu_custom_send_recv = False
        self.device_communicator: Any = GlooCommunicator(self)
        self.bind(PlannedProcessGroup(members, position))

    def bind(self, process_group: ProcessGroup | PlannedProcessGroup) -> None:
        """Use `process_group` from now on. All attributes that depend on size or rank follow."""
        self.cpu_group: Any = process_group
        self.device_group: Any = process_group
        self.world_size = process_group.size()
        self.rank = self.rank_in_group = process_group.rank()
        self.ranks = list(range(self.world_size))

    def destroy(self) -> None:
        """The epoch's `GlooGroup` owns what there is to release."""


@dataclass
class EpochGroups:
    """DP, EP and EPLB groups of a rank. One gloo group serves all three: their collectives come from one thread."""

    dp: EpochGroup
    ep: EpochGroup
    eplb: EpochGroup
    current: GlooGroup | None = None

    @classmethod
    def install(cls, position: int, members: int) -> EpochGroups:
        """Replace vLLM's size-one groups of this process by planned groups of `members`."""
        groups = cls(*(EpochGroup(name, position, members) for name in ("dp", "ep", "eplb")))
        world = parallel_state.get_world_group()
        replaced = parallel_state._replace_active_groups(
            world=world, dp=groups.dp, ep=groups.ep, eplb=groups.eplb, node_count=1
        )
        for group in replaced:
            if group is not None and group is not world:
                group.destroy()
        return groups

    def bind(self, group: GlooGroup) -> None:
        self.current = group
        for member in (self.dp, self.ep, self.eplb):
            member.bind(group.process_group)

    def abort(self) -> int:
        """Free this rank from whatever collective it is in. Called from the control thread."""
        group = self.current
        return group.abort() if group is not None else 0

    def release(self) -> None:
        """Drop the broken group; its connections are closed and vLLM holds no reference to it afterwards."""
        group, self.current = self.current, None
        if group is None:
            return
        planned = PlannedProcessGroup(self.dp.world_size, self.dp.rank_in_group)
        for member in (self.dp, self.ep, self.eplb):
            member.bind(planned)
        group.close()
