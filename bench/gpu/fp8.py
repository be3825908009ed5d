"""An FP8 checkpoint of the bundled model in blocks of 128 x 128, as DeepSeek's and Qwen's are.

All experts get e4m3 weights with one scale for each block (`weight_scale_inv`, float32); activations are quantized in
groups of 128 while the model runs. Experts of the bundled model are 64 wide, so zeros fill their blocks, which changes
no result. Attention, router, embeddings, head and norms stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_daemon.config import BUNDLED_MODEL

WEIGHTS = "model.safetensors"
QUANTIZED = re.compile(r"\.mlp\.experts\.\d+\.(?:gate|up|down)_proj\.weight$")
BLOCK = 128
FP8_MAX = 448.0
"""The largest number of e4m3."""


def quantization_config(layers: int) -> dict[str, Any]:
    """For config.json. What is ignored are linear layers that stay as they are."""
    ignored = ["lm_head"]
    for layer in range(layers):
        ignored += [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkvo"]
        ignored.append(f"model.layers.{layer}.mlp.gate")
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "ignored_layers": ignored,
    }


def quantized(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The same tensors, with experts in FP8 and their scales beside them."""
    import torch

    for name, tensor in tensors.items():
        if not QUANTIZED.search(name):
            yield name, tensor.contiguous()
            continue
        rows, columns = (_blocks(size) for size in tensor.shape)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        blocks = padded.view(rows, BLOCK, columns, BLOCK)
        scale = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp(min=1e-12)
        weights = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
        yield name, weights.view_as(padded).to(torch.float8_e4m3fn).contiguous()
        yield f"{name}_scale_inv", scale


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def make(source: Path, target: Path) -> int:
    """Write the checkpoint. Returns how many weights are in FP8. Raises OSError and ValueError."""
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        raise ValueError(f"{source} is quantized already")
    tensors = dict(quantized(load_file(source / WEIGHTS)))
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in (WEIGHTS, "config.json") and file.is_file():
            shutil.copyfile(file, target / file.name)
    config |= {
        "dtype": "bfloat16",
        "moe_intermediate_size": _blocks(config["moe_intermediate_size"]) * BLOCK,
        "quantization_config": quantization_config(config["num_hidden_layers"]),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return sum(name.endswith("weight_scale_inv") for name in tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.fp8", description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, metavar="DIR", help="where to")
    parser.add_argument("--source", type=Path, metavar="DIR", default=BUNDLED_MODEL, help="default: the bundled model")
    chosen = parser.parse_args(arguments)
    try:
        count = make(chosen.source, chosen.target)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{chosen.target}: {count} weights in FP8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
