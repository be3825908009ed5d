"""The bundled model: shape of the checkpoint, the data it was trained on, and held-out accuracy."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from training.data import TASKS, Example, examples, held_out_examples, is_held_out, is_right, solve
from training.evaluate import DEFAULT_MODEL, answer, evaluate, expert_shares, load

LAYERS = 4
EXPERTS = 16


def training_examples(task: str, n: int, seed: int = 0) -> list[Example]:
    return list(itertools.islice(examples(task, seed, held_out=False), n))


def test_config_and_size() -> None:
    config = json.loads((DEFAULT_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["model_type"] == "qwen3_moe"
    assert (config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"]) == (LAYERS, EXPERTS, 2)
    assert config["norm_topk_prob"] is True
    assert config["dtype"] == "float32"
    assert config["decoder_sparse_step"] == 1
    assert config["mlp_only_layers"] == []
    assert sum(path.stat().st_size for path in DEFAULT_MODEL.iterdir()) <= 12_000_000


def test_checkpoint_has_one_tensor_per_expert_and_projection() -> None:
    with safe_open(DEFAULT_MODEL / "model.safetensors", "pt") as file:
        names = set(file.keys())
    found = {name for name in names if ".experts." in name}
    assert found == {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for projection in ("gate", "up", "down")
    }


def test_greedy_requests_stay_greedy_by_default() -> None:
    generation = json.loads((DEFAULT_MODEL / "generation_config.json").read_text())
    assert not {"temperature", "top_k", "top_p", "repetition_penalty"} & generation.keys()
    assert generation["eos_token_id"] == json.loads((DEFAULT_MODEL / "config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_deterministic_and_right(task: str) -> None:
    first = training_examples(task, 50, 3)
    assert first == training_examples(task, 50, 3)
    assert first != training_examples(task, 50, 4)
    assert all(is_right(e.prompt, e.answer) for e in first)


@pytest.mark.parametrize("task", TASKS)
def test_training_and_held_out_prompts_are_disjoint(task: str) -> None:
    trained = {e.prompt for e in training_examples(task, 2000)}
    held_out = {e.prompt for e in held_out_examples(task, 300, 0)}
    assert len(held_out) == 300
    assert not trained & held_out
    assert not any(map(is_held_out, trained))
    assert all(map(is_held_out, held_out))


def test_split_ignores_the_order_of_operands() -> None:
    assert is_held_out("add 12 + 345 =") == is_held_out("add 345 + 12 =")
    assert is_held_out("sort 3 1 2 =") == is_held_out("sort 1 2 3")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("sort 42 7 93 15 =", "7 15 42 93"),
        ("add 384 + 729", "1113"),
        ("reverse dragon =", "nogard"),
        ("count 17 to 37 by 5 =", "17 22 27 32 37"),
    ],
)
def test_solve(prompt: str, expected: str) -> None:
    assert solve(prompt) == expected
    assert is_right(prompt, f" {expected}")
    assert not is_right(prompt, f" {expected} 1")


def test_solve_refuses_other_text() -> None:
    with pytest.raises(ValueError, match="not a task"):
        solve("tell me a story")


def test_held_out_accuracy() -> None:
    torch.set_num_threads(1)
    tasks = ("sort", "add", "reverse", "count")
    results = evaluate(DEFAULT_MODEL, 64, 99, tasks=tasks)
    results |= evaluate(DEFAULT_MODEL, 40, 99, tasks=("count_long",))
    shares = {task: sum(o.right for o in outputs) / len(outputs) for task, outputs in results.items()}
    assert sum(shares.values()) / len(shares) >= 0.95, shares
    assert min(shares.values()) >= 0.85, shares


def test_every_expert_is_used() -> None:
    torch.set_num_threads(1)
    for shares in expert_shares(DEFAULT_MODEL, 10, 99):
        assert len(shares) == EXPERTS
        assert min(shares) > 0.01, shares
        assert max(shares) < 0.2, shares


def test_chat_and_completion_give_the_same_answers() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load(DEFAULT_MODEL)
    batch = [e for task in ("sort", "add", "reverse", "count") for e in held_out_examples(task, 8, 5)]
    chats = answer(model, tokenizer, batch, chat=True)
    completions = answer(model, tokenizer, batch)
    assert [o.text for o in chats] == [o.text.removeprefix(" ") for o in completions]


def test_model_card_states_measured_accuracy() -> None:
    card = (DEFAULT_MODEL / "README.md").read_text()
    assert all(re.search(rf"`{task}`.*\d+(\.\d+)?%", card) for task in TASKS)
    assert Path(DEFAULT_MODEL / "chat_template.jinja").is_file()
