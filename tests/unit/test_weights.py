"""A checkpoint that would leave weights random is refused, in one line that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.model_files import broken_file
from rlhf.config.choices import Precision, Template
from rlhf.models.loading import (
    is_reward_model,
    load_policy,
    load_scorer,
    load_tokenizer,
)

Weights = dict[str, Tensor]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama; its output layer is not tied."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    save_base(directory, "llama")
    return directory


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[..., str]:
    """A copy of it with other weights, and other values in config.json."""

    def make(change: Callable[[Weights], Weights], **settings: Any) -> str:
        shutil.copytree(plain, tmp_path / "model")
        weights = change(load_file(plain / "model.safetensors"))
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return str(tmp_path / "model")

    return make


def without_output(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


def head(weights: Weights, seed: int = 0, labels: int = 1) -> Tensor:
    width = weights[NORM].shape[0]
    return torch.randn(labels, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda w: {f"module.{name}": weight for name, weight in w.items()},
            "it has module.lm_head.weight, module.model.embed_tokens.weight, .* instead: "
            "remove 'module.' from its names",
        ),
        (without_output, "lacks 1 weight of the model: lm_head.weight$"),
        (
            lambda w: w | {NORM: torch.ones(3)},
            rf"{NORM} has the shape \(3,\), not \(\d+,\): config.json does not fit it",
        ),
        (
            lambda w: w | {"model.layers.7.mlp.up_proj.weight": torch.ones(2)},
            "1 weight that the model does not know: model.layers.7.mlp.up_proj.weight",
        ),
        (
            lambda w: w | {"v_head.weight": head(w)},
            "1 weight that the model does not know: v_head.weight",
        ),
    ],
    ids=["prefix", "missing", "shape", "unexpected", "head of a policy"],
)
def test_weights_that_do_not_fit_stop_the_run(
    changed: Callable[..., str], tokenizer: Any, change: Callable[[Weights], Weights], said: str
) -> None:
    directory = changed(change)
    with pytest.raises(UserError, match=said) as error:
        load_policy(directory, tokenizer, Precision.fp32)
    assert str(error.value).startswith(directory) and "\n" not in str(error.value)


def test_what_a_text_model_does_not_use_is_named(
    changed: Callable[..., str], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tower = {"model.vision_tower.layers.0.weight": torch.ones(2)}
    with caplog.at_level("INFO", "rlhf"):
        policy = load_policy(changed(lambda w: w | tower), tokenizer, Precision.fp32)
    assert "not used: model.vision_tower.layers.0.weight" in caplog.text
    assert policy.hf.get_output_embeddings().weight.isfinite().all()


def test_a_new_reward_model_has_a_new_head_and_no_output_layer(
    plain: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_reward_model(str(plain))
    with caplog.at_level("INFO", "rlhf"):
        load_scorer(str(plain), tokenizer, Precision.fp32)
    assert f"{plain}: not used: lm_head.weight" in caplog.text


def test_other_programs_read_the_score_itself(plain: Path, tokenizer: Any, tmp_path: Path) -> None:
    """transformers' pipeline passes a single label through a sigmoid, unless told otherwise."""
    from transformers import pipeline

    scorer = load_scorer(str(plain), tokenizer, Precision.fp32)
    with torch.no_grad():
        scorer.hf.score.weight *= 50
    scorer.hf.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    ids = tokenizer("Hello there", add_special_tokens=False, return_tensors="pt").input_ids
    score = float(scorer(ids, torch.ones_like(ids))[0, -1])
    found = pipeline("text-classification", model=str(tmp_path / "rm"))("Hello there")
    assert found[0]["score"] == pytest.approx(score, rel=1e-4) and not 0 <= score <= 1


@pytest.mark.parametrize(
    "name", ["v_head.summary", "value_head", "regression_head", "model.classifier"]
)
@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaForRewardModel"])
def test_the_only_head_is_the_reward_models_whatever_its_name(
    changed: Callable[..., str],
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
    name: str,
    architecture: str,
) -> None:
    def change(weights: Weights) -> Weights:
        own = {f"{name}.weight": head(weights), f"{name}.bias": torch.ones(1)}
        return without_output(weights) | own

    directory = changed(change, architectures=[architecture])
    assert is_reward_model(directory)
    with caplog.at_level("INFO", "rlhf"):
        scorer = load_scorer(directory, tokenizer, Precision.fp32)
    expected = load_file(f"{directory}/model.safetensors")[f"{name}.weight"]
    assert torch.equal(scorer.hf.score.weight, expected)
    assert f"the reward model's head is {name}.weight" in caplog.text
    assert f"{name}.bias is left out" in caplog.text


@pytest.mark.parametrize(
    "heads, said",
    [
        ({"a.v_head.weight": 1, "b.v_head.weight": 1}, "which of a.v_head.weight, b.v_head.weight"),
        ({"score.weight": 2}, r"score.weight has the shape \(2, \d+\).*a reward model has one"),
        ({}, "lacks 1 weight of the model: score.weight"),
    ],
    ids=["two heads", "two labels", "none"],
)
def test_a_reward_model_without_its_head_stops_the_run(
    changed: Callable[..., str], tokenizer: Any, heads: dict[str, int], said: str
) -> None:
    def change(weights: Weights) -> Weights:
        own = {name: head(weights, labels=labels) for name, labels in heads.items()}
        return without_output(weights) | own

    directory = changed(change, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match=said):
        load_scorer(directory, tokenizer, Precision.fp32)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"\x00" * 5000, "is torn, or no safetensors file"),
        (None, "is torn, or no safetensors file"),
    ],
    ids=["pointer", "foreign", "cut off"],
)
def test_a_broken_file_is_named(
    changed: Callable[..., str], tokenizer: Any, content: bytes | None, said: str
) -> None:
    directory = changed(lambda weights: weights)
    file = Path(directory) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert (problem := broken_file(Path(directory))) and problem.startswith(f"{file} {said}")
    with pytest.raises(UserError, match=said):
        load_policy(directory, tokenizer, Precision.fp32)


@pytest.mark.parametrize(
    "index, said",
    [
        ("{", "is torn, or no JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "names files that are not there: model-1"),
    ],
)
def test_a_broken_index_is_named(changed: Callable[..., str], index: str, said: str) -> None:
    directory = Path(changed(lambda weights: weights))
    file = directory / "model.safetensors.index.json"
    file.write_text(index)
    assert (problem := broken_file(directory)) and problem.startswith(f"{file} {said}")


def test_an_output_layer_of_its_own_stays_though_the_configuration_ties_it(
    changed: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not the template adds tokens, for which the matrices grow."""
    directory = changed(lambda weights: weights, tie_word_embeddings=True)
    load_tokenizer("builtin:tiny").save_pretrained(directory)
    ids = torch.tensor([[5, 6, 7, 8]])
    with caplog.at_level("INFO", "rlhf"):
        plain, grown = (
            load_policy(directory, load_tokenizer(directory, style), Precision.fp32)
            for style in (Template.hh, Template.chatml)
        )
    logits = plain.hf(ids).logits
    assert torch.equal(logits, grown.hf(ids).logits[..., : logits.shape[-1]])
    assert not plain.hf.config.tie_word_embeddings
    assert "its output layer is not its embedding, so they are not tied" in caplog.text


def test_a_directory_without_weights_gets_one_line(
    changed: Callable[..., str], tokenizer: Any
) -> None:
    directory = changed(lambda weights: weights)
    (Path(directory) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"cannot load {directory}: ") as error:
        load_policy(directory, tokenizer, Precision.fp32)
    assert "\n" not in str(error.value)
