"""Trained rows of new tokens, against a model whose matrices hold these rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, PAD, VOCABULARY, save_base
from helpers import composed, some
from test_decode import without_tracing
from test_logprobs import random, whole
from torch import Tensor
from transformers import AutoTokenizer

from rlhf.base.constants import LOGPROB_CHUNKS
from rlhf.config.choices import Precision, Template
from rlhf.data.batches import pad_left, uniforms
from rlhf.models.loading import (
    full_state_dict,
    load_policy,
    load_scorer,
    load_tokenizer,
    location,
    new_tokens,
)
from rlhf.models.logprobs import target_logp
from rlhf.models.token_rows import layers_with_rows, near_zero_rows, output_layer
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch
from rlhf.sampling.cpu.traced_step import traced_functions
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling

NEW = [VOCABULARY, VOCABULARY + 1]  # <|im_end|>, <|im_start|>
IDS = torch.tensor([[5, 733, 7, 40, 732, 42, 732], [0, 0, 8, 9, 300, 733, 732]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
WANTED = (torch.arange(7) >= 3).expand(2, 7)
LORA = composed("stage=sft", "actor.lora.rank=2").actor.lora
CASES = [*((family, tied) for family in FAMILIES for tied in (False, True))]


@pytest.fixture(scope="module")
def chatml() -> Any:
    return load_tokenizer("builtin:tiny", Template.chatml)


def adapted(path: Path, family: str, tied: bool, tokenizer: Any, **more: Any) -> Policy:
    """A policy with an adapter whose trained rows have moved."""
    save_base(path, family, tie_word_embeddings=tied, **more)
    policy = load_policy(str(path), tokenizer, Precision.fp32, LORA).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in layers_with_rows(policy.hf):
            layer.trained_rows.add_(torch.randn(layer.trained_rows.shape) * 0.3)
    return policy


def merged(policy: Policy, path: Path, tokenizer: Any) -> Policy:
    """The plain model that full_state_dict makes of it."""
    plain = load_policy(str(path), tokenizer, Precision.fp32).eval()
    weights = full_state_dict(policy.hf)[0]
    missing, unknown = plain.hf.load_state_dict(weights, strict=False)
    tied = plain.hf.config.tie_word_embeddings
    assert not unknown and len(missing) == tied, "the output layer where it is the embedding"
    return plain


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 11), (1200, 300), (300, 30_000)])
def test_values_and_gradients_equal_those_of_a_matrix_with_these_rows(
    size: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes: one chunk; several chunks; several, not all of them kept for the backward pass."""
    small = replace(LOGPROB_CHUNKS["cpu"], kept_probabilities=2**21)
    monkeypatch.setitem(LOGPROB_CHUNKS, "cpu", small)
    hidden, weight, offset, targets = random(size[0], 12, size[1], bias)
    ids = torch.tensor([3, size[1] - 1])
    targets[:3] = torch.tensor([3, size[1] - 1, 3])
    rows = torch.randn(2, 12, requires_grad=True)
    found = target_logp(hidden, weight, offset, targets, 0.7, (ids, rows))
    expected = whole(hidden, weight.index_copy(0, ids, rows), offset, targets, 0.7)
    for one, other, atol in zip(found, expected, (5e-5, 5e-5, 0.0)):
        assert torch.allclose(one.double(), other, atol=atol)
    a, b = torch.randn(2, size[0])
    trained = [x for x in (hidden, weight, offset, rows) if x is not None]
    mine, exact = (
        torch.autograd.grad((a * x[0]).sum() + (b * x[1]).sum(), trained) for x in (found, expected)
    )
    for one, other in zip(mine, exact):
        assert float((one - other).norm()) < 3e-5 * float(other.norm())
    assert not mine[1][ids].any(), "the replaced rows of the matrix have no part in it"


