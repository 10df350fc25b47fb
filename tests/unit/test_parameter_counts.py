"""The plan's parameter counts against built models and published numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_base
from helpers import CONF, composed
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config.schema import Arch, Lora
from rlhf.models import lora
from rlhf.planning.memory import make_plan
from rlhf.planning.shapes import ACTIVATIONS, arch_of, linear_layers, lora_parameters, parameters

MODELS = sorted(
    path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in ("tiny", "custom")
)


def as_transformers(arch: Arch) -> Any:
    """A transformers configuration with the numbers of an `arch` block."""
    own: dict[str, Any] = {
        "opt": {
            "ffn_dim": arch.ffn,
            "word_embed_proj_dim": arch.embed or arch.hidden,
            "do_layer_norm_before": arch.embed is None,
        },
        "gpt2": {"n_positions": arch.positions, "n_inner": arch.ffn},
        "bloom": {},
    }.get(
        arch.family,
        {
            "intermediate_size": arch.ffn,
            "num_key_value_heads": arch.kv_heads,
            "head_dim": arch.head_dim,
        },
    )
    if arch.family == "gpt_neox":
        own = {"intermediate_size": arch.ffn}
    positions = (
        {} if arch.family in ("bloom", "gpt2") else {"max_position_embeddings": arch.positions}
    )
    shape = {
        "num_hidden_layers": arch.layers,
        "hidden_size": arch.hidden,
        "num_attention_heads": arch.heads,
        "vocab_size": arch.vocab,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(
        arch.family, **shape, **positions, **own, **special, tie_word_embeddings=arch.tied
    )


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


KNOWN = {  # as the papers and model cards have them
    "opt1.3b": 1_315_758_080,
    "opt6.7b": 6_658_473_984,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "pythia-160m": 162_322_944,
    "pythia-6.9b": 6_857_302_016,
    "gpt2": 124_439_808,
    "bloom-560m": 559_214_592,
}
QUICK = ("opt1.3b", "llama3.2-1b", "qwen2.5-0.5b", "gpt2", "bloom-560m")


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=() if m in QUICK else pytest.mark.full) for m in MODELS]
)
def test_parameter_counts_are_exact(name: str) -> None:
    """Against the model that transformers builds, without memory for its weights."""
    arch = composed(f"actor={name}").actor.arch
    assert arch is not None
    shape = as_transformers(arch)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(shape)
        shape.num_labels = 1
        scorer = AutoModelForSequenceClassification.from_config(shape)
    assert parameters(arch) == count(policy) == KNOWN.get(name, count(policy))
    assert parameters(arch, scorer=True) == count(scorer)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in ACTIVATIONS])
def test_numbers_are_read_from_a_models_directory(tmp_path: Path, family: str) -> None:
    save_base(tmp_path, family)
    arch = arch_of(str(tmp_path), None)
    assert arch is not None and arch.family == family
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert parameters(arch) == count(policy)
    assert parameters(arch, scorer=True) == count(scorer)
    for targets in (None, [list(linear_layers(arch))[0]]):
        for embeddings in (False, True):
            settings = Lora(rank=3, alpha=1.0, dropout=0.0, targets=targets, embeddings=embeddings)
            scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
            for hf in (AutoModelForCausalLM.from_pretrained(tmp_path), scorer):
                lora.add_adapter(hf, settings, "actor.lora")
                trained = sum(p.numel() for p in hf.parameters() if p.requires_grad)
                assert lora_parameters(arch, settings, scorer=hasattr(hf, "score")) == trained, (
                    targets,
                    embeddings,
                )


def test_a_model_that_nobody_described() -> None:
    known = composed("actor=opt125m").actor.arch
    assert known is not None
    cfg = composed("stage=sft", "actor=opt125m", "actor.arch=null")
    with pytest.raises(
        ValueError,
        match="the shape of actor is not known before it is loaded: give its numbers as actor.arch",
    ):
        make_plan(cfg, "sft")
    with pytest.raises(ValueError, match="must be one of opt, gpt2"):
        linear_layers(dataclasses.replace(known, family="mamba"))
