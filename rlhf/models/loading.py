"""Tokenizers and models: loading and saving."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import Precision, Template
from rlhf.data import template
from rlhf.distributed import collectives
from rlhf.distributed.engine import gather_parameters, without_zero3_init
from rlhf.models import lora
from rlhf.models.wrappers import Policy, Scorer
from rlhf.runs.locations import ASSETS, BUILTIN

DTYPES = {  # of the weights
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.autocast: torch.float32,
}


def location(path: str) -> str:
    """What transformers loads: the built-in model's directory, an expanded directory, or the hub id as it is."""
    if path.startswith(BUILTIN):
        return str(ASSETS / path.removeprefix(BUILTIN))
    return os.path.expanduser(path)


def check_context(
    path: str, max_prompt: int, max_response: int, response_key: str = "data.max_response_tokens"
) -> None:
    """Refuse sequences longer than the model has positions, before its weights are loaded.

    Args: max_prompt, max_response: tokens.  response_key: the setting that limits answers.  Raises: ValueError with the numbers.
    """
    context = context_length(path)
    if context and max_prompt + max_response > context:
        wanted = f"data.max_prompt_tokens={max_prompt} + {response_key}={max_response}"
        raise ValueError(
            f"{wanted} is more than the {context} positions of {path}: lower one of them"
        )


def context_length(path: str) -> int | None:
    """Tokens that a model can read at once; None where nothing limits them. Loads no weights."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(location(path)), "max_position_embeddings", None)


def load_tokenizer(path: str, style: Template = Template.hh) -> Any:
    """The tokenizer of a model with the chat template of a style, and a pad token that is not its EOS.
    Raises: ValueError when it has no EOS, or with style=tokenizer no chat template that can be trained with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location(path), trust_remote_code=False)
    template.install_chat_template(tokenizer, style)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no EOS token: answers could not end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load_policy(path: str, tokenizer: Any, precision: Precision, dropout: float = 0.0) -> Policy:
    """A causal language model for training or as reference; random weights (of torch's current seed) for a built-in one."""
    from transformers import AutoModelForCausalLM

    return Policy(_load_pretrained(AutoModelForCausalLM, path, tokenizer, precision, dropout))


def load_scorer(
    path: str, tokenizer: Any, precision: Precision, zero_head: bool = False, dropout: float = 0.0
) -> Scorer:
    """A one-label sequence-classification model; from a base model its head is new: N(0, 1/sqrt(d + 1)) (Stiennon 2020), or zero."""
    from transformers import AutoModelForSequenceClassification

    new_head = not is_reward_model(path)
    hf = _load_pretrained(
        AutoModelForSequenceClassification, path, tokenizer, precision, dropout, num_labels=1
    )
    if new_head or zero_head:
        random = torch.Generator().manual_seed(
            torch.initial_seed()
        )  # not what loading has left of torch's own stream
        with gather_parameters([hf.score.weight], modify=True):
            width = hf.score.weight.shape[1]
            head = torch.randn(1, width, generator=random) * (width + 1) ** -0.5
            hf.score.weight.data.copy_(head * (not zero_head))
    return Scorer(hf)


def is_reward_model(path: str) -> bool:
    """Whether a model has a head that gives scores."""
    from transformers import AutoConfig

    return "ForSequenceClassification" in str(
        AutoConfig.from_pretrained(location(path)).architectures
    )


def _load_pretrained(
    auto_class: Any, path: str, tokenizer: Any, precision: Precision, dropout: float, **options: Any
) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location(path), trust_remote_code=False, **options)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(
            value, float
        ):  # dropout, attn_pdrop, layerdrop, hidden_dropout, ...
            setattr(
                config, key, 0.0
            )  # the log-probabilities of an update must be those of the rollout
        if dropout and key in (
            "dropout",
            "hidden_dropout",
            "resid_pdrop",
            "embd_pdrop",
        ):  # of the residual stream
            setattr(config, key, dropout)
    if path.startswith(BUILTIN):
        with (
            without_zero3_init()
        ):  # so that its random weights do not depend on the number of processes
            hf = auto_class.from_config(config, dtype=DTYPES[precision])
    else:
        hf = auto_class.from_pretrained(
            location(path), config=config, dtype=DTYPES[precision], trust_remote_code=False
        )
    if (
        len(tokenizer) > hf.get_input_embeddings().num_embeddings
    ):  # only grow: many models have spare rows
        hf.resize_token_embeddings(len(tokenizer))
    for settings in filter(
        None, (hf.config, getattr(hf, "generation_config", None))
    ):  # what other programs stop and pad by
        settings.pad_token_id, settings.eos_token_id = (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
    return hf


def save_engine(engine: Any, tokenizer: Any, directory: Path) -> None:
    """Write an engine's model: weights (safetensors), configuration, tokenizer and template, as transformers loads them. An
    adapter is merged into the weights, and lies beside them in directory/adapter. The directory appears whole or not at all.
    Called by all processes; the first one writes."""
    hf = engine.module.hf
    weights, adapter = full_state_dict(hf)
    if collectives.rank() == 0:
        temporary = directory.with_name(directory.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        hf.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if adapter:
            lora.write_adapter(hf, adapter, temporary / "adapter")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    collectives.barrier()


@torch.no_grad()
def full_state_dict(hf: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model that may be partitioned or carry an adapter, gathered one by one: beside its own part, a process
    never holds more than one of them, and the first process collects them in host memory.

    Returns: on the first process the weights with the adapter merged, by the names of the plain model; and what the adapter
        trains, by its own names. Empty on the others, and the second one also where there is no adapter.
    """
    adapted = dict(lora.lora_layers(hf))
    weights, adapter, seen = {}, {}, set()
    for name, weight in hf.state_dict(keep_vars=True).items():
        if id(weight) in seen:  # tied to another
            continue
        seen.add(id(weight))
        layer = (
            adapted.get(name.removesuffix(".base_layer.weight"))
            if name.endswith(".base_layer.weight")
            else None
        )
        low_rank = (
            [p for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]
            if layer is not None
            else []
        )
        with gather_parameters([weight, *low_rank]) as gathered:
            if collectives.rank() == 0:
                value = weight.detach()
                if layer is not None:
                    value = (value.float() + layer.get_delta_weight("default").float()).to(
                        weight.dtype
                    )
                value = value.to("cpu", copy=gathered)
                if ".lora_" not in name:
                    weights[lora.merged_name(name)] = value
                if adapted and weight.requires_grad:
                    adapter[name] = value
    return weights, adapter
