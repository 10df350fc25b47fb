"""Model shapes and parameter counts, by architecture family. No torch here."""

from __future__ import annotations

import json
from typing import Any

from rlhf.base.adapter_files import base_of
from rlhf.base.errors import UserError
from rlhf.base.locations import ASSETS, BUILTIN, is_directory, model_directory
from rlhf.config.schema import Arch, Lora

# Elements that one block keeps per token for the backward pass: (x ffn, x hidden in fp32, x hidden
# in bf16). The norms of the llama family compute in fp32, which a bf16 block keeps beside its own
# tensors. The attention mask adds one element per key; BLOOM keeps its attention matrix, for each
# head once in fp32 and three times in bf16.
ACTIVATIONS = {
    "opt": (1, 8, 8),
    "gpt2": (5, 8, 8),
    "gpt_neox": (2, 10, 10),
    "llama": (4, 10, 12),
    "qwen2": (4, 10, 12),
    "gemma3_text": (4, 17, 28),
    "bloom": (1, 12, 12),
}


def linear_layers(arch: Arch) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of one block, by transformers' names.

    Raises: UserError for an unknown family.
    """
    h, f, q, kv = arch.hidden, arch.ffn, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    if arch.family == "opt":
        return {
            "q_proj": (h, h),
            "k_proj": (h, h),
            "v_proj": (h, h),
            "out_proj": (h, h),
            "fc1": (h, f),
            "fc2": (f, h),
        }
    if arch.family == "gpt2":
        return {
            "attn.c_attn": (h, 3 * h),
            "attn.c_proj": (h, h),
            "mlp.c_fc": (h, f),
            "mlp.c_proj": (f, h),
        }
    if arch.family in ("gpt_neox", "bloom"):
        return {
            "query_key_value": (h, 3 * h),
            "dense": (h, h),
            "dense_h_to_4h": (h, f),
            "dense_4h_to_h": (f, h),
        }
    if arch.family in ("llama", "qwen2", "gemma3_text"):
        mlp = {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}
        return {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)} | mlp
    raise UserError(f"arch.family={arch.family}: must be one of {', '.join(ACTIVATIONS)}")


def block_parameters(arch: Arch) -> int:
    """Weights of one block, biases and norms included."""
    layers = linear_layers(arch)
    weights = sum(i * o for i, o in layers.values())
    outputs = sum(o for _, o in layers.values())
    h = arch.hidden
    if arch.family in ("opt", "gpt2", "gpt_neox", "bloom"):  # biases everywhere, also in two norms
        return weights + outputs + 4 * h
    if arch.family == "qwen2":  # biases on queries, keys and values
        return weights + (arch.heads + 2 * arch.kv_heads) * arch.head_dim + 2 * h
    if arch.family == "gemma3_text":  # four norms, and one each for queries and keys
        return weights + 4 * h + 2 * arch.head_dim
    return weights + 2 * h


def parameters(arch: Arch, scorer: bool = False) -> int:
    """Number of weights of a causal language model.

    Args: scorer: count the sequence-classification model with one label instead.
    """
    h, width = arch.hidden, arch.embed or arch.hidden
    total = arch.vocab * width + arch.layers * block_parameters(arch)
    if arch.family == "opt":  # positions start at 2; no final norm where embeddings are projected
        total += (arch.positions + 2) * h + (2 * h if width == h else 2 * width * h)
    elif arch.family == "gpt2":
        total += arch.positions * h + 2 * h
    elif arch.family == "bloom":  # a norm behind the embeddings too; no positions (ALiBi)
        total += 4 * h
    else:
        total += 2 * h if arch.family == "gpt_neox" else h
    if scorer:
        return total + width
    return total if arch.tied else total + arch.vocab * width


def lora_parameters(arch: Arch, lora: Lora, scorer: bool = False) -> int:
    """Number of trained weights with an adapter.

    rank x (inputs + outputs) of each adapted layer, the head of a scorer, and the embeddings where
    they are trained.
    """
    width = arch.embed or arch.hidden
    layers = [shape for name, shape in linear_layers(arch).items() if is_adapted(name, lora)]
    total = arch.layers * sum(lora.rank * (inputs + outputs) for inputs, outputs in layers)
    if width != arch.hidden:
        projections = sum(is_adapted(name, lora) for name in ("project_in", "project_out"))
        total += projections * lora.rank * (width + arch.hidden)
    return total + (width if scorer else 0) + (arch.vocab * width if lora.embeddings else 0)


def adapted_weights(arch: Arch, lora: Lora) -> int:
    """Number of frozen weights of the layers that an adapter is added to."""
    layers = linear_layers(arch).items()
    return arch.layers * sum(
        inputs * outputs for name, (inputs, outputs) in layers if is_adapted(name, lora)
    )


def is_adapted(layer: str, lora: Lora) -> bool:
    """Whether a linear layer gets an adapter. Names match where one is the end of the other."""
    return lora.targets is None or any(
        layer == target or layer.endswith("." + target) or target.endswith("." + layer)
        for target in lora.targets
    )


def arch_of(path: str, given: Arch | None) -> Arch | None:
    """The shape of a model.

    Args: path: read from config.json where this, or the base of an adapter, is a directory or built
        in.  given: else this.
    Returns: None where the shape is unknown.
    Raises: UserError for a family that there is no formula for.
    """
    path = base_of(path)
    if path.startswith(BUILTIN):
        file = ASSETS / path.removeprefix(BUILTIN) / "config.json"
    elif is_directory(path):
        file = model_directory(path) / "config.json"
    else:
        return given
    saved = json.loads(file.read_text(encoding="utf-8"))
    family = saved.get("model_type")
    if family not in ACTIVATIONS:
        raise UserError(
            f"{path}: there is no memory formula for models of type {family}; "
            "it trains without a plan"
        )
    return read_arch(saved, family)


def read_arch(saved: dict[str, Any], family: str) -> Arch:
    """The shape that a config.json of transformers describes; names depend on the family."""

    def get(*names: str, default: Any = None) -> Any:
        return next((saved[name] for name in names if saved.get(name) is not None), default)

    hidden, heads = get("hidden_size", "n_embd", "n_embed"), get("num_attention_heads", "n_head")
    width = get("word_embed_proj_dim", default=hidden)
    return Arch(
        family=family,
        layers=get("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=get("num_key_value_heads", default=heads),
        head_dim=get("head_dim", default=hidden // heads),
        ffn=get("ffn_dim", "intermediate_size", "n_inner", default=4 * hidden),
        vocab=saved["vocab_size"],
        positions=get("max_position_embeddings", "n_positions", "seq_length", default=2048),
        tied=get("tie_word_embeddings", default=family in ("opt", "gpt2", "bloom", "gemma3_text")),
        embed=width if width != hidden else None,
    )
