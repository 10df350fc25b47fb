"""LoRA through peft (Hu 2021, arXiv:2106.09685), added to a model in place.

The model keeps its class and its names. Beside each chosen linear layer W x comes
(alpha / rank) B A x, of which only A and B are trained. B starts at zero.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf.base.adapter_files import SEED, WEIGHTS
from rlhf.base.errors import UserError
from rlhf.base.locations import BUILTIN
from rlhf.config.schema import Lora
from rlhf.distributed.engine import Engine
from rlhf.models import token_rows
from rlhf.models.token_rows import output_layer
from rlhf.models.wrappers import Policy, TokenStats

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

SCORE_SETTINGS_FILE = "score.json"  # beside a reward model's adapter: these of its configuration
SCORE_SETTINGS = ("score_mean", "score_std", "score_before_eos")
HEAD = "score"  # of a sequence-classification model; always trained, in full


def add_adapter(
    hf: PreTrainedModel, settings: Lora, key: str, new_tokens: list[int] | None = None
) -> None:
    """Add an adapter to a model and freeze the rest.

    A scorer's head stays trainable, and with `settings.embeddings` the embeddings.

    Args: key: of the settings, for the message.  new_tokens: ids of tokens whose rows of the
        embedding and the output layer are trained too.
    Raises: UserError naming a target that matches no linear layer.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    layers = linear_layers(hf)
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for target in settings.targets or []:
        if not any(name == target or name.endswith("." + target) for name in layers):
            raise UserError(
                f"{key}.targets={target}: {hf.config.model_type} has no linear layer of that name; "
                f"choose from {', '.join(endings)}"
            )
    base = hf.config._name_or_path
    adapter = peft.LoraConfig(
        task_type="SEQ_CLS" if hasattr(hf, HEAD) else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets or endings),
        # GPT-2 keeps its matrices transposed
        fan_in_fan_out=any(isinstance(hf.get_submodule(name), Conv1D) for name in layers),
        base_model_name_or_path=base,
        # the random weights of a built-in model are those of a seed
        revision=f"{SEED}{torch.initial_seed()}" if base.startswith(BUILTIN) else None,
    )
    # A must not depend on what was drawn before, and be the same on every rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        peft.inject_adapter_in_model(adapter, hf)
    for module in fully_trained_modules(hf, settings).values():
        module.requires_grad_(True)
    if new_tokens:
        token_rows.train_rows(hf, new_tokens)


def linear_layers(hf: PreTrainedModel) -> list[str]:
    """Names of a model's linear layers, without those that make logits or scores."""
    from transformers.pytorch_utils import Conv1D

    heads = {output_layer(hf), getattr(hf, HEAD, None)}
    return [
        name
        for name, module in hf.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in heads
    ]


def fully_trained_modules(hf: PreTrainedModel, settings: Lora) -> dict[str, nn.Module]:
    """The modules that are trained beside the adapter, by the last part of their names."""
    modules: dict[str, nn.Module] = {HEAD: hf.score} if hasattr(hf, HEAD) else {}
    if settings.embeddings:
        embeddings = hf.get_input_embeddings()
        name = next(name for name, module in hf.named_modules() if module is embeddings)
        modules[name.rsplit(".", 1)[-1]] = embeddings
    return modules


def lora_layers(hf: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of a model with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in hf.named_modules() if isinstance(module, LoraLayer))


def low_rank_weights(layer: LoraLayer) -> list[Tensor]:
    """A and B of an adapted layer."""
    return [p for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]


