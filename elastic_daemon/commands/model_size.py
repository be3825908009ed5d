"""How large a model's experts are, from its directory. Reads config.json and safetensors headers; no engine needed."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from elastic_daemon.commands.capacity_plan import ModelSize
from elastic_daemon.errors import ConfigError

EXPERT_COUNTS: Final = ("num_experts", "n_routed_experts", "num_local_experts")
"""What configurations call the number of routed experts: Qwen; DeepSeek, GLM, Kimi; Mixtral, Llama 4, gpt-oss."""

DTYPE_BYTES: Final = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}

QUANTIZED_BYTES: Final = {"fp8": 1.0, "mxfp4": 4.25 / 8}
"""Bytes per weight by `quant_method`; scales of fp8 blocks (less than 0.1%) left out, those of mxfp4 included."""

HEADER_LIMIT: Final = 100_000_000
"""Bytes of a safetensors header, at most; the format's own limit."""

EXPERT_TENSOR = re.compile(r"\.experts\.")  # "shared_experts" do not match: they are on every rank
LAYER = re.compile(r"\.layers\.(\d+)\.")


def read_model_size(directory: Path, expert_bytes: float | None = None, other_bytes: float | None = None) -> ModelSize:
    """The size of the model in `directory`; what is given overrides what is read.

    With weights there, what is stored is counted (if loading converts it to another dtype, the given bytes have to say
    so). With config.json alone, experts are computed from its sizes, and `other_bytes` comes from the total in the
    index of the weights, or has to be given.

    Raises:
        ConfigError: no config.json, no experts in it, or something that can be neither read nor computed.
    """
    config = _text_config(directory)
    experts = next((config[name] for name in EXPERT_COUNTS if config.get(name)), None)
    if not isinstance(experts, int):
        raise ConfigError(f"{directory}: config.json has none of {', '.join(EXPERT_COUNTS)}: a dense model?")
    layers = len(moe_layers(config))
    if layers == 0:
        raise ConfigError(f"{directory}: no layer has experts by config.json")
    found, total = _weights(directory, _required(config, "num_hidden_layers", directory))
    if expert_bytes is None:
        expert_bytes = found / (experts * layers) if found else _computed_expert_bytes(config, directory)
    if other_bytes is None:
        if not total:
            raise ConfigError(f"{directory} has no weights and no index of them: give --other-bytes")
        other_bytes = max(total - (found or experts * layers * expert_bytes), 0.0)
    return ModelSize(experts, layers, expert_bytes, other_bytes)


def moe_layers(config: Mapping[str, Any]) -> list[int]:
    """Layers with experts: those after the first dense ones, each so-many-th, less those that are listed as dense."""
    step = config.get("decoder_sparse_step") or 1
    dense = {*(config.get("mlp_only_layers") or ()), *range(config.get("first_k_dense_replace") or 0)}
    return [n for n in range(config.get("num_hidden_layers", 0)) if n not in dense and (n + 1) % step == 0]


def _text_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: MODEL is a directory with a model's config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return {**config, **(config.get("text_config") or {})}  # models that also see images keep the sizes in there


def _required(config: Mapping[str, Any], name: str, directory: Path) -> int:
    if not isinstance(value := config.get(name), int):
        raise ConfigError(f"{directory}: config.json has no {name}")
    return value


def _computed_expert_bytes(config: Mapping[str, Any], directory: Path) -> float:
    inner = config.get("moe_intermediate_size") or _required(config, "intermediate_size", directory)
    return 3 * _required(config, "hidden_size", directory) * inner * _bytes_per_weight(config, directory)


def _bytes_per_weight(config: Mapping[str, Any], directory: Path) -> float:
    if quantization := config.get("quantization_config"):
        if method_bytes := QUANTIZED_BYTES.get(quantization.get("quant_method", "")):
            return method_bytes
        if isinstance(bits := quantization.get("bits"), int):
            return bits / 8
        raise ConfigError(f"{directory}: quantization {quantization.get('quant_method')}: give --expert-bytes")
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{directory}: dtype {dtype} in config.json: give --expert-bytes")
    return DTYPE_BYTES[dtype]


def _weights(directory: Path, layers: int) -> tuple[float, float]:
    """Bytes of routed experts, and of all tensors; from headers, else from the index (experts then 0), else 0.

    Layers beyond those of the model proper (they predict further tokens) are left out.
    """
    experts = total = 0.0
    for path in sorted(directory.glob("*.safetensors")):
        for name, size in _tensors(path):
            if (layer := LAYER.search(name)) and int(layer[1]) >= layers:
                continue
            total += size
            experts += size if EXPERT_TENSOR.search(name) else 0
    if total:
        return experts, total
    index = directory / "model.safetensors.index.json"
    try:
        return 0.0, float(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
    except FileNotFoundError:
        return 0.0, 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} has no total_size: {error!r}") from error


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of the tensors in a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, end = tensor["data_offsets"]
                yield name, end - first
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error
