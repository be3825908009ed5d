"""The FP8 checkpoint of the bundled model is what vLLM's loader reads: names, types, shapes, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from bench.gpu import fp8
from elastic_daemon.config import BUNDLED_MODEL
from elastic_daemon.engine.experts import _digest

pytestmark = pytest.mark.contract

LAYERS, EXPERTS = 4, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fp8")
    assert fp8.main([str(target)]) == 0
    return target


def quantization(checkpoint: Path) -> Fp8Config:
    return Fp8Config.from_config(json.loads((checkpoint / "config.json").read_text())["quantization_config"])


def skipped(config: Fp8Config, layer: str) -> bool:
    mapping = Qwen3MoeForCausalLM.packed_modules_mapping
    return bool(is_layer_skipped(layer, config.ignored_layers, mapping, match_mode=config.ignored_layers_match_mode))


def test_scheme(checkpoint: Path) -> None:
    config = quantization(checkpoint)
    assert config.is_checkpoint_fp8_serialized
    assert (config.activation_scheme, config.weight_block_size) == ("dynamic", [fp8.BLOCK, fp8.BLOCK])


def test_layers_are_quantized_where_vllm_takes_them_to_be(checkpoint: Path) -> None:
    """vLLM makes FP8 layers of all linear layers that are not left out: each must have scales, and no other."""
    config, tensors = quantization(checkpoint), load_file(checkpoint / fp8.WEIGHTS)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate"):
            assert skipped(config, f"{prefix}.{name}")
        assert not skipped(config, f"{prefix}.mlp.experts")
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = f"{prefix}.mlp.experts.{expert}.{name}.weight"
                assert tensors[weight].dtype is torch.float8_e4m3fn and tensors[weight].shape == (128, 128)
                assert tensors[f"{weight}_scale_inv"].dtype is torch.float32
                assert tensors[f"{weight}_scale_inv"].shape == (1, 1)
    assert sum(name.endswith("scale_inv") for name in tensors) == LAYERS * 3 * EXPERTS


def test_every_tensor_of_an_expert_has_a_parameter(checkpoint: Path) -> None:
    """`RoutedExperts.load_weights` puts `weight_name` -> `param_name`; Fp8MoEMethod has these four."""
    mapping = RoutedExperts.build_expert_params_mapping("gate_proj", "down_proj", "up_proj", EXPERTS)
    found: dict[tuple[int, str], set[str]] = {}
    names = [name for name in load_file(checkpoint / fp8.WEIGHTS) if ".layers.0.mlp.experts." in name]
    for name in names:
        ((parameter, weight, expert, shard),) = [entry for entry in mapping if entry[1] in name]
        target = name.replace(weight, parameter).rpartition(".")[2]
        found.setdefault((expert, shard), set()).add(target)
    w13, w2 = ({f"{name}_{part}" for part in ("weight", "weight_scale_inv")} for name in ("w13", "w2"))
    shards = {"w1": w13, "w3": w13, "w2": w2}
    assert found == {(expert, shard): shards[shard] for expert in range(EXPERTS) for shard in shards}


def test_weights_times_scale_are_the_old_weights(checkpoint: Path) -> None:
    new, old = load_file(checkpoint / fp8.WEIGHTS), load_file(BUNDLED_MODEL / fp8.WEIGHTS)
    for name, tensor in old.items():
        if f"{name}_scale_inv" not in new:
            assert torch.equal(new[name], tensor)
            continue
        scale = new[f"{name}_scale_inv"]
        weights = torch.zeros_like(new[name], dtype=torch.float32)
        weights[: tensor.shape[0], : tensor.shape[1]] = tensor
        # e4m3 has three bits after the point, so that the error is 2^-4 at most; below 2^-6 steps no longer shrink.
        error = (new[name].float() * scale - weights).abs()
        assert bool((error <= weights.abs() / 16 + scale * 2**-10).all()), name
        assert not new[name].float()[weights == 0].any()


def test_digest_of_an_expert_counts_its_scales() -> None:
    """Scales of FP8 experts are single numbers."""
    weights = {"w": torch.ones(3, 4, 2).to(torch.float8_e4m3fn), "scale": torch.tensor([1.0, 2.0, 1.0])}
    assert _digest(weights, 0) == _digest(weights, 2) != _digest(weights, 1)