@contextlib.contextmanager
def merged_adapter(hf: PreTrainedModel, in_place: bool = False) -> Iterator[None]:
    """Merge the adapter into the weights inside the context, for many forward passes without
    gradient: each then launches as many kernels as a model without adapter.

    Afterwards the weights are bit for bit those of before; until then it takes their memory once
    more. (Subtracting the adapter again would leave its rounding.)

    Args: in_place: do not restore the weights: they are a gathered copy that nobody needs later.
    """
    layers = [layer for _, layer in lora_layers(hf)]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights):
            if in_place:
                weight.data.copy_(merged_weight(layer, weight))
            else:
                weight.data = merged_weight(layer, weight)
            layer.enable_adapters(False)
        yield
    finally:
        for layer, weight, data in zip(layers, weights, before):
            weight.data = data
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weight(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The weight of an adapted layer and its adapter, summed in float32."""
    delta = layer.get_delta_weight("default").float()
    return (weight.detach().float() + delta).to(weight.dtype)


class AdapterOff:
    """A policy without its adapter: a reference model that needs no memory. A LogProbModel.

    New tokens have the rows that they had before training.
    """

    def __init__(self, engine: Engine[Policy]):
        self.engine, self.device = engine, engine.device

    @property
    def module(self) -> Policy:
        return self.engine.module

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, mask: Tensor, target_mask: Tensor, temperature: float = 1.0
    ) -> TokenStats:
        self.enable_adapter(False)
        try:
            return self.engine(ids, mask, target_mask, temperature)
        finally:
            self.enable_adapter(True)

    def enable_adapter(self, on: bool) -> None:
        for _, layer in lora_layers(self.engine.module.hf):
            layer.enable_adapters(on)
        for _, module in token_rows.layers_with_rows(self.engine.module.hf):
            module.uses_trained_rows = on


def is_adapter_weight(name: str) -> bool:
    """Whether a weight belongs to an adapter, so that the model without it does not have it."""
    return ".lora_" in name or name.endswith(f".{token_rows.ROWS}")


def merged_name(name: str) -> str:
    """The name of a weight in the model without adapter."""
    return name.replace(".base_layer.", ".")


def write_adapter(hf: PreTrainedModel, weights: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter as peft loads it: `PeftModel.from_pretrained(base, directory)`.

    Where it has rows of new tokens, `base` must have been resized to the tokenizer.

    Args: weights: adapter, head and trained embeddings, by the names of the model with adapter.
    """
    from safetensors.torch import save_file

    adapter = copy.copy(hf.peft_config["default"])
    embeddings, output = hf.get_input_embeddings(), output_layer(hf)
    is_tied = output is not None and output.weight is embeddings.weight
    if is_tied and embeddings.weight.requires_grad:  # peft does not know tied weights
        names = {module: name for name, module in hf.named_modules()}
        rows = weights[f"{names[embeddings]}.weight"].clone()
        weights = weights | {f"{names[output]}.weight": rows}
    full = {name.rsplit(".", 2)[-2] for name in weights if not is_adapter_weight(name)}
    adapter.modules_to_save = sorted(full) or None
    adapter.trainable_token_indices = {
        name.rsplit(".", 1)[-1]: layer.trained_ids.tolist()
        for name, layer in token_rows.layers_with_rows(hf)
        if f"{name}.{token_rows.ROWS}" in weights  # once where they are tied
    } or None
    adapter.target_modules = sorted(adapter.target_modules)  # peft keeps a set, of random order
    adapter.inference_mode = True
    directory.mkdir(parents=True)
    adapter.save_pretrained(directory)
    save_file({peft_name(name): weight for name, weight in weights.items()}, directory / WEIGHTS)
    score = {name: getattr(hf.config, name) for name in SCORE_SETTINGS if hasattr(hf.config, name)}
    if score:
        (directory / SCORE_SETTINGS_FILE).write_text(
            json.dumps(score, indent=2) + "\n", encoding="utf-8"
        )


def peft_name(name: str) -> str:
    """The name of an adapter's weight in peft's files."""
    name = name.replace(".default.", ".")
    if name.endswith(f".{token_rows.ROWS}"):
        name = name.removesuffix(token_rows.ROWS) + "token_adapter.trainable_tokens_delta"
    return "base_model.model." + name
