"""Expert weights of one rank: which slots hold what, loading single slots, and proof of their contents.

Everything goes through vLLM's own weight loaders and post-processing. Raw bytes of a checkpoint are never copied into a
live slot: kernels keep weights in layouts of their own (packed on CPU, shuffled or rescaled on GPUs).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import MixtureOfExperts, get_mixture_of_experts_model
from vllm.utils.torch_utils import set_default_torch_dtype

from elastic_daemon.engine.host_copies import HostCopies, as_bytes
from elastic_daemon.errors import StartError
from elastic_daemon.placement import IntArray


@dataclass(frozen=True)
class SlotContent:
    """Expert `expert` belongs into slot `slot` of MoE layer `layer` (an index among the MoE layers)."""

    layer: int
    slot: int
    expert: int


def moe_model(model: torch.nn.Module) -> MixtureOfExperts:
    found = get_mixture_of_experts_model(model)
    if found is None:
        raise StartError("the model has no expert layers that vLLM can rebalance (not a MixtureOfExperts)")
    return found


def routed_layers(model: torch.nn.Module) -> list[RoutedExperts]:
    return [runner.routed_experts for runner in moe_model(model).moe_layers]


@contextlib.contextmanager
def loading_into(layers: list[RoutedExperts], slots_of: list[Mapping[int, int]]) -> Iterator[None]:
    """Let vLLM's weight loaders put logical expert e of layer i into slot `slots_of[i][e]`, and skip all others.

    The loaders ask their layer where a physical expert lives, and the first ids are the logical ones: answering from
    our own table gives any placement, a different one in each layer, whatever the model's checkpoint looks like.
    """
    for layer, slots in zip(layers, slots_of, strict=True):
        layer._map_global_expert_id_to_local_expert_id = _slot_lookup(slots)
    try:
        yield
    finally:
        for layer in layers:
            del layer._map_global_expert_id_to_local_expert_id


def _slot_lookup(slots: Mapping[int, int]) -> object:
    return lambda expert: slots.get(expert, -1)


def column_slots(column: IntArray) -> list[Mapping[int, int]]:
    """Per layer: expert -> slot, from a column [layers, S]."""
    return [{int(expert): slot for slot, expert in enumerate(row) if expert >= 0} for row in column]


class CheckpointExperts:
    """Reads the tensors of single experts from a safetensors checkpoint; nothing else of it is touched."""

    def __init__(self, model_config: ModelConfig, load_config: LoadConfig) -> None:
        _, files, is_safetensors, _ = DefaultModelLoader(load_config)._prepare_weights(
            model_config.model, None, model_config.revision, fall_back_to_pt=False, allow_patterns_overrides=None
        )
        if not is_safetensors:
            raise StartError(f"{model_config.model}: repairing experts needs a checkpoint in safetensors format")
        self._file_of: dict[str, str] = {}
        for path in files:
            with safe_open(path, framework="pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), path))
        self._names: dict[str, list[str]] = defaultdict(list)
        for name in self._file_of:
            layer, separator, rest = name.rpartition(".experts.")
            expert = rest.partition(".")[0]
            if separator and expert.isdecimal():
                self._names[f"{layer}.experts.{expert}"].append(name)

    def tensors(self, layer_name: str, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name relative to the layer, tensor) of one expert.

        Raises:
            StartError: the checkpoint does not store this expert as tensors of its own.
        """
        names = self._names.get(f"{layer_name}.{expert}")
        if not names:
            raise StartError(f"checkpoint has no tensors of its own for expert {expert} of {layer_name}")
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as tensors:
                for name in wanted:
                    yield name.removeprefix(f"{layer_name}."), tensors.get_tensor(name)


def _scratch_layer(layer: RoutedExperts, slots: int) -> RoutedExperts:
    """A layer like `layer` with `slots` empty expert slots of its own and nothing shared that loading would change."""
    scratch = copy.copy(layer)
    scratch.__dict__ = {**layer.__dict__, "_parameters": {}, "_buffers": dict(layer._buffers), "_modules": {}}
    config = replace(layer.moe_config, num_local_experts=slots)
    config.hidden_dim = layer.hidden_size
    config.intermediate_size_per_partition = layer.intermediate_size_per_partition
    scratch.moe_config, scratch.local_num_experts = config, slots
    scratch.quant_method = scratch._get_quant_method(layer.layer_name, layer.quant_config, config)
    scratch.quant_method.create_weights(
        layer=scratch,
        num_experts=slots,
        hidden_size=layer.hidden_size,
        unpadded_hidden_size=config.hidden_dim_unpadded,
        intermediate_size_per_partition=layer.intermediate_size_per_partition,
        params_dtype=layer.params_dtype,
        weight_loader=scratch.weight_loader,
        global_num_experts=config.num_experts,
    )
    return scratch


