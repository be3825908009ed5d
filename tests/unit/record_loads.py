"""Records the expert loads that tests of balance use: `python -m tests.unit.record_loads` writes data/expert_loads.npz.

Each array is [layers, E]: tokens that the router sent to each expert. `tiny_moe_*`: counted in the bundled model on
examples of its own tasks, prompts and answers. The others are draws (seeded) of ten million routed tokens per layer:
`zipf_*` with the popularity of the k-th expert proportional to k ** -s, `hot_*` with a few experts twenty times as
popular as the gamma-distributed rest, `lognormal_*` with sigma 1. In each layer other experts are the popular ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

PATH = Path(__file__).parent / "data" / "expert_loads.npz"
MODEL = Path(__file__).parents[2] / "elastic_daemon" / "models" / "tiny_moe"
TOKENS = 10_000_000


def drawn(popularity: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.int32]:
    """Tokens per expert, [layers, E], by popularity [layers, E]."""
    shares = popularity / popularity.sum(axis=1, keepdims=True)
    return np.stack([random.multinomial(TOKENS, row) for row in shares]).astype(np.int32)


def zipf(layers: int, experts: int, exponent: float, random: np.random.Generator) -> npt.NDArray[np.int32]:
    popularity = np.arange(1, experts + 1) ** -exponent
    return drawn(np.stack([random.permutation(popularity) for _ in range(layers)]), random)


def hot(layers: int, experts: int, number: int, random: np.random.Generator) -> npt.NDArray[np.int32]:
    popularity = random.gamma(4, 1, (layers, experts))
    for row in popularity:
        row[random.choice(experts, number, replace=False)] *= 20
    return drawn(popularity, random)


def counted(tasks: tuple[str, ...], examples: int) -> npt.NDArray[np.int32]:
    """Tokens per expert of the bundled model over that many held-out examples of each task."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.data import held_out_examples

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    load = np.zeros((model.config.num_hidden_layers, model.config.num_experts), dtype=np.int32)
    for task in tasks:
        for example in held_out_examples(task, examples, seed=1):
            ids = tokenizer(f"{example.prompt} ={example.answer}", return_tensors="pt").input_ids
            with torch.no_grad():
                routers = model(ids, output_router_logits=True).router_logits
            for layer, logits in enumerate(routers):
                chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
                load[layer] += np.bincount(chosen.flatten().numpy(), minlength=load.shape[1])
    return load


def main() -> None:
    random = np.random.default_rng(20261124)
    from training.data import TASKS

    np.savez_compressed(
        PATH,
        zipf_mild=zipf(58, 256, 0.5, random),
        zipf_strong=zipf(58, 256, 1.0, random),
        hot_few=hot(58, 256, 5, random),
        lognormal=drawn(random.lognormal(0, 1, (58, 256)), random),
        zipf_64=zipf(26, 64, 0.8, random),
        hot_64=hot(26, 64, 2, random),
        lognormal_128=drawn(random.lognormal(0, 1, (48, 128)), random),
        tiny_moe_all_tasks=counted(TASKS, 20),
        tiny_moe_add=counted(("add",), 100),
        tiny_moe_count=counted(("count",), 50),
    )


if __name__ == "__main__":
    main()