@pytest.mark.parametrize(("family", "tied"), some(CASES, every=3))
def test_a_policy_with_trained_rows_equals_one_with_these_rows_in_its_matrices(
    tmp_path: Path, chatml: Any, family: str, tied: bool
) -> None:
    """Log-probabilities, packed and padded, their gradients, and the model's own logits."""
    policy = adapted(tmp_path, family, tied, chatml)
    plain = merged(policy, tmp_path, chatml)
    layers = [layer for _, layer in layers_with_rows(policy.hf)]
    assert len(layers) == 2 and (layers[0].trained_rows is layers[1].trained_rows) == tied
    for packed in (True, False):
        if not packed:
            policy.can_pack = plain.can_pack = False
        stats, exact = (model(IDS, MASK, WANTED) for model in (policy, plain))
        assert torch.allclose(stats.logprobs, exact.logprobs, atol=1e-4)
        assert torch.allclose(stats.entropy, exact.entropy, atol=1e-4)
        assert policy.can_pack == plain.can_pack
        policy.zero_grad(), plain.zero_grad()
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        (exact.logprobs.sum() + exact.entropy.sum()).backward()
        for layer, full in zip(layers, (plain.hf.get_input_embeddings(), output_layer(plain.hf))):
            assert full is not None and layer.trained_rows.grad is not None
            assert torch.allclose(layer.trained_rows.grad, full.weight.grad[NEW], atol=1e-3)
            assert layer.weight.grad is None
    real = MASK.bool()
    with torch.no_grad():
        assert torch.allclose(
            policy.outputs(IDS, MASK)[real], plain.outputs(IDS, MASK)[real], atol=1e-4
        )


