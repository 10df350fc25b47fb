"""Tiny random models of every architecture, as base models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 732
FAMILIES: dict[
    str, tuple[str, dict[str, Any]]
] = {  # absolute positions, rotary ones, ALiBi; dropout wherever the family knows it
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "layerdrop": 0.1,
            "init_std": 0.2,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "attention_dropout": 0.1,
            "embed_dropout": 0.1,
            "resid_dropout": 0.1,
            "initializer_range": 0.2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 1, "attention_dropout": 0.1}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1, "attention_dropout": 0.1}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"num_key_value_heads": 1, "head_dim": 16, "attention_dropout": 0.1, "sliding_window": 8},
    ),
    "bloom": (
        "BloomConfig",
        {
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 2,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "initializer_range": 0.2,
        },
    ),
}
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def save_base(path: Path, family: str, vocabulary: int = VOCABULARY, **more: Any) -> None:
    name, values = FAMILIES[family]
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    common = COMMON if family in ("gpt_neox", "llama", "qwen2", "gemma3_text") else {}
    shape = getattr(transformers, name)(
        vocab_size=vocabulary, **special, **(common | values | more)
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
