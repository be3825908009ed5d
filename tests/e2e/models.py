"""Tiny checkpoints with random weights, written to disk as a hub would have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from elastic_daemon.config import BUNDLED_MODEL

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _vocabulary() -> dict[str, int]:
    config = AutoConfig.from_pretrained(BUNDLED_MODEL)
    return {"vocab_size": config.vocab_size, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}


def qwen3_moe(path: Path) -> Path:
    """Eight experts, top-2, four layers."""
    config = Qwen3MoeConfig(
        **_vocabulary(),
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
    )
    return _save(Qwen3MoeForCausalLM, config, path)


def deepseek_v2(path: Path) -> Path:
    """Multi-head latent attention of the one size that vLLM's CPU kernel has, a dense first layer, shared experts.

    Eight routed experts.
    """
    config = DeepseekV2Config(
        **_vocabulary(),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        max_position_embeddings=2048,
    )
    return _save(DeepseekV2ForCausalLM, config, path)


def _save(model_class: type, config: PreTrainedConfig, path: Path) -> Path:
    torch.manual_seed(7)
    model = model_class(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Larger than at initialisation: near-ties between tokens would make a comparison of text meaningless.
                parameter.mul_(2.0)
    model.save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED_MODEL / name, path)
    return path
