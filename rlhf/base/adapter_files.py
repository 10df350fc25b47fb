"""The files of an adapter that peft has written: its base, and what its weights are for.

An adapter is a directory with adapter_config.json and no model; wherever a model is expected, it
stands for its base with the adapter merged. No torch here.
"""

from __future__ import annotations

import json
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.locations import is_directory, model_directory
from rlhf.base.model_files import score_heads

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE_KEY = "base_model_name_or_path"  # a directory, a hub id or a built-in model
SEED = "seed-"  # of a built-in base: `revision` names the seed of its random weights
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"  # task_type of a policy, of a reward model


def is_adapter(path: str) -> bool:
    """Whether a model path is a directory with an adapter and without a model's weights."""
    return is_directory(path) and has_adapter(path) and not has_weights(path)


def has_adapter(path: str) -> bool:
    """Whether a directory has an adapter, beside a model or not."""
    return (model_directory(path) / CONFIG).exists()


def has_weights(path: str) -> bool:
    """Whether a directory has the weights of a model, in one of transformers' formats."""
    directory = model_directory(path)
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    return any(next(directory.glob(pattern), None) for pattern in patterns)


def adapter_settings(path: str) -> dict[str, Any]:
    """An adapter's configuration; empty where the file is torn or not an object."""
    try:
        settings = json.loads((model_directory(path) / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def chain_of(path: str) -> list[str]:
    """A model's path, and where that is an adapter, its base, and so on to the whole model.

    Raises: UserError where adapters are each other's base.
    """
    chain = [path]
    while is_adapter(chain[-1]) and (base := adapter_settings(chain[-1]).get(BASE_KEY)):
        if base in chain:
            raise UserError(f"{BASE_KEY}={base} leads back to it: name the model it was trained on")
        chain.append(str(base))
    return chain


def base_of(path: str) -> str:
    """The whole model below all adapters; a path that is no adapter as it is. Raises: UserError."""
    return chain_of(path)[-1]


def tokenizer_of(path: str) -> str:
    """Where a model's tokenizer is: with an adapter where it has one, else with its base.

    Raises: UserError as `chain_of`.
    """
    chain = chain_of(path)
    saved = (p for p in chain[:-1] if (model_directory(p) / "tokenizer_config.json").exists())
    return next(saved, chain[-1])


def shapes_of_weights(path: str) -> dict[str, list[int]]:
    """The shape of each weight of an adapter."""
    from safetensors import safe_open

    with safe_open(model_directory(path) / WEIGHTS, "np") as opened:
        names = opened.keys()
        return {name: opened.get_slice(name).get_shape() for name in names}


def has_score_head(path: str) -> bool:
    """Whether an adapter has a head that gives scores, saved in full."""
    return bool(score_heads(name for name in shapes_of_weights(path) if ".lora_" not in name))


def adapter_problem(path: str) -> str | None:
    """What is wrong with an adapter's own files, as one line with the fix; or None."""
    directory, settings = model_directory(path), adapter_settings(path)
    kind, base = settings.get("peft_type"), settings.get(BASE_KEY)
    if kind is None:
        return f"{directory / CONFIG} is not the configuration of an adapter: save it again"
    if kind != "LORA":
        return f"peft_type={kind}: only LORA adapters are read: merge it, and give the whole model"
    if not (directory / WEIGHTS).exists():
        if (directory / PICKLE).exists():
            return (
                f"{PICKLE} is a pickle, which may run code when it is read: save the adapter as "
                f"{WEIGHTS} (peft: save_pretrained with safe_serialization=True)"
            )
        return f"no {directory / WEIGHTS}: fetch it"
    if not isinstance(base, str) or not base:
        return f"{CONFIG} has no {BASE_KEY}: name the model there that it was trained on"
    if is_directory(base) and not model_directory(base).exists():
        return f"{BASE_KEY}={base}: no such directory: bring it back, or name it in {CONFIG}"
    revision = settings.get("revision")
    if ":" not in base and revision not in (None, "main"):
        return f"revision={revision} of {base}: name a directory that has it as {BASE_KEY}"
    return None
