"""LoRA through peft (Hu 2021, arXiv:2106.09685), put into a model in place: the model keeps its class and its names, and beside
each chosen linear layer W x comes (alpha / rank) B A x, of which only A and B are trained. B starts at zero."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.schema import Lora

HEAD = "score"  # of a sequence-classification model; always trained, in full


def add_adapter(hf: Any, settings: Lora, where: str) -> None:
    """Put an adapter into a model, and freeze everything else but the head of a scorer and, if wanted, the embeddings.

    Args: hf: a transformers model.  where: the settings' key, for the message.
    Raises: ValueError naming a target that no linear layer's name ends with.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    layers = linear_layers(hf)
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for target in settings.targets or []:
        if not any(name == target or name.endswith("." + target) for name in layers):
            family = hf.config.model_type
            raise ValueError(
                f"{where}.targets={target}: no linear layer of {family} is named so; there are {', '.join(endings)}"
            )
    adapter = peft.LoraConfig(
        task_type="SEQ_CLS" if hasattr(hf, HEAD) else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets or endings),
        fan_in_fan_out=any(
            isinstance(hf.get_submodule(name), Conv1D) for name in layers
        ),  # GPT-2 keeps its matrices transposed
        base_model_name_or_path=hf.config._name_or_path,
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # the same A whatever was drawn before, on every process
        torch.manual_seed(torch.initial_seed())
        peft.inject_adapter_in_model(adapter, hf)
    for module in fully_trained_modules(hf, settings).values():
        module.requires_grad_(True)


def linear_layers(hf: Any) -> list[str]:
    """Names of a model's linear layers, without those that make logits or scores."""
    from transformers.pytorch_utils import Conv1D

    heads = {
        hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None,
        getattr(hf, HEAD, None),
    }
    return [
        name
        for name, module in hf.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in heads
    ]


def fully_trained_modules(hf: Any, settings: Lora) -> dict[str, nn.Module]:
    """The modules that are trained beside the adapter, by the last part of their names."""
    modules = {HEAD: hf.score} if hasattr(hf, HEAD) else {}
    if settings.embeddings:
        embeddings = hf.get_input_embeddings()
        name = next(name for name, module in hf.named_modules() if module is embeddings)
        modules[name.rsplit(".", 1)[-1]] = embeddings
    return modules


def lora_layers(hf: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a model with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in hf.named_modules() if isinstance(module, LoraLayer))


class AdapterOff:
    """A policy as it was before its adapter: a reference model that needs no memory. Stands in for an engine."""

    def __init__(self, engine: Any):
        self.engine, self.device = engine, engine.device

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        self.switch(False)
        try:
            return self.engine(*inputs)
        finally:
            self.switch(True)

    def switch(self, on: bool) -> None:
        for _, layer in lora_layers(self.engine.module.hf):
            layer.enable_adapters(on)


def merged_name(name: str) -> str:
    """The name of a weight in the model without adapter."""
    return name.replace(".base_layer.", ".")


def write_adapter(hf: Any, weights: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter as peft loads it onto the base model: `PeftModel.from_pretrained(base, directory)`.

    Args: weights: adapter, head and trained embeddings, by the names of the model with adapter.
    """
    from safetensors.torch import save_file

    adapter = hf.peft_config["default"]
    embeddings, output = (
        hf.get_input_embeddings(),
        hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None,
    )
    if (
        output is not None
        and output.weight is embeddings.weight
        and embeddings.weight.requires_grad
    ):  # peft knows no tied ones
        names = {module: name for name, module in hf.named_modules()}
        weights = weights | {
            f"{names[output]}.weight": weights[f"{names[embeddings]}.weight"].clone()
        }
    adapter.modules_to_save = (
        sorted({name.rsplit(".", 2)[-2] for name in weights if ".lora_" not in name}) or None
    )
    directory.mkdir(parents=True)
    adapter.save_pretrained(directory)
    named = {
        "base_model.model." + name.replace(".default.", "."): weight
        for name, weight in weights.items()
    }
    save_file(named, directory / "adapter_model.safetensors")
