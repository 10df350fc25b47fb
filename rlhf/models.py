"""Tokenizers and models: loading, saving, and the two thin modules that the engines train."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import comm, logprobs, lora, unpadded
from rlhf.config import Precision, Template
from rlhf.data import template
from rlhf.engines import loading_whole, whole
from rlhf.objectives import token_logp

DTYPES = {  # of the weights
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.autocast: torch.float32,
}
BUILTIN = "builtin:"
ASSETS = Path(__file__).parent / "assets"


class Model(nn.Module):
    """What policy and scorer share: hidden states of the tokens of a batch, without its padding where the architecture allows that."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf
        self.recorded: Any = None  # of the sampling loop (rlhf/decode.py)
        self.plain: bool | None = None if unpadded.install(hf) else False  # None: to be tried at the first forward

    outputs: Callable[[Tensor], Tensor]  # of one sequence, ids (1, T), as the model itself gives them, (T, V or d)
    head: Callable[[Tensor], Tensor]  # the same from hidden states (T, d)

    def hidden(self, ids: Tensor, mask: Tensor, padded: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states of some tokens, (N, d), and the number among them of each place in the batch (B, T), at padding of the last real
        token before it. Args: ids, mask (B, T).  padded: states of the padding too."""
        if padded or not self.is_plain():
            states = self.hf.base_model(**model_inputs(self.hf.base_model, ids, mask), use_cache=False).last_hidden_state
            place = torch.arange(ids.numel(), device=ids.device).view_as(ids)
            if not padded:
                place = torch.where(mask > 0, place, -1).cummax(1).values.clamp(min=0)
            return states.flatten(0, 1), place
        layout = unpadded.lay_out(ids, mask)
        return self.hf.base_model(**unpadded.inputs_of(layout, self.hf.dtype), use_cache=False).last_hidden_state[0], layout.place

    def is_plain(self) -> bool:
        """Whether it is computed without padding, and a policy's logits are the product of hidden states and output layer."""
        if self.plain is None:
            self.plain = self.agrees()
        return self.plain

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether what is computed without padding is what the model itself computes of each sequence alone. It is tried: three texts,
        two of which begin alike. A model with another attention, or one that scales its logits, is used as it is."""
        vocabulary = self.hf.get_input_embeddings().num_embeddings
        random = torch.randint(vocabulary, (3, 32), generator=torch.Generator().manual_seed(0))
        random[1, :20] = random[0, :20]
        lengths, device = [32, 27, 24], self.hf.get_input_embeddings().weight.device
        ids, mask = random.to(device), (torch.arange(32) < torch.tensor(lengths)[:, None]).long().to(device)
        changed = ids.clone()
        changed[:, :3] = (changed[:, :3] + 1) % vocabulary
        training = self.training
        self.eval()  # without the dropout of an adapter
        alone = [self.outputs(ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
        moved = [self.outputs(changed[i : i + 1, :n]) for i, n in enumerate(lengths)]
        layout = unpadded.lay_out(ids, mask)
        states = self.hf.base_model(**unpadded.inputs_of(layout, self.hf.dtype), use_cache=False).last_hidden_state[0]
        together = [self.head(states[layout.place[i, :n]]).float() for i, n in enumerate(lengths)]
        self.train(training)
        # What counts as a difference: how far the outputs move when a text begins with other tokens. Rounding of float32 moves them less
        # than 1e-4 times as far, that of bf16 at most 0.05 times (7 families, random weights, 2 to 12 layers).
        error = max(float((a - b).abs().mean(-1).max()) for a, b in zip(together, alone))
        effect = min(float((a - b).abs().mean(-1)[6:].mean()) for a, b in zip(moved, alone))
        exact = self.hf.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
        return error < (1e-3 if exact else 0.25) * effect


class Policy(Model):
    """A causal language model that gives the log-probabilities of tokens."""

    def __init__(self, hf: Any):
        super().__init__(hf)
        head = hf.get_output_embeddings()
        if type(head) is nn.Linear:
            logprobs.give_logp(head)
        else:
            self.plain = False

    def outputs(self, ids: Tensor) -> Tensor:
        return self.hf(input_ids=ids, use_cache=False).logits[0].float()

    def head(self, states: Tensor) -> Tensor:
        return self.hf.get_output_embeddings()(states)

    def forward(self, ids: Tensor, mask: Tensor, wanted: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of tokens, given those before them in their rows.

        Args: ids, mask (B, T), padded on either side.  wanted (B, T) bool: of which tokens; no row's first one.  temperature: divides
            the logits, in float32.
        Returns: three tensors (B, T), float32, zero where not wanted: log-probability, entropy of the whole distribution (both with
            gradient, nats), and 1 where the token is the likeliest.
        """
        rows, columns = wanted.nonzero(as_tuple=True)
        targets = ids[rows, columns]
        if self.is_plain():
            states, place = self.hidden(ids, mask)
            found = self.hf.get_output_embeddings()(states[place[rows, columns - 1]], targets, temperature)
        else:
            first = int(columns.min()) if len(columns) else ids.shape[1]
            kept = self.hf(**model_inputs(self.hf, ids, mask), use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits
            logits = kept[rows, columns - first]
            found = *token_logp(logits, targets, temperature), (logits.argmax(-1) == targets).float()
        dense = (torch.zeros(ids.shape, device=ids.device).index_put((rows, columns), x) for x in found)
        return tuple(dense)  # type: ignore[return-value]


class Scorer(Model):
    """A sequence-classification model with one label: reward model, or critic (its score at each token is the value).

    Scores are normalised by the mean and standard deviation in the model's configuration (`score_mean`, `score_std`), which
    the reward stage measures on held-out demonstrations.
    """

    def outputs(self, ids: Tensor) -> Tensor:
        return self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()

    def head(self, states: Tensor) -> Tensor:
        return states

    def forward(self, ids: Tensor, mask: Tensor, padded: bool = False) -> Tensor:
        """Score at each token. Args: ids, mask (B, T), padded on either side.  padded: at padding too, as it would be read there; else
        padding has the score of the last real token before it.  Returns: (B, T) float32, normalised units."""
        states, place = self.hidden(ids, mask, padded)
        raw = self.hf.score(states)[:, 0].float()[place]
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
