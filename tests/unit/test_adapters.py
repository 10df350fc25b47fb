"""An adapter's directory as a model: the same as with peft, or one line that says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, save_base
from helpers import composed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.base.adapter_files import base_of, is_adapter
from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.chat.models import find_model
from rlhf.config.choices import Precision, Template
from rlhf.models.loading import (
    context_length,
    is_reward_model,
    load_policy,
    load_scorer,
    load_tokenizer,
)
from rlhf.planning.shapes import arch_of
from rlhf.runs.checks import POLICY, SCORER, check_inputs, check_model
from rlhf.runs.inputs import content_id
from rlhf.runs.model_card import described, front_matter

IDS = torch.tensor([[5, 6, 7, 40, 41, 3, 2]])
Adapter = Callable[..., tuple[Path, Tensor]]


def save_adapter(directory: Path, hf: Any, **settings: Any) -> Tensor:
    """Train a new adapter a little, save it as peft does. Returns: logits of the model with it."""
    model = peft.get_peft_model(hf, peft.LoraConfig(r=4, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        logits: Tensor = model.eval()(IDS).logits
    model.save_pretrained(directory)
    return logits


@pytest.fixture
def make(tmp_path: Path) -> Adapter:
    """An adapter of a small model, by plain peft, and the logits of the two together."""

    def write(
        family: str = "llama", tied: bool = False, rows: int = 0, **settings: Any
    ) -> tuple[Path, Tensor]:
        base = tmp_path / "base"
        more = {"tie_word_embeddings": tied} if family == "llama" else {}
        save_base(base, family, **more)
        load_tokenizer("builtin:tiny").save_pretrained(base)
        is_scorer = settings.get("task_type") == "SEQ_CLS"
        kind = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
        hf = kind.from_pretrained(base, **({"num_labels": 1} if is_scorer else {}))
        if rows:
            hf.resize_token_embeddings(rows)
        directory = tmp_path / "adapter"
        return directory, save_adapter(directory, hf, **{"task_type": "CAUSAL_LM"} | settings)

    return write


def edit(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- the same model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [7]}},
        {"rows": 740},
        {"rows": 740, "trainable_token_indices": [3, 739]},
        {"rows": 700},
        {"use_dora": True, "use_rslora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_the_model_is_that_of_peft(
    make: Adapter, tokenizer: Any, tmp_path: Path, tied: bool, settings: dict[str, Any]
) -> None:
    """Also where the two tied matrices get different updates; and when it is saved again."""
    settings = {"target_modules": ["q_proj", "v_proj"]} | settings
    if settings.get("rows") == 700:  # fewer rows than the base has: the adapter has the matrix
        settings |= {"modules_to_save": ["embed_tokens", "lm_head"]}
    directory, expected = make(tied=tied, **settings)
    hf = load_policy(str(directory), tokenizer, Precision.fp32).hf.eval()
    shown = min(expected.shape[-1], 732)  # rows for tokens that the tokenizer does not have
    found = hf(IDS).logits
    torch.testing.assert_close(found[..., :shown], expected[..., :shown], atol=1e-4, rtol=1e-4)
    assert all(weight.requires_grad for weight in hf.parameters()), "it can be trained"
    assert not any("lora" in name for name in hf.state_dict())
    hf.save_pretrained(tmp_path / "merged")
    again = load_policy(str(tmp_path / "merged"), tokenizer, Precision.fp32).hf.eval()
    assert torch.equal(again(IDS).logits, found)
    load_scorer(str(directory), tokenizer, Precision.fp32)  # the start of a critic


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_model_is_that_of_peft_in_each_family(
    make: Adapter, tokenizer: Any, family: str, bias: str
) -> None:
    directory, expected = make(family, target_modules="all-linear", bias=bias)
    found = load_policy(str(directory), tokenizer, Precision.fp32).hf.eval()(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base_has_head", [False, True])
def test_a_reward_model_is_that_of_peft(
    make: Adapter, tokenizer: Any, tmp_path: Path, base_has_head: bool
) -> None:
    if base_has_head:
        save_base(tmp_path / "plain", "llama")
        hf = load_scorer(str(tmp_path / "plain"), tokenizer, Precision.fp32).hf
        hf.save_pretrained(tmp_path / "base")
        directory = tmp_path / "adapter"
        hf = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        expected = save_adapter(directory, hf, task_type="SEQ_CLS", target_modules=["q_proj"])
    else:
        directory, expected = make(task_type="SEQ_CLS", target_modules=["q_proj"])
    assert is_reward_model(str(directory))
    assert list(check_model("rl.reward", str(directory), SCORER)) == []
    scorer = load_scorer(str(directory), tokenizer, Precision.fp32)
    found = scorer.hf.eval()(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_is_that_of_the_adapter_else_that_of_the_base(
    make: Adapter, tmp_path: Path
) -> None:
    directory, expected = make(target_modules=["q_proj"])
    plain = load_tokenizer(str(directory), Template.tokenizer)
    assert plain.chat_template == load_tokenizer("builtin:tiny").chat_template
    other = load_tokenizer("builtin:tiny", Template.chatml)
    other.add_tokens([f"<new-{i}>" for i in range(20)])
    other.save_pretrained(directory)
    own = load_tokenizer(str(directory), Template.tokenizer)
    assert own.chat_template == other.chat_template and len(own) == len(other)
    hf = load_policy(str(directory), own, Precision.fp32).hf.eval()
    assert hf.get_input_embeddings().num_embeddings == max(len(own), expected.shape[-1])
    found = hf(IDS).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_shape_and_context_are_those_of_the_base(make: Adapter, tmp_path: Path) -> None:
    directory, _ = make(target_modules=["q_proj"])
    assert is_adapter(str(directory)) and base_of(str(directory)) == str(tmp_path / "base")
    assert arch_of(str(directory), None) == arch_of(str(tmp_path / "base"), None)
    assert context_length(str(directory)) == context_length(str(tmp_path / "base"))
    assert not is_reward_model(str(directory))
    assert find_model(str(directory), "--path") == str(directory)


def test_another_file_another_setting_or_another_base_is_another_model(
    make: Adapter, tmp_path: Path
) -> None:
    directory, _ = make(target_modules=["q_proj"])
    ids = [content_id(str(directory))]
    edit(directory, lora_alpha=64)
    ids.append(content_id(str(directory)))
    for file in (directory / "adapter_model.safetensors", tmp_path / "base/model.safetensors"):
        weights = load_file(file)
        save_file(weights | {"more": torch.ones(3)}, file, {"format": "pt"})
        ids.append(content_id(str(directory)))
    assert len(set(ids)) == 4 and content_id(str(directory)) == ids[-1]


def test_the_card_names_adapter_and_base(make: Adapter, tmp_path: Path) -> None:
    directory, _ = make(target_modules=["q_proj"])
    base = tmp_path / "base"
    assert described(str(directory)) == f"the adapter `{directory}`, merged into `{base}`"
    assert described(str(base)) == f"`{base}`" and not any(
        "base_model" in line for line in front_matter(str(base), "sft")
    )
    edit(directory, base_model_name_or_path="some/model")
    assert "base_model: some/model" in front_matter(str(directory), "sft")


# --- what is refused


def cut(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def point(directory: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    (directory / "adapter_model.safetensors").write_bytes(pointer)


def pickle_only(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def quantize_base(directory: Path) -> None:
    file = directory.parent / "base" / "config.json"
    quantization = {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantization))


def add_model(directory: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directory.parent / "base" / name, directory)


KEY = "base_model_name_or_path"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (cut, "is torn, or no safetensors file .*: fetch it again"),
    "pointer": (point, "is a Git LFS pointer, not the file itself: run git lfs pull there"),
    "none": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        "no .*/adapter_model.safetensors: fetch it",
    ),
    "pickle": (pickle_only, r"adapter_model.bin is a pickle, which may run code .*: save .*"),
    "torn config": (
        lambda d: (d / "adapter_config.json").write_text("{"),
        r"adapter_config.json is torn, or no JSON .*: fetch it again",
    ),
    "list": (
        lambda d: (d / "adapter_config.json").write_text("[]"),
        "adapter_config.json is not the configuration of an adapter: save it again",
    ),
    "kind": (lambda d: edit(d, peft_type="IA3"), "peft_type=IA3: only LORA adapters are read: .*"),
    "no base": (lambda d: edit(d, **{KEY: None}), f"adapter_config.json has no {KEY}: name .*"),
    "base gone": (
        lambda d: edit(d, **{KEY: "/nowhere/model"}),
        f"{KEY}=/nowhere/model: no such directory: bring it back, .*",
    ),
    "relative": (
        lambda d: edit(d, **{KEY: "out/models/llama"}),
        f"{KEY}=out/models/llama: no such directory: bring it back, .*",
    ),
    "itself": (lambda d: edit(d, **{KEY: str(d)}), f"{KEY}=.* leads back to it: name .*"),
    "revision": (
        lambda d: edit(d, **{KEY: "some/model", "revision": "v2"}),
        f"revision=v2 of some/model: name a directory that has it as {KEY}",
    ),
    "task": (
        lambda d: edit(d, task_type="TOKEN_CLS"),
        "task_type=TOKEN_CLS: give an adapter of .*",
    ),
    "quantized": (quantize_base, r"its base .*/base is quantized \(bitsandbytes\): name one .*"),
    "both": (add_model, "a whole model and adapter_config.json are there: move one of them .*"),
}


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_an_adapter_that_cannot_be_loaded_is_refused_by_the_parent(
    make: Adapter, change: Callable[[Path], Any], said: str
) -> None:
    directory, _ = make(target_modules=["q_proj"])
    change(directory)
    (line,) = check_inputs(composed("stage=sft", "actor=custom", f"actor.path={directory}"))
    prefix, problem = f"actor.path={directory}: ", line.removeprefix(f"actor.path={directory}: ")
    assert line.startswith(prefix) and "\n" not in line
    torn = ("is torn", "is a Git", "adapter_config.json is")
    pattern = f".*{said}" if said.startswith(torn) else said
    assert re.fullmatch(pattern, problem), problem
    with pytest.raises(UserError, match="--path"):
        find_model(str(directory), "--path")


@pytest.mark.parametrize("task, kind", [("CAUSAL_LM", SCORER), ("SEQ_CLS", POLICY)])
def test_an_adapter_of_the_other_kind_is_refused(make: Adapter, task: str, kind: str) -> None:
    directory, _ = make(task_type=task, target_modules=["q_proj"])
    (line,) = check_model("rl.x", str(directory), kind)
    other = "a reward model" if kind == SCORER else "a causal language model"
    assert line.endswith(f"(task_type={task}), not {other}")
    with pytest.raises(UserError, match=f"not {other}"):
        find_model(str(directory), "--reward" if kind == SCORER else "--path")


Weights = dict[str, Tensor]
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda w: {n: v for n, v in w.items() if n != Q},
            "lacks 1 weight of its adapter: .*q_proj",
        ),
        (
            lambda w: {n: v for n, v in w.items() if "lm_head" not in n},
            "lacks a weight of its adapter: .*lm_head",
        ),
        (
            lambda w: w | {Q.replace("layers.1", "layers.7"): w[Q].clone()},
            "has 1 weight that its base .* does not know: .*layers.7.*another model$",
        ),
        (
            lambda w: w | {Q: torch.ones(4, 3)},
            r"does not fit its base .*size mismatch for .*q_proj",
        ),
        (lambda w: w | {Q: torch.full_like(w[Q], torch.nan)}, "does not fit its base .*NaN"),
    ],
    ids=["missing", "missing in full", "unexpected", "shape", "nan"],
)
def test_weights_that_do_not_fit_stop_the_run(
    make: Adapter, tokenizer: Any, change: Callable[[Weights], Weights], said: str
) -> None:
    directory, _ = make(target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(UserError, match=said) as error:
        load_policy(str(directory), tokenizer, Precision.fp32)
    assert str(error.value).startswith(str(directory)) and "\n" not in str(error.value)


def test_a_base_of_another_family_stops_the_run(
    make: Adapter, tokenizer: Any, tmp_path: Path
) -> None:
    directory, _ = make(target_modules=["q_proj"])
    save_base(tmp_path / "other", "bloom")
    edit(directory, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="does not fit its base .*/other: .*q_proj"):
        load_policy(str(directory), tokenizer, Precision.fp32)


def test_what_is_not_known_or_not_used_is_named(
    make: Adapter, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    directory, _ = make(target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit(directory, use_something_new=True)
    with caplog.at_level("INFO", "rlhf"):
        load_scorer(str(directory), tokenizer, Precision.fp32)
    assert "does not know use_something_new: ignored" in caplog.text
    assert "not used: base_model.model.lm_head.weight" in caplog.text


def test_a_built_in_base_without_a_seed_is_named(
    make: Adapter, tokenizer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    hf = load_policy("builtin:tiny", tokenizer, Precision.fp32).hf
    save_adapter(tmp_path / "tiny", hf, task_type="CAUSAL_LM", target_modules=["q_proj"])
    edit(tmp_path / "tiny", base_model_name_or_path="builtin:tiny")
    assert list(check_model("rl.actor", str(tmp_path / "tiny"), POLICY)) == []
    with caplog.at_level("WARNING", "rlhf"):
        load_policy(str(tmp_path / "tiny"), tokenizer, Precision.fp32)
    assert "its base builtin:tiny has random weights" in caplog.text


def test_files_of_others_writers_get_the_usual_permissions(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        save_file({"a": torch.ones(2)}, temporary / "model.safetensors")
        (temporary / "script").write_text("")
        (temporary / "script").chmod(0o700)
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == usual
    assert (tmp_path / "model" / "script").stat().st_mode == usual | 0o100