class ExpertSlots:
    """The expert slots of this rank's model. Needs the current vLLM config to be set while it loads."""

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig, load_config: LoadConfig) -> None:
        self._layers = routed_layers(model)
        self._dtype = model_config.dtype
        self._checkpoint = CheckpointExperts(model_config, load_config)

    def load(self, contents: Iterable[SlotContent]) -> int:
        """Fill slots from the checkpoint. Returns the bytes written.

        A layer's slots are written only after all of its experts were read and processed: a failure leaves them whole.
        """
        written = 0
        for index, wanted in _by_layer(contents).items():
            layer = self._layers[index]
            rows, processed = self._process(layer, wanted)
            for content in wanted:
                for name, parameter in processed.items():
                    live = layer.get_parameter(name).data[content.slot]
                    live.copy_(parameter[rows[content.expert]])
                    written += live.numel() * live.element_size()
        return written

    def read_copy(self, content: SlotContent, copies: HostCopies) -> dict[str, torch.Tensor]:
        """The weights that belong into a slot, from host memory. For any thread. Raises HostCopyUnusable."""
        return copies.read(content.layer, content.expert, self._row(content.layer, content.slot))

    def fill(self, content: SlotContent, weights: Mapping[str, torch.Tensor]) -> int:
        """Put weights in kernel layout into a slot. Returns the bytes written."""
        live = self._row(content.layer, content.slot)
        for name, parameter in live.items():
            parameter.copy_(weights[name])
        return sum(parameter.nbytes for parameter in live.values())

    @property
    def expert_bytes(self) -> int:
        """Of one expert, in the first layer."""
        return sum(weights.nbytes for weights in self._row(0, 0).values())

    def snapshot(self, layer: int, slot: int) -> dict[str, torch.Tensor]:
        """A copy in host memory of all weights of the expert in a slot, in kernel layout."""
        return {name: weights.to("cpu", copy=True) for name, weights in self._row(layer, slot).items()}

    def _row(self, layer: int, slot: int) -> dict[str, torch.Tensor]:
        return {name: weights[slot] for name, weights in _per_slot(self._layers[layer]).items()}

    def digests(self) -> list[list[str]]:
        """One digest per layer and slot over all weights of the expert in it, in kernel layout."""
        return [[_digest(_per_slot(layer), slot) for slot in range(_slots(layer))] for layer in self._layers]

    def wrong_slots(self, column: IntArray) -> list[SlotContent]:
        """Slots whose bytes differ from a fresh load of the expert that `column` [layers, S] says they hold."""
        wrong = []
        held = self.digests()
        for index, layer in enumerate(self._layers):
            contents = [SlotContent(index, slot, int(e)) for slot, e in enumerate(column[index]) if e >= 0]
            rows, canonical = self._process(layer, contents)
            wrong += [c for c in contents if held[index][c.slot] != _digest(canonical, rows[c.expert])]
        return wrong

    def _process(
        self, layer: RoutedExperts, contents: Iterable[SlotContent]
    ) -> tuple[dict[int, int], dict[str, torch.Tensor]]:
        """The experts of `contents`, read from the checkpoint and in kernel layout.

        Returns expert -> row, and name -> weights [rows, ...].
        """
        # An expert may be wanted twice (balancing can give a rank two copies) and is read once.
        rows = {expert: row for row, expert in enumerate(dict.fromkeys(content.expert for content in contents))}
        with set_default_torch_dtype(self._dtype), next(layer.parameters()).device:
            scratch = _scratch_layer(layer, len(rows))
            with loading_into([scratch], [rows]):
                for expert in rows:
                    for _ in scratch.load_weights(self._checkpoint.tensors(layer.layer_name, expert)):
                        pass
            scratch.quant_method.process_weights_after_loading(scratch)
        return rows, _per_slot(scratch)


def _by_layer(contents: Iterable[SlotContent]) -> dict[int, list[SlotContent]]:
    grouped: dict[int, list[SlotContent]] = defaultdict(list)
    for content in contents:
        grouped[content.layer].append(content)
    return grouped


def _per_slot(layer: RoutedExperts) -> dict[str, torch.Tensor]:
    """Parameters with a row for each slot. A static scale of activations is one number for the whole layer."""
    slots = _slots(layer)
    return {name: p.data for name, p in layer.named_parameters() if p.dim() > 0 and p.shape[0] == slots}


def _slots(layer: RoutedExperts) -> int:
    return int(next(layer.parameters()).shape[0])


def _digest(weights: Mapping[str, torch.Tensor], row: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(as_bytes(weights[name][row]).cpu().numpy())  # a scale may be a single number
    return digest.hexdigest()
