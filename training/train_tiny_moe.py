"""Train the bundled tiny Qwen3-MoE model from scratch on a CPU.

The model learns the tasks of ``training/data.py``. One optimizer step sees either many short examples packed into
rows, or a few long counting sequences; the latter only start once the short tasks are under way, because they cost
the most and teach the least per token.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from training.data import LONG_COUNT, SHORT_COUNT, Example, make_example
from training.tokenizer import VOCAB_SIZE, build_tokenizer

EXAMPLES = """\
examples:
  python -m training.train_tiny_moe --out /tmp/tiny_moe
  python -m training.train_tiny_moe --out /tmp/quick --steps 300 --seed 1
  python -m training.train_tiny_moe --out elastic_daemon/models/tiny_moe --threads 2
"""

# Sizes are multiples of 32, and the head size is 32, as the fused MoE and attention kernels of vLLM's CPU backend ask.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,  # of dense layers, which this model has none of
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # slow enough to look 700 tokens back
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.02,
    "dtype": "float32",
}

SHORT_MIX = {"sort": 3, "add": 4, "reverse": 2, "count": 4}
ROW_TOKENS = 128
ROWS = 24
LONG_TOKENS = 2400
LONG_ROWS = (3, 24)
LONG_FROM = 0.2  # share of the training after which long sequences start
LONG_EVERY = 2  # then one step in this many is a long one
LONG_WEIGHT = 2.0  # of a long step's loss, whose mean is that of very many easy tokens and few hard ones
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Token rows with their targets; ``mask`` keeps packed examples apart (None: one example a row)."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None


def build_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Create the untrained model; grouped_mm is the fastest of the expert implementations on a CPU."""
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**ARCHITECTURE, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    )
    model.set_experts_implementation("grouped_mm")
    return model


def encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], list[int]]:
    """Return tokens and next-token targets of an example; only the answer and its end are learnt."""
    prompt = tokenizer(example.prompt)["input_ids"]
    answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
    tokens = [*prompt, *answer]
    return tokens[:-1], [IGNORE] * (len(prompt) - 1) + answer


def short_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Batch:
    """Pack short examples of all tasks into rows until the first one that does not fit."""
    tokens = torch.full((ROWS, ROW_TOKENS), tokenizer.pad_token_id)
    targets = torch.full((ROWS, ROW_TOKENS), IGNORE)
    owner = torch.zeros((ROWS, ROW_TOKENS), dtype=torch.long)
    positions = torch.zeros((ROWS, ROW_TOKENS), dtype=torch.long)
    tasks, weights = list(SHORT_MIX), list(SHORT_MIX.values())
    for row in range(ROWS):
        at, number = 0, 1
        while True:
            task = rng.choices(tasks, weights)[0]
            ids, labels = encode(tokenizer, make_example(task, rng, held_out=False))
            end = at + len(ids)
            if end > ROW_TOKENS:
                break
            tokens[row, at:end] = torch.tensor(ids)
            targets[row, at:end] = torch.tensor(labels)
            owner[row, at:end] = number
            positions[row, at:end] = torch.arange(len(ids))
            at, number = end, number + 1
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    return Batch(tokens, targets, positions, mask[:, None])


