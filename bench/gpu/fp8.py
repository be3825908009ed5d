"""An FP8 checkpoint of the bundled model, as vLLM's loader for `quant_method: fp8` reads it.

Linear layers of attention and all experts get e4m3 weights with one scale each (`weight_scale`, float32, without a
dimension), and one scale for all activations. vLLM cannot dispatch experts' activations with a scale of each rank's
own, and blocks of 128 would not fit: experts are 64 wide. Router, embeddings, head and norms stay as they are.
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
QUANTIZED = re.compile(r"\.(?:self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(?:gate|up|down)_proj)\.weight$")
FP8_MAX = 448.0
"""The largest number of e4m3."""
INPUT_SCALE = 0.25
"""Activations up to 112 are kept, and those from 0.004 on with all their digits."""


def quantization_config(layers: int) -> dict[str, Any]:
    """For config.json. What is ignored are linear layers that stay as they are."""
    ignored = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(layers))]
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "static", "ignored_layers": ignored}


def quantized(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The same tensors, with weights in FP8 and their scales beside them."""
    import torch

    for name, tensor in tensors.items():
        if not QUANTIZED.search(name):
            yield name, tensor.contiguous()
            continue
        weights = tensor.to(torch.float32)
        scale = (weights.abs().max() / FP8_MAX).clamp(min=1e-12)
        yield name, (weights / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
        yield f"{name}_scale", scale.to(torch.float32)
        yield f"{name.removesuffix('.weight')}.input_scale", torch.tensor(INPUT_SCALE)


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
    config |= {"dtype": "bfloat16", "quantization_config": quantization_config(config["num_hidden_layers"])}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return sum(name.endswith("weight_scale") for name in tensors)


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
