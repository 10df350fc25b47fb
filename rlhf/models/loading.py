"""Tokenizers and models: loading and saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.base import watchdog
from rlhf.base.adapter_files import (
    BASE_KEY,
    CONFIG,
    adapter_settings,
    base_of,
    has_score_head,
    is_adapter,
    tokenizer_of,
)
from rlhf.base.checksums import write_sums
from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.base.locations import ASSETS, BUILTIN, is_directory, model_directory
from rlhf.base.log import announced, first_few, first_line, log, plural
from rlhf.base.model_files import score_heads, weight_names
from rlhf.config.choices import Precision, Template
from rlhf.config.schema import Lora
from rlhf.data import template
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, HfModule, gather_parameters, without_zero3_init
from rlhf.models import adapters, lora
from rlhf.models.token_rows import layers_with_rows, merge_rows, near_zero_rows
from rlhf.models.weights import load_weights
from rlhf.models.wrappers import Policy, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

DTYPES = {  # of the weights
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.autocast: torch.float32,
}


def location(path: str) -> str:
    """What transformers loads: a directory (of a run, the model in it), or a hub id."""
    if path.startswith(BUILTIN):
        return str(ASSETS / path.removeprefix(BUILTIN))
    return str(model_directory(path)) if is_directory(path) else path


def load_config(path: str, **options: int) -> PreTrainedConfig:
    """A model's configuration, of an adapter that of its base. Args: options: to change.

    Raises: UserError where it cannot be read.
    """
    from transformers import AutoConfig

    where = location(base_of(path))
    with reading(where, "configuration"):
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **options)


@contextlib.contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Raises: UserError with the reason where transformers cannot read a file of a model.

    Args: where: its directory or hub id.  what: the configuration or the tokenizer.
    """
    try:
        yield
    except Exception as error:  # of many kinds: the file is torn, unknown to transformers, missing
        raise UserError(
            f"{where}: its {what} cannot be read ({type(error).__name__}: "
            f"{first_line(error).rstrip('.')}): fetch the model again, or choose another one"
        ) from error


def check_context(
    path: str, max_prompt: int, max_response: int, response_key: str = "data.max_response_tokens"
) -> None:
    """Refuse sequences longer than a model's context, before its weights are loaded.

    Args: max_prompt, max_response: tokens.  response_key: the setting that limits responses.
    Raises: UserError with the numbers.
    """
    context = context_length(path)
    if context and max_prompt + max_response > context:
        total = f"data.max_prompt_tokens={max_prompt} + {response_key}={max_response}"
        raise UserError(
            f"{total} is more than the {context} positions of {path}: lower one of them"
        )


def context_length(model: str | PreTrainedConfig) -> int | None:
    """Tokens that a model can read at once; None where nothing limits them.

    Args: model: its path, of which only the configuration is loaded, or its configuration.
    """
    config = load_config(model) if isinstance(model, str) else model
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(path: str, style: Template = Template.hh) -> PreTrainedTokenizerBase:
    """A model's tokenizer with the chat template of `style`, and a pad token that is never written.

    Raises: UserError when it cannot be read, has no EOS, or with style=tokenizer no chat template
        to train with.
    """
    from transformers import AutoTokenizer

    where = location(tokenizer_of(path))
    with reading(where, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    own_eos = tokenizer.eos_token
    template.install_chat_template(tokenizer, style)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no EOS token, so responses could not end: "
            "choose another model"
        )
    template.choose_pad_token(tokenizer, own_eos)
    return tokenizer


def load_policy(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    adapter: Lora | None = None,
) -> Policy:
    """A causal language model; a built-in one has random weights, from torch's current seed.

    Args: adapter: add a LoRA adapter, where its rank is not 0; for a policy that is trained.
    """
    from transformers import AutoModelForCausalLM

    hf = _load_pretrained(AutoModelForCausalLM, path, tokenizer, precision)
    policy = Policy(hf)
    if adapter and adapter.rank:
        _add_adapter(hf, path, tokenizer, adapter, "actor.lora")
    return policy


