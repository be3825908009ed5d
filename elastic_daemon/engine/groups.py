"""Communication groups that survive a change of membership.

vLLM keeps references to its DP, EP and EPLB groups in layers, managers and metadata. An `EpochGroup` is created once
per process and stays; what changes with every epoch are the process groups that it is bound to, one for tensors in host
memory and one for those on the device. Binding costs an attribute swap or two, so a regroup never has to hunt for stale
references inside vLLM.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.distributed import parallel_state
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator
from vllm.distributed.parallel_state import GraphCaptureContext, GroupCoordinator
from vllm.forward_context import get_forward_context
from vllm.v1.worker.dp_utils import skip_dp_coordination

from elastic_daemon.engine.gloo import AbortableProcessGroup


class EpochConnections(Protocol):
    """The connections among the members of one epoch, and the means to get out of them."""

    host: AbortableProcessGroup
    """For tensors in host memory: what the engines agree on."""

    @property
    def device(self) -> Any:
        """For tensors on the device of the rank; on CPU the same group as `host`."""

    def abort(self) -> int:
        """Free whoever is blocked in a collective. Safe from any thread. Returns how much was still open."""

    def close(self) -> None:
        """Abort, and give back what the connections hold. Called by the thread that starts the collectives."""


@dataclass(frozen=True)
class PlannedProcessGroup:
    """Stands for a process group that does not exist yet: layers are built from its size and rank alone."""

    members: int
    position: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return self.position


NO_EXPERT = -1
"""What vLLM has for expert id where a batch is only padded; kernels pass over it."""


class Done:
    """A collective that is complete."""

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class RehearsalProcessGroup(PlannedProcessGroup):
    """A group whose other members seem to do what this one does: a rank warms up alone, with the shapes to come.

    `missing`: so many of them, fewer than all, seem to have a token less.
    """

    missing: int = 0

    def parts(self, counts: list[int]) -> list[int]:
        """Tokens of each member. `counts`: if none were missing."""
        fewer = {(self.position + 1 + number) % self.members for number in range(self.missing)}
        return [count - (member in fewer) for member, count in enumerate(counts)]

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor) -> Done:
        output.view(self.members, *tensor.shape).copy_(tensor.expand(self.members, *tensor.shape))
        return Done()

    def alltoall_base(
        self, output: torch.Tensor, tensor: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> Done:
        start = sum(input_splits[: self.position])
        own = tensor[start : start + input_splits[self.position]]
        output.view(self.members, *own.shape).copy_(own.expand(self.members, *own.shape))
        return Done()


class EpochCommunicator:
    """Dispatch and combine of expert-parallel layers, for groups of any size including one.

    vLLM's CPU communicator has neither `all_gatherv` nor `reduce_scatterv`, and its all2all managers are bound to
    groups of the start. Here one `all_gather` moves hidden states, weights and ids together, and one `all_to_all`
    brings partial outputs home, where they are added in rank order, so that the sum does not depend on timing.
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
        group = self._group.device_group
        return group.parts(counts) if isinstance(group, RehearsalProcessGroup) else counts

    def all_gatherv(self, tensors: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """Concatenate every rank's rows. `tensors[i]` is [rows, ...]; `counts` are the rows of each rank, or zero."""
        rows = max(counts)
        if rows == 0:
            return list(tensors)  # on every rank alike: nobody waits for a collective
        flat = [t.reshape(t.shape[0], math.prod(t.shape[1:])).contiguous().view(torch.uint8) for t in tensors]
        widths = [t.shape[1] for t in flat]
        packed = flat[0].new_zeros((rows, sum(widths)))
        torch.cat(flat, dim=1, out=packed[: flat[0].shape[0]])
        gathered = packed.new_zeros((self.world_size * rows, packed.shape[1]))  # what is left if it is aborted
        self._group.device_group._allgather_base(gathered, packed).wait()
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
        received = tensor.new_zeros((self.world_size * own, tensor.shape[1]))  # or NaN of old memory might be sampled
        self._group.device_group.alltoall_base(received, tensor.contiguous(), [own] * self.world_size, counts).wait()
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
            if self._group.experts is not None and topk_ids.dtype in (torch.int32, torch.int64):
                # A gather that was aborted may leave what was in NCCL's buffers. The kernels behind it still run, and
                # an id without an expert would end the device's context, and with it this rank.
                tensors[2].clamp_(NO_EXPERT, self._group.experts - 1)
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
            group = self._group.cpu_group if tensor.is_cpu else self._group.device_group
            group.allreduce([tensor]).wait()  # a sum, as by torch's default
        return tensor


class EpochTransfers(EplbCommunicator):
    """Moves expert weights between ranks over the group of the current epoch, all of a layer in one collective.

    vLLM's communicators are bound to groups that torch knows globally, for good. What two ranks exchange is matched by
    order, so both sides must add it in the same one, which vLLM's plan ensures.
    """

    def __init__(self, group: EpochGroup) -> None:
        self._group = group
        self.received_bytes = 0
        self._sends: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._receives: dict[int, list[torch.Tensor]] = defaultdict(list)

    def add_send(self, tensors: list[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        self._sends[dst_rank] += tensors

    def add_recv(self, tensors: list[torch.Tensor], src_rank: int, expert_id: int) -> None:
        self._receives[src_rank] += tensors

    def execute(self) -> None:
        """Complete all transfers. Raises PeerLost; nothing was received then."""
        sends, receives = self._sends, self._receives
        self._sends, self._receives = defaultdict(list), defaultdict(list)
        ranks = range(self._group.world_size)
        outgoing = [tensor for rank in ranks for tensor in sends[rank]]
        incoming = [tensor for rank in ranks for tensor in receives[rank]]
        nothing = torch.empty(0, dtype=torch.uint8, device=self._group.device)
        packed = torch.cat([nothing, *(_bytes(tensor) for tensor in outgoing)])
        received = nothing.new_empty(sum(tensor.nbytes for tensor in incoming))
        splits = [[sum(tensor.nbytes for tensor in side[rank]) for rank in ranks] for side in (receives, sends)]
        self._group.device_group.alltoall_base(received, packed, *splits).wait()
        self._group.device_group.synchronize()
        start = 0
        for tensor in incoming:
            _bytes(tensor).copy_(received[start : start + tensor.nbytes])
            start += tensor.nbytes
        self.received_bytes += received.nbytes


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8)


class EpochGroup(GroupCoordinator):
    """A vLLM group coordinator whose process groups are replaced with every epoch.

    `experts`: the physical experts of all its ranks, once that is known.
    """

    def __init__(self, name: str, position: int, members: int, device: torch.device) -> None:
        self.unique_name = f"{name}:elastic"
        self.local_rank = device.index or 0
        self.device_index = device.index or 0
        self.device = device
        self.backend = "gloo" if device.type == "cpu" else "nccl"
        self.mq_broadcaster = None
        self.use_custom_op_call = False
        self.use_cpu_custom_send_recv = False
        self.device_communicator: Any = EpochCommunicator(self)
        self.experts: int | None = None
        planned = PlannedProcessGroup(members, position)
        self.bind(planned, planned)

    def bind(self, host: Any, device: Any) -> None:
        """Use these process groups from now on. All attributes that depend on size or rank follow."""
        self.cpu_group: Any = host
        self.device_group: Any = device
        self.world_size = host.size()
        self.rank = self.rank_in_group = host.rank()
        self.ranks = list(range(self.world_size))

    @contextlib.contextmanager
    def graph_capture(self, graph_capture_context: GraphCaptureContext | None = None) -> Iterator[GraphCaptureContext]:
        """Capture on the stream of the context. No collective of this group is ever in a graph."""
        context = graph_capture_context or GraphCaptureContext(torch.cuda.Stream())
        if (current := torch.cuda.current_stream()) != context.stream:
            context.stream.wait_stream(current)
        with torch.cuda.stream(context.stream):
            yield context

    def destroy(self) -> None:
        """The epoch's connections own what there is to release."""


@dataclass
class EpochGroups:
    """DP, EP and EPLB groups of a rank. The same connections serve all three: their collectives come from one thread.

    `current`: the connections of this epoch.
    """

    dp: EpochGroup
    ep: EpochGroup
    eplb: EpochGroup
    current: EpochConnections | None = None

    @classmethod
    def install(cls, position: int, members: int, device: torch.device) -> EpochGroups:
        """Replace vLLM's size-one groups of this process by planned groups of `members`."""
        groups = cls(*(EpochGroup(name, position, members, device) for name in ("dp", "ep", "eplb")))
        world = parallel_state.get_world_group()
        replaced = parallel_state._replace_active_groups(
            world=world, dp=groups.dp, ep=groups.ep, eplb=groups.eplb, node_count=1
        )
        for group in replaced:
            if group is not None and group is not world:
                group.destroy()
        return groups

    @contextlib.contextmanager
    def rehearsal(self, position: int, members: int, missing: int = 0) -> Iterator[None]:
        """Let this rank run its model alone, as if the others of such a group did the same. `missing`: so many others
        have a token less."""
        planned = PlannedProcessGroup(self.dp.world_size, self.dp.rank_in_group)
        self._bind(RehearsalProcessGroup(members, position, missing))
        try:
            with skip_dp_coordination():
                yield
        finally:
            self._bind(planned)

    def bind(self, connections: EpochConnections) -> None:
        self.current = connections
        for member in (self.dp, self.ep, self.eplb):
            member.bind(connections.host, connections.device)

    def _bind(self, stand_in: PlannedProcessGroup) -> None:
        for member in (self.dp, self.ep, self.eplb):
            member.bind(stand_in, stand_in)

    def abort(self) -> int:
        """Free this rank from whatever collective it is in. Called from the control thread."""
        connections = self.current
        return connections.abort() if connections is not None else 0

    def release(self) -> None:
        """Drop the broken connections; vLLM holds no reference to them afterwards."""
        connections, self.current = self.current, None
        if connections is None:
            return
        self._bind(PlannedProcessGroup(self.dp.world_size, self.dp.rank_in_group))
        connections.close()
