"""Tokenizers and models: loading, saving, and the two thin modules that the engines train."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import comm, lora
from rlhf.config import Precision, Template
from rlhf.data import template
from rlhf.engines import loading_whole, whole

DTYPES = {  # of the weights
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.autocast: torch.float32,
}
BUILTIN = "builtin:"
ASSETS = Path(__file__).parent / "assets"


class Policy(nn.Module):
    """A causal language model that answers for its last `positions` tokens only."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf

    def forward(self, ids: Tensor, mask: Tensor | None, positions: int, position_ids: Tensor | None = None) -> Tensor:
        """Logits that predict the last `positions` tokens of each row.

        Args: ids, mask (B, T), padded on either side; or of packed rows (rlhf/data/packing.py) ids and position_ids, and no
            mask.  Returns: (B, positions, V), at the places one before those tokens.
        """
        inputs = model_inputs(self.hf, ids, mask) if mask is not None else packed_inputs(self.hf, ids, position_ids)
        return self.hf(**inputs, use_cache=False, logits_to_keep=positions + 1).logits[:, :-1]


class Scorer(nn.Module):
    """A sequence-classification model with one label: reward model, or critic (its score at each token is the value).

    Scores are normalised by the mean and standard deviation in the model's configuration (`score_mean`, `score_std`), which
    the reward stage measures on held-out demonstrations.
    """

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Score at each token. Args: ids, mask (B, T), padded on either side.  Returns: (B, T) float32, normalised units."""
        hidden = self.hf.base_model(**model_inputs(self.hf.base_model, ids, mask), use_cache=False).last_hidden_state
        raw = self.hf.score(hidden)[..., 0].float()
        return (raw - getattr(self.hf.config, "score_mean", 0.0)) / getattr(self.hf.config, "score_std", 1.0)


def last_token_score(scores: Tensor, mask: Tensor) -> Tensor:
    """The score of the whole sequence: that of its last real token. Args: scores, mask (B, T).  Returns: (B,)."""
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    return scores.gather(1, last[:, None])[:, 0]


def answer_scores(scorer: Any, ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """Scores of whole sequences, (B,), read where the model has learnt to be read: at the last token, or with `score_before_eos` in its
    configuration (rm.loss=per_token) before the EOS. Args: scorer: module or engine.  ids, mask (B, T)."""
    at_tokens = scorer(ids, mask)
    return last_token_score(at_tokens, without_eos(ids, mask, eos_id) if reads_before_eos(scorer) else mask)


def reads_before_eos(scorer: Any) -> bool:
    """Whether a reward model (module or engine) gives its score at the token before the EOS."""
    return bool(getattr(getattr(scorer, "module", scorer).hf.config, "score_before_eos", False))


def without_eos(ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """A mask as DeepSpeed-Chat guesses it from ids, where EOS is the padding. Shapes (B, T)."""
    return mask * (ids != eos_id)


def model_inputs(hf: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward: positions count real tokens only, wherever the padding is."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(hf.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def packed_inputs(hf: Any, ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """The arguments of a forward over sequences that lie one behind the other in the rows: each token sees those before it in its
    own sequence, and nothing of the others.

    Args: ids, position_ids (B, T); a new sequence begins wherever position_ids do not go on by one.
    """
    from transformers.masking_utils import create_masks_for_generate

    assert position_ids is not None, "packed rows have position_ids"
    # transformers makes the mask that this model's attention takes: (B, 1, T, T), one for each kind of layer, or none for kernels
    # that read position_ids. Left to themselves, not all models would: OPT makes a plain causal one.
    like = torch.empty(*ids.shape, 1, dtype=hf.dtype, device=ids.device)
    mask = create_masks_for_generate(
        config=hf.config, inputs_embeds=like, attention_mask=None, past_key_values=None, position_ids=position_ids
    )
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}


# --------------------------------------------------------------------------------------------------------------------- loading


def location(path: str) -> str:
    """What transformers loads: the built-in model's directory, an expanded directory, or the hub id as it is."""
    if path.startswith(BUILTIN):
        return str(ASSETS / path.removeprefix(BUILTIN))
    return os.path.expanduser(path)


def check_context(path: str, max_prompt: int, max_response: int, response_key: str = "data.max_response_tokens") -> None:
    """Refuse sequences longer than the model has positions, before its weights are loaded.

    Args: max_prompt, max_response: tokens.  response_key: the setting that limits answers.  Raises: ValueError with the numbers.
    """
    context = context_length(path)
    if context and max_prompt + max_response > context:
        wanted = f"data.max_prompt_tokens={max_prompt} + {response_key}={max_response}"
        raise ValueError(f"{wanted} is more than the {context} positions of {path}: lower one of them")