def _add_adapter(
    hf: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, adapter: Lora, key: str
) -> None:
    """Add an adapter that also trains the rows of new tokens, and name those."""
    new = new_tokens(hf, path, tokenizer)
    lora.add_adapter(hf, adapter, key, new)
    if any(True for _ in layers_with_rows(hf)):
        names = first_few(tokenizer.convert_ids_to_tokens(new), 8)
        log.info(f"{key}: LoRA trains the rows of {plural(len(new), 'new token')}: {names}")


def new_tokens(hf: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that a model has not learned, in order.

    These are the tokens that its vocabulary or its own tokenizer does not have, and some of those
    that the chat template writes: the ones that its own chat template does not have either, BOS and
    EOS aside, and those whose embedding is near zero.
    """
    from transformers import AutoTokenizer

    rows = adapters.rows_for(path, load_config(path).get_text_config().vocab_size)
    # the critic's directory may have learned tokens that the policy's tokenizer came without
    source = tokenizer_of(path)
    has_own = (
        not is_directory(source) or (Path(location(source)) / "tokenizer_config.json").exists()
    )
    source = location(source) if has_own else tokenizer.name_or_path
    own = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    new = set(range(min(rows, len(own)), len(tokenizer)))
    written = [token for token in template.written_tokens(tokenizer) if token not in new]
    names = dict(zip(written, tokenizer.convert_ids_to_tokens(written)))
    known = f"{own.bos_token} {own.eos_token} {own.chat_template}"
    new |= {token for token in written if names[token] not in known}
    new |= set(near_zero_rows(hf.get_input_embeddings().weight, written))
    return sorted(new)


def load_scorer(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    zero_head: bool = False,
    adapter: Lora | None = None,
) -> Scorer:
    """A sequence-classification model with one label.

    From a base model its head is new: normal with mean 0 and standard deviation 1 / sqrt(d + 1),
    d the hidden size (Stiennon 2020, arXiv:2009.01325).

    Args: zero_head: set the head to zero.  adapter: as in load_policy.
    Raises: UserError for a family whose models give scores in another way.
    """
    from transformers import AutoModelForSequenceClassification

    new_head = not is_reward_model(path)
    hf = _load_pretrained(
        AutoModelForSequenceClassification, path, tokenizer, precision, new_head, num_labels=1
    )
    if not hasattr(hf, "score"):
        raise UserError(
            f"{path}: {type(hf).__name__} has no linear layer `score`: choose a reward model that "
            "is a causal language model with a head"
        )
    if new_head or zero_head:
        # a stream of its own: torch's depends on what loading has drawn
        generator = torch.Generator().manual_seed(torch.initial_seed())
        with gather_parameters([hf.score.weight], modify=True):
            width = hf.score.weight.shape[1]
            head = torch.randn(1, width, generator=generator) * (width + 1) ** -0.5
            hf.score.weight.data.copy_(torch.zeros_like(head) if zero_head else head)
    hf.config.problem_type = "regression"  # transformers' pipeline then gives the score itself
    scorer = Scorer(hf)
    if adapter and adapter.rank:
        _add_adapter(hf, path, tokenizer, adapter, "reward.lora")
    return scorer


def is_reward_model(path: str) -> bool:
    """Whether a model has a head that gives scores, whatever its name."""
    if is_adapter(path):
        return has_score_head(path) or is_reward_model(adapter_settings(path)[BASE_KEY])
    config = load_config(path)
    if "ForSequenceClassification" in str(config.architectures):
        return True
    return is_directory(path) and bool(score_heads(weight_names(Path(location(path)))))


def _load_pretrained(
    auto_class: type[_BaseAutoModelClass],
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    new_head: bool = False,
    **options: int,
) -> PreTrainedModel:
    """Args: new_head: a head that gives scores may be missing.  options: of the configuration."""
    config = load_config(path, **options)
    for key, value in config.to_dict().items():
        # dropout, attn_pdrop, layerdrop, hidden_dropout, ...: an update must see the log-probs of
        # the rollout
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    hf = load_model(auto_class, path, config, DTYPES[precision], new_head)
    # an adapter that is added to it names its base by this
    hf.config._name_or_path = str(model_directory(path).resolve()) if is_directory(path) else path
    if len(tokenizer) > hf.get_input_embeddings().num_embeddings:
        hf.resize_token_embeddings(len(tokenizer))  # never shrink: many models have spare rows
    # other programs pad and stop by these
    for settings in (hf.config, getattr(hf, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id
            settings.eos_token_id = tokenizer.eos_token_id
    return hf


def load_model(
    auto_class: type[_BaseAutoModelClass],
    path: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    new_head: bool = False,
    use_safetensors: bool | None = None,
) -> PreTrainedModel:
    """A model, whatever its path means; an adapter is merged into its base.

    With ZeRO 3 every rank holds a whole copy of a model that is built in or has an adapter, in host
    memory, and then on its device until its engine has partitioned it: it must fit there.

    Args: config: of the base (`load_config`).  new_head, use_safetensors: as in load_weights.
    Raises: UserError as load_weights and adapters.merge.
    """
    if is_adapter(path):
        if getattr(config, "quantization_config", None):
            raise UserError(f"{path}: its base is quantized: name one in {CONFIG} that is not")
        base = adapter_settings(path)[BASE_KEY]
        is_scorer = "SequenceClassification" in auto_class.__name__
        new_head = is_scorer and not is_reward_model(base)
        with without_zero3_init(), adapters.seed_of_base(path):
            hf = load_model(auto_class, base, config, dtype, new_head, use_safetensors)
        with without_zero3_init():  # loading a base that is built in has ended the one above
            return adapters.merge(hf, path)
    if path.startswith(BUILTIN):
        with without_zero3_init():  # random weights must not depend on the number of ranks
            return auto_class.from_config(config, dtype=dtype)
    return load_weights(auto_class, location(path), config, dtype, new_head, use_safetensors)


def save_engine(
    engine: Engine[HfModule], tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write an engine's model as transformers loads it; all ranks call this, rank 0 writes.

    An adapter is merged into the weights, and also saved by itself in directory/adapter.
    """
    hf = engine.module.hf
    weights, adapter = full_state_dict(hf)
    if collectives.rank() == 0:
        saving = announced(f"saving {directory}")
        with saving, watchdog.while_files_move(), atomic_path(directory) as temporary:
            hf.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            if adapter:
                lora.write_adapter(hf, adapter, temporary / "adapter")
                tokenizer.save_pretrained(temporary / "adapter")
            write_sums(temporary)
    collectives.barrier()


@torch.no_grad()
def full_state_dict(hf: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gathered weights of a model that may be partitioned or have an adapter.

    Weights are gathered one by one, so that a rank holds at most one of them beside its partition;
    rank 0 collects them in host memory.

    Returns: on rank 0 the weights with the adapter merged, by the names of the model without it;
        and the trained weights of the adapter, by their own names. Empty on other ranks; the second
        also without an adapter.
    """
    adapted = dict(lora.lora_layers(hf))
    with_rows = dict(layers_with_rows(hf))
    weights: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in hf.state_dict(keep_vars=True).items():
        if id(weight) in seen:  # tied to another
            continue
        seen.add(id(weight))
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if not name.endswith(".base_layer.weight"):
            layer = None
        low_rank = [] if layer is None else lora.low_rank_weights(layer)
        rows_of = with_rows.get(name.removesuffix(".weight"))
        rows = [] if rows_of is None else [rows_of.trained_rows]
        with gather_parameters([weight, *low_rank, *rows]) as gathered:
            if collectives.rank() != 0:
                continue
            value = weight.detach()
            if layer is not None:
                value = lora.merged_weight(layer, value)
            if rows_of is not None:
                value = merge_rows(value, rows_of.trained_ids, rows_of.trained_rows)
            value = value.to("cpu", copy=gathered)
            if not lora.is_adapter_weight(name):
                weights[lora.merged_name(name)] = value
            if adapted and weight.requires_grad:
                adapter[name] = value
    return weights, adapter
