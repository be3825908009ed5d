"""Expert load balancing that a death cannot corrupt.

vLLM moves the weights of all layers first and commits all tables afterwards: a death in between leaves moved weights
under old tables, and wrong text. Here each layer's table is committed with its weights. A layer's weights are
overwritten only after its transfer is complete, so at any moment a rank's column says exactly what its slots hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import structlog
import torch
from vllm.config import ModelConfig
from vllm.distributed.eplb import eplb_state as vllm_eplb
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.eplb.rebalance_execute import move_from_buffer, move_to_buffer
from vllm.distributed.parallel_state import get_ep_group, get_eplb_group
from vllm.model_executor.models.interfaces import MixtureOfExperts

from elastic_daemon.engine.experts import SlotContent
from elastic_daemon.engine.groups import EpochTransfers
from elastic_daemon.placement import IntArray, rebalance

log = structlog.get_logger(__name__)

TransferHook = Callable[[int, str], None]
"""Called as hook(layer, point) at each boundary of a transfer; tests use it to die there."""


class ElasticEplbState(EplbState):
    """EPLB state that follows the membership and stays consistent when a rearrangement is cut short."""

    on_transfer: TransferHook | None = None
    on_change: Callable[[], None] | None = None
    """Called on all ranks when balancing has changed what they hold."""
    on_plan: Callable[[IntArray], None] | None = None
    """Called on all ranks at the same step with the table [layers, N * S] that they are to move to layer by layer, if
    balancing is asynchronous; else all layers move within the step."""
    postponed = False
    """Experts are on the move, on all ranks alike: balancing waits for its next turn."""

    def adopt(self, model_config: ModelConfig, model: MixtureOfExperts, physical_to_logical: IntArray) -> None:
        """Start over with `physical_to_logical` [layers, N * S] and the group sizes of a new epoch.

        Load statistics restart: counts of an old epoch are indexed by physical experts that no longer exist.
        """
        first = not self.model_states
        if first:
            self.add_model(model, model_config)
            self.is_async = False  # vLLM's way: a thread with a communicator of its own, which nobody could abort
        state = self.model_states[model_config.compute_hash()]
        if first:
            state.communicator = EpochTransfers(get_eplb_group())
        layers, physical = physical_to_logical.shape
        if first or physical != state.physical_to_logical_map.shape[1]:
            self._resize(state, layers, physical)
            model.set_eplb_state(
                state.expert_load_pass_buffer, state.logical_to_physical_map, state.logical_replica_count
            )
            assert state.num_unpadded_tokens_tensors is not None
            self._propagate_shared_tensors(model, state.num_unpadded_tokens_tensors)
        vllm_eplb._commit_eplb_maps(state, torch.from_numpy(physical_to_logical.copy()))
        self.postponed = False
        self.forget_load()

    def forget_load(self) -> None:
        """Start the window anew: counts are by physical expert, and those stand for other experts now.

        Whoever calls it does so at the same step on all ranks: the next rearrangement is a full interval away.
        """
        for state in self.model_states.values():
            state.expert_load_pass_buffer.zero_()
            state.expert_load_window.zero_()
        self.expert_load_window_step = 0
        self.expert_rearrangement_step = 0
        self._update_layer_should_record()

    def _resize(self, state: vllm_eplb.EplbModelState, layers: int, physical: int) -> None:
        device = self.device
        table = torch.full((layers, physical), -1, dtype=torch.int64, device=device)
        state.physical_to_logical_map = state.physical_to_logical_map_buffer = table
        load = torch.zeros((layers, physical), dtype=torch.int32, device=device)
        state.expert_load_pass = state.expert_load_pass_buffer = load
        state.expert_load_window = torch.zeros(
            (self.expert_load_window_size, layers, physical), dtype=torch.int32, device=device
        )

    def column(self, position: int, slots: int) -> IntArray:
        """What the slots of the rank at dense `position` hold now, [layers, slots]."""
        (state,) = self.model_states.values()
        table: IntArray = state.physical_to_logical_map[:, position * slots : (position + 1) * slots].cpu().numpy()
        return table.copy()

    def loaded(self, position: int, slots: int, contents: Iterable[SlotContent]) -> None:
        """Slots of the rank at dense `position` have been filled. The table says so at once: the regroup that they
        were filled for may still fail, and the next plan starts from what is really there."""
        (state,) = self.model_states.values()
        for content in contents:
            state.physical_to_logical_map[content.layer, position * slots + content.slot] = content.expert

    def layers_unlike(self, table: IntArray) -> tuple[int, ...]:
        """Layers in which ranks hold anything else than in `table` [layers, N * S]. The same answer on all ranks.

        Raises ValueError for a table of another size than this group's.
        """
        (state,) = self.model_states.values()
        current = state.physical_to_logical_map.cpu().numpy()
        if current.shape != table.shape:
            raise ValueError(f"a table of {list(table.shape)} for a group of {list(current.shape)}")
        return tuple(int(layer) for layer in np.flatnonzero((current != table).any(axis=1)))

    def move(self, layer: int, row: IntArray) -> int:
        """Bring one layer to `row` [N * S], with all other ranks. Returns the bytes that this rank has received.

        Raises PeerLost; the layer is as before then.
        """
        (state,) = self.model_states.values()
        assert isinstance(state.communicator, EpochTransfers)
        before = state.communicator.received_bytes
        self._move_layer(state, layer, torch.from_numpy(row.copy()), get_ep_group().device_group)
        return state.communicator.received_bytes - before

    def rearrange(
        self,
        is_profile: bool = False,
        rank_mapping: dict[int, int] | None = None,
        use_last_expert_load: bool = False,
    ) -> None:
        """Balance experts by the load of the window, layer by layer, each layer whole or not at all.

        With vLLM's `use_async`, its default, a layer moves after each step from here on, and no step waits for more.

        By our own policy: vLLM's knows no ranks, and takes the last copy but one from experts that few tokens want.
        """
        if is_profile or self.postponed:
            return
        for state in self.model_states.values():
            model = state.model
            load = torch.zeros((model.num_moe_layers, model.num_logical_experts), dtype=torch.int64, device=self.device)
            load.scatter_add_(1, state.physical_to_logical_map, state.expert_load_window.sum(dim=0, dtype=torch.int64))
            (load,) = self._allreduce_list([load])
            state.last_expert_load = load
            group = get_ep_group().device_group
            started = time.monotonic()
            old = state.physical_to_logical_map.cpu().numpy()
            new = rebalance(load.cpu().numpy(), old, group.size())
            moved = int((new != old).sum())
            if moved and self.parallel_config.eplb_config.use_async and self.on_plan is not None:
                self.on_plan(new)
                return
            for layer in self.layers_unlike(new):
                self.move(layer, new[layer])
            if group.rank() == 0:
                log.info("experts_rearranged", moved=moved, seconds=round(time.monotonic() - started, 4))
            if moved:
                self.forget_load()
                if self.on_change is not None:
                    self.on_change()

    def _move_layer(
        self, state: vllm_eplb.EplbModelState, layer: int, new: torch.Tensor, group: torch.distributed.ProcessGroup
    ) -> None:
        weights = state.model.expert_weights[layer]
        old = state.physical_to_logical_map[layer].cpu().numpy()
        self._boundary(layer, "transfer")
        metadata = move_to_buffer(
            num_local_experts=weights[0].shape[0],
            old_indices=old,
            new_indices=new.numpy(),
            expert_weights=weights,
            expert_weights_buffers=state.expert_buffer,
            stream=None,
            ep_rank=group.rank(),
            communicator=state.communicator,
            layer_idx=layer,
        )
        self._boundary(layer, "commit")
        move_from_buffer(
            expert_weights=weights,
            expert_weights_buffers=state.expert_buffer,
            transfer_metadata=metadata,
            new_indices=new.numpy(),
            ep_rank=group.rank(),
        )
        vllm_eplb._commit_eplb_maps_for_layer(state, new, layer)
        self._boundary(layer, "done")

    def _boundary(self, layer: int, point: str) -> None:
        if self.on_transfer is not None:
            self.on_transfer(layer, point)
