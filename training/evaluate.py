"""Held-out accuracy of a model directory, by greedy generation with transformers."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data import TASKS, Example, held_out_examples, is_right

EXAMPLES = """\
examples:
  python -m training.evaluate elastic_daemon/models/tiny_moe
  python -m training.evaluate elastic_daemon/models/tiny_moe -n 500 --seed 7 --chat --show 2
"""

# Answer tokens plus the end of the longest answer; a model that runs past it is wrong anyway.
MAX_NEW_TOKENS = 720
DEFAULT_MODEL = Path(__file__).parents[1] / "elastic_daemon" / "models" / "tiny_moe"


@dataclass(frozen=True)
class Output:
    """What the model made of one example: its text, token count and top-1/top-2 logit gap at every token."""

    example: Example
    text: str
    tokens: int
    gaps: list[float]

    @property
    def right(self) -> bool:
        """Whether the text is the exact answer, and the model ended it by itself."""
        return self.tokens < MAX_NEW_TOKENS and is_right(self.example.prompt, self.text)


def load(model_dir: Path | str) -> tuple[Any, Any]:
    """Load a model in float32 with its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()
    model.set_experts_implementation("grouped_mm")
    return model, AutoTokenizer.from_pretrained(model_dir)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, batch: list[Example], *, chat: bool = False) -> list[Output]:
    """Answer examples greedily, as completion prompts or as chats of one user message."""
    if chat:
        # A chat message carries the bare task; the template adds the rest.
        messages = [[{"role": "user", "content": e.prompt.removesuffix(" =")}] for e in batch]
        prompts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        prompts = [e.prompt for e in batch]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    generated = model.generate(
        **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(generated.logits, dim=1).topk(2, dim=-1).values
    gaps = (best[..., 0] - best[..., 1]).tolist()
    outputs = []
    for example, row, row_gaps in zip(batch, generated.sequences[:, inputs["input_ids"].shape[1] :], gaps, strict=True):
        ids = row.tolist()
        tokens = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        text = tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        outputs.append(Output(example, text, tokens, row_gaps[:tokens]))
    return outputs


def evaluate(
    model_dir: Path | str, n: int, seed: int, *, chat: bool = False, tasks: tuple[str, ...] = TASKS, batch: int = 64
) -> dict[str, list[Output]]:
    """Answer ``n`` held-out examples of each task."""
    model, tokenizer = load(model_dir)
    results: dict[str, list[Output]] = {}
    for task in tasks:
        # Rows of similar length, since a batch runs until its longest answer has ended.
        todo = sorted(held_out_examples(task, n, seed), key=lambda e: len(e.answer))
        results[task] = [
            output for at in range(0, n, batch) for output in answer(model, tokenizer, todo[at : at + batch], chat=chat)
        ]
    return results


def accuracy(model_dir: Path | str, n: int, seed: int) -> dict[str, float]:
    """Share of exactly right answers to ``n`` held-out prompts of each task."""
    return {task: sum(o.right for o in outputs) / n for task, outputs in evaluate(model_dir, n, seed).items()}


@torch.inference_mode()
def expert_shares(model_dir: Path | str, n: int, seed: int) -> list[list[float]]:
    """Per layer, the share of router choices that went to each expert over ``n`` right held-out answers per task."""
    model, tokenizer = load(model_dir)
    tasks = [held_out_examples(task, n, seed) for task in TASKS]
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for example in (example for task in tasks for example in task):
        inputs = tokenizer(example.prompt + example.answer, return_tensors="pt", return_token_type_ids=False)
        for layer, logits in enumerate(model(**inputs, output_router_logits=True).router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=counts.shape[1])
    return (counts / counts.sum(dim=1, keepdim=True)).tolist()


def percentiles(gaps: list[float]) -> str:
    """Describe the low end of the logit gaps."""
    values = torch.tensor(gaps)
    low, one, ten = torch.quantile(values[:: max(1, len(values) // 1_000_000)], torch.tensor([0.001, 0.01, 0.1]))
    return f"min {values.min():.2f}  0.1% {low:.2f}  1% {one:.2f}  10% {ten:.2f}"


def main() -> None:
    """Parse the command line, and print accuracy, logit gaps and the use of the experts."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT_MODEL, help="model directory")
    parser.add_argument("-n", type=int, default=200, help="held-out prompts per task (default: 200)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the prompts (default: 1234)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tasks (default: all)")
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print per task (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    every_gap: list[float] = []
    for task, outputs in evaluate(args.model, args.n, args.seed, chat=args.chat, tasks=tuple(args.tasks)).items():
        right = [o for o in outputs if o.right]
        lengths = sorted(o.tokens for o in outputs)
        gaps = [gap for o in outputs for gap in o.gaps]
        every_gap += gaps
        print(
            f"{task:10}  {len(right)}/{len(outputs)} right ({len(right) / len(outputs):.1%})"
            f"  answer tokens {lengths[0]}..{lengths[len(lengths) // 2]}..{lengths[-1]}  gap {percentiles(gaps)}"
        )
        for output in [o for o in outputs if not o.right][: args.show]:
            print(f"    {output.example.prompt}{output.text}\n      should be{output.example.answer}")
    print(f"all tasks   gap {percentiles(every_gap)}   {time.monotonic() - started:.0f} s")
    for layer, shares in enumerate(expert_shares(args.model, min(args.n, 50), args.seed)):
        print(f"layer {layer}  share of router choices per expert: least {min(shares):.1%}, most {max(shares):.1%}")


if __name__ == "__main__":
    main()