def long_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Batch:
    """Make a few counting sequences of about equal length, one a row.

    Lengths are log-uniform from the end of the short ones: where to stop is the hard part of this task, and medium
    sequences show more ends per token than long ones.
    """
    items = round(SHORT_COUNT[1] * (LONG_COUNT[1] / SHORT_COUNT[1]) ** rng.random())
    rows = min(max(LONG_TOKENS // (4 * items), LONG_ROWS[0]), LONG_ROWS[1])
    pairs = [
        encode(tokenizer, make_example("count_long", rng, held_out=False, items=max(1, items - rng.randrange(8))))
        for _ in range(rows)
    ]
    width = max(len(ids) for ids, _ in pairs)
    tokens = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in pairs]
    targets = [labels + [IGNORE] * (width - len(labels)) for _, labels in pairs]
    return Batch(torch.tensor(tokens), torch.tensor(targets))


def balance_loss(router_logits: Sequence[Tensor], used: Tensor, top_k: int) -> tuple[Tensor, float]:
    """Load-balancing loss averaged over layers, and the greatest share of choices one expert got (times experts).

    Taken layer by layer: the library's own loss pools the layers, so that it overlooks a layer with idle experts.
    """
    losses, peak = [], 0.0
    for logits in router_logits:
        probs = logits[used].softmax(-1)
        experts = probs.shape[-1]
        chosen = functional.one_hot(probs.topk(top_k, dim=-1).indices, experts).sum(1).float().mean(0) / top_k
        losses.append(experts * (chosen * probs.mean(0)).sum())
        peak = max(peak, experts * chosen.max().item())
    return torch.stack(losses).mean(), peak


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps; takes matrices and stacks of matrices.

    Learns these tasks in far fewer steps than AdamW. torch.optim.Muon refuses the stacked expert weights.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply one update."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                velocity = state.setdefault("velocity", torch.zeros_like(param))
                velocity.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalise(param.grad.lerp(velocity, group["momentum"]))
                rows, columns = param.shape[-2:]
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of each matrix towards one by the usual quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.add(a * x, (b * gram + c * gram @ gram) @ x)
    return x.mT if tall else x


def build_optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, routers and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, param in model.named_parameters():
        inner = param.ndim >= 2 and ".layers." in name and ".gate.weight" not in name
        (matrices if inner else others).append(param)
    return [
        Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(args: argparse.Namespace) -> None:
    """Train a model and write it to ``args.out``."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    optimizers = build_optimizers(model, args.lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 50, (args.steps - s) / (0.8 * args.steps)))
        for o in optimizers
    ]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps", flush=True)

    started = time.monotonic()
    losses: dict[bool, float] = {}
    for step in range(args.steps):
        is_long = step >= LONG_FROM * args.steps and step % LONG_EVERY == 0
        batch = (long_batch if is_long else short_batch)(tokenizer, rng)
        output = model.model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=batch.mask,
            use_cache=False,
            output_router_logits=True,
        )
        learnt = batch.targets != IGNORE
        loss = functional.cross_entropy(model.lm_head(output.last_hidden_state[learnt]), batch.targets[learnt])
        used = (batch.tokens != tokenizer.pad_token_id).flatten()
        balance, peak = balance_loss(output.router_logits, used, model.config.num_experts_per_tok)
        weight = LONG_WEIGHT if is_long else 1.0
        (weight * loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses[is_long] = 0.95 * losses.get(is_long, loss.item()) + 0.05 * loss.item()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1}/{args.steps}  {time.monotonic() - started:.0f} s  loss short {losses[False]:.5f}"
                f"  long {losses.get(True, math.nan):.5f}  busiest expert {peak:.2f}x",
                flush=True,
            )
    save(model, tokenizer, args.out)
    spent = time.monotonic() - started
    print(f"wrote {args.out} after {spent:.0f} s of training, {time.process_time():.0f} s of CPU time", flush=True)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a model directory: weights rounded to bfloat16 (half the size), configured to be served in float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    # Name things as published checkpoints of this architecture do, for readers other than this transformers version.
    experts = model.config.num_experts
    rewrite_json(out / "config.json", {"dtype": "float32", "num_experts": experts}, "num_local_experts")
    rewrite_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, "backend")


def rewrite_json(path: Path, values: dict[str, object], dropped: str) -> None:
    """Set some values of a JSON file and drop one key."""
    content = json.loads(path.read_text()) | values
    content.pop(dropped, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the data (default: 0)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: 2000)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: 4e-3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--report-every", type=int, default=50, help="steps between progress lines (default: 50)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