def context_length(path: str) -> int | None:
    """Tokens that a model can read at once; None where nothing limits them. Loads no weights."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(location(path)), "max_position_embeddings", None)


def load_tokenizer(path: str, style: Template = Template.hh) -> Any:
    """The tokenizer of a model with the chat template of a style, and a pad token that is not its EOS.
    Raises: ValueError when it has no EOS, or with style=tokenizer no chat template that can be trained with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location(path), trust_remote_code=False)
    template.install(tokenizer, style)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no EOS token: answers could not end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load_policy(path: str, tokenizer: Any, precision: Precision, dropout: float = 0.0) -> Policy:
    """A causal language model for training or as reference; random weights (of torch's current seed) for a built-in one."""
    from transformers import AutoModelForCausalLM

    return Policy(_load(AutoModelForCausalLM, path, tokenizer, precision, dropout))


def load_scorer(path: str, tokenizer: Any, precision: Precision, zero_head: bool = False, dropout: float = 0.0) -> Scorer:
    """A one-label sequence-classification model; from a base model its head is new: N(0, 1/sqrt(d + 1)) (Stiennon 2020), or zero."""
    from transformers import AutoModelForSequenceClassification

    new_head = not is_reward_model(path)
    hf = _load(AutoModelForSequenceClassification, path, tokenizer, precision, dropout, num_labels=1)
    if new_head or zero_head:
        random = torch.Generator().manual_seed(torch.initial_seed())  # not what loading has left of torch's own stream
        with whole([hf.score.weight], modify=True):
            width = hf.score.weight.shape[1]
            head = torch.randn(1, width, generator=random) * (width + 1) ** -0.5
            hf.score.weight.data.copy_(head * (not zero_head))
    return Scorer(hf)


def is_reward_model(path: str) -> bool:
    """Whether a model has a head that gives scores."""
    from transformers import AutoConfig

    return "ForSequenceClassification" in str(AutoConfig.from_pretrained(location(path)).architectures)


def _load(auto_class: Any, path: str, tokenizer: Any, precision: Precision, dropout: float, **options: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location(path), trust_remote_code=False, **options)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):  # dropout, attn_pdrop, layerdrop, hidden_dropout, ...
            setattr(config, key, 0.0)  # the log-probabilities of an update must be those of the rollout
        if dropout and key in ("dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):  # of the residual stream
            setattr(config, key, dropout)
    if path.startswith(BUILTIN):
        with loading_whole():  # so that its random weights do not depend on the number of processes
            hf = auto_class.from_config(config, dtype=DTYPES[precision])
    else:
        hf = auto_class.from_pretrained(location(path), config=config, dtype=DTYPES[precision], trust_remote_code=False)
    if len(tokenizer) > hf.get_input_embeddings().num_embeddings:  # only grow: many models have spare rows
        hf.resize_token_embeddings(len(tokenizer))
    for settings in filter(None, (hf.config, getattr(hf, "generation_config", None))):  # what other programs stop and pad by
        settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return hf


# ---------------------------------------------------------------------------------------------------------------------- saving


def save_engine(engine: Any, tokenizer: Any, directory: Path) -> None:
    """Write an engine's model: weights (safetensors), configuration, tokenizer and template, as transformers loads them. An
    adapter is merged into the weights, and lies beside them in directory/adapter. The directory appears whole or not at all.
    Called by all processes; the first one writes."""
    hf = engine.module.hf
    weights, adapter = whole_weights(hf)
    if comm.rank() == 0:
        temporary = directory.with_name(directory.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        hf.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if adapter:
            lora.write_adapter(hf, adapter, temporary / "adapter")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    comm.barrier()


@torch.no_grad()
def whole_weights(hf: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model that may be partitioned or carry an adapter, gathered one by one: beside its own part, a process
    never holds more than one of them, and the first process collects them in host memory.

    Returns: on the first process the weights with the adapter merged, by the names of the plain model; and what the adapter
        trains, by its own names. Empty on the others, and the second one also where there is no adapter.
    """
    adapted = dict(lora.layers_of(hf))
    weights, adapter, seen = {}, {}, set()
    for name, weight in hf.state_dict(keep_vars=True).items():
        if id(weight) in seen:  # tied to another
            continue
        seen.add(id(weight))
        layer = adapted.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
        low_rank = [p for part in (layer.lora_A, layer.lora_B) for p in part.parameters()] if layer is not None else []
        with whole([weight, *low_rank]) as gathered:
            if comm.rank() == 0:
                value = weight.detach()
                if layer is not None:
                    value = (value.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
                value = value.to("cpu", copy=gathered)
                if ".lora_" not in name:
                    weights[lora.merged_name(name)] = value
                if adapted and weight.requires_grad:
                    adapter[name] = value
    return weights, adapter