@pytest.mark.parametrize(("family", "tied"), some(CASES, every=3))
def test_what_is_sampled_equals_what_the_plain_model_samples(
    tmp_path: Path, chatml: Any, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts that contain new tokens, with and without the traced step, before and after the
    rows change."""
    policy = adapted(tmp_path, family, tied, chatml)
    prompts = [[*range(20, 32), 733, 41], [8], [733, 9, 732], [30, 31, 732]]
    batch = PromptBatch(*pad_left(prompts, PAD))
    noise = uniforms("test", range(4), 0, 0, 20)
    with torch.no_grad():
        for _ in range(2):
            for layer in {layer.trained_rows: layer for _, layer in layers_with_rows(policy.hf)}:
                layer.add_(0.2 * torch.randn_like(layer))
            plain = merged(policy, tmp_path, chatml)
            expected = sample(plain, batch, noise, NEW[0], Sampling())
            found = sample(policy, batch, noise, NEW[0], Sampling())
            traced, of_plain = (traced_functions.get(one, {}).values() for one in (policy, plain))
            assert any(traced) == any(of_plain)
            with monkeypatch.context() as patch:
                without_tracing(patch)
                eager = sample(policy, batch, noise, NEW[0], Sampling())
            for responses in (found, eager):
                assert torch.equal(responses.ids, expected.ids)
                assert torch.allclose(responses.logprobs, expected.logprobs, atol=1e-4)


def test_the_bias_of_an_output_layer_counts(tmp_path: Path, chatml: Any) -> None:
    policy = adapted(tmp_path, "llama", False, chatml)
    head = policy.hf.get_output_embeddings()
    with torch.no_grad():
        before = policy.outputs(IDS, MASK)
        head.bias = torch.nn.Parameter(torch.randn(len(head.weight)))
        assert torch.allclose(policy.outputs(IDS, MASK), before + head.bias, atol=1e-5)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.autocast], ids=lambda p: p.name)
def test_in_low_precision_it_is_the_same_up_to_rounding(
    tmp_path: Path, chatml: Any, precision: Precision
) -> None:
    exact = adapted(tmp_path, "llama", True, chatml)
    policy = adapted(tmp_path, "llama", True, chatml)
    if precision is Precision.bf16:
        policy.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.autocast):
        stats = policy(IDS, MASK, WANTED)
        policy.can_pack = False
        padded = policy(IDS, MASK, WANTED)
    stats.logprobs.sum().backward()
    (rows, _) = (layer.trained_rows for _, layer in layers_with_rows(policy.hf))
    assert rows.grad is not None and rows.grad.any(1).all()
    expected = exact(IDS, MASK, WANTED).logprobs
    for found in (stats.logprobs, padded.logprobs):
        assert float((found - expected).abs().max()) < 0.15


def test_a_scorer_trains_the_rows_of_its_embedding(tmp_path: Path, chatml: Any) -> None:
    save_base(tmp_path, "llama")
    scorer = load_scorer(str(tmp_path), chatml, Precision.fp32, adapter=LORA)
    ((name, layer),) = layers_with_rows(scorer.hf)
    assert name == "model.embed_tokens" and layer.trained_ids.tolist() == NEW
    scorer(IDS, MASK).sum().backward()
    assert layer.trained_rows.grad is not None and layer.trained_rows.grad.any(1).all()


# --- which tokens are new


def saved_tokenizer(path: Path, own_template: str | None, *more: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(location("builtin:tiny"))
    tokenizer.add_special_tokens({"extra_special_tokens": [*more]})
    tokenizer.chat_template = own_template
    tokenizer.save_pretrained(path)
    return str(path)


MARKS = ("<|im_start|>", "<|im_end|>")
OWN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("own_template", "marks", "style", "expected"),
    [
        (None, (), Template.chatml, set(MARKS)),
        (None, MARKS, Template.chatml, set(MARKS)),  # in the vocabulary, but no text had them
        (OWN_CHATML, MARKS, Template.chatml, set()),
        (OWN_CHATML, MARKS, Template.tokenizer, set()),
        (None, MARKS, Template.hh, set()),
        (
            OWN_CHATML,
            MARKS,
            Template.llama3,
            {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
        ),
    ],
)
def test_new_tokens_are_those_that_neither_model_nor_own_template_has(
    tmp_path: Path,
    own_template: str | None,
    marks: tuple[str, ...],
    style: Template,
    expected: set[str],
) -> None:
    path = saved_tokenizer(tmp_path, own_template, *marks)
    save_base(tmp_path, "llama", VOCABULARY + len(marks))
    tokenizer = load_tokenizer(path, style)
    policy = load_policy(path, tokenizer, Precision.fp32)
    new = new_tokens(policy.hf, path, tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(new)) == expected


def test_tokens_in_spare_rows_are_new(tmp_path: Path) -> None:
    """The matrix has more rows than the tokenizer has tokens, so that it does not grow."""
    path = saved_tokenizer(tmp_path, None)
    plain = AutoTokenizer.from_pretrained(path)
    plain.pad_token = "</s>"  # the EOS
    plain.unk_token = None
    plain.save_pretrained(tmp_path)
    save_base(tmp_path, "llama", VOCABULARY + 30)
    tokenizer = load_tokenizer(path, Template.llama3)
    policy = load_policy(path, tokenizer, Precision.fp32)
    assert policy.hf.get_input_embeddings().num_embeddings == VOCABULARY + 30
    assert new_tokens(policy.hf, path, tokenizer) == [*range(VOCABULARY, len(tokenizer))]


def test_a_written_token_with_an_embedding_near_zero_is_new(tmp_path: Path) -> None:
    path = saved_tokenizer(tmp_path, OWN_CHATML, *MARKS)
    save_base(tmp_path, "llama", VOCABULARY + 2)
    tokenizer = load_tokenizer(path, Template.tokenizer)
    policy = load_policy(path, tokenizer, Precision.fp32)
    weight: Tensor = policy.hf.get_input_embeddings().weight
    ids = tokenizer.convert_tokens_to_ids(list(MARKS))
    with torch.no_grad():
        weight[ids[0]] *= 1e-4
        weight[ids[1]] *= 0.1
        weight[EOS + 5] = 0.0  # which the template does not write
    assert near_zero_rows(weight, range(len(weight))) == [PAD, EOS + 5, ids[0]]
    assert new_tokens(policy.hf, path, tokenizer) == [ids[0]]


def test_the_run_names_the_tokens(
    tmp_path: Path, chatml: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save_base(tmp_path, "llama")
    with caplog.at_level("INFO", "rlhf"):
        load_policy(str(tmp_path), chatml, Precision.fp32, LORA)
    expected = "actor.lora: LoRA trains the rows of 2 new tokens: <|im_end|>, <|im_start|>"
    assert expected in caplog.text
