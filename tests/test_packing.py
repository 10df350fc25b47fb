"""Packed rows: several demonstrations in one row learn what they learn in rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import EOS, FAMILIES, PAD, save_base
from test_config import composed
from torch import Tensor

from rlhf import engines, models
from rlhf.config import Precision
from rlhf.data.batches import pad_right
from rlhf.data.packing import can_pack, first_learnt, pack

CPU = torch.device("cpu")
PACKABLE = ["opt", "gpt2", "gpt_neox", "llama", "qwen2", "gemma3_text"]
ROWS = [  # the longest is longer than the sliding window of gemma3_text (8); the others are as short as can be
    (list(range(5, 16)), [40, 41, 42, 43, 44, 45, 46, EOS]),
    ([8], [EOS]),
    ([9, 10, 11, 12], [300, 301, 302]),
    ([9, 10, 11, 12], [303, 304, EOS]),
    ([14], []),
    ([600, 601], [602, 603, 604, 605, 606, 607, 608, 609, EOS]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a random base model of a family."""
    root = tmp_path_factory.mktemp("base")

    def directory(family: str) -> str:
        if not (root / family).exists():
            save_base(root / family, family)
        return str(root / family)

    return directory


def engine_like(policy: models.Policy, forward: Any = None) -> Any:
    """What can_pack wants of an engine, around a plain policy."""

    class Engine:
        module, device = policy, CPU
        eval, train = staticmethod(policy.eval), staticmethod(policy.train)
        __call__ = staticmethod(forward or policy)

    return Engine()


def padded_nll(policy: Any, rows: list[tuple[list[int], list[int]]], train_on_prompt: bool) -> Tensor:
    """The sum of -log p over the learnt tokens, of a padded batch."""
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], PAD, CPU)
    labels = ids.masked_fill(mask == 0, -100)
    for i, (prompt, _) in enumerate(rows):
        labels[i, : 1 if train_on_prompt else len(prompt)] = -100
    logits = policy(ids, mask, ids.shape[1] - 1)
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def packed_nll(policy: Any, rows: list[tuple[list[int], list[int]]], train_on_prompt: bool) -> Tensor:
    ids, position_ids, learnt = pack(rows, train_on_prompt, CPU)
    logits = policy(ids, None, ids.shape[1] - 1, position_ids)
    return F.cross_entropy(logits[learnt[:, 1:]], ids[:, 1:][learnt[:, 1:]], reduction="sum")


def gradients(policy: models.Policy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same(policy: models.Policy, train_on_prompt: bool = False) -> None:
    expected, packed = padded_nll(policy, ROWS, train_on_prompt), packed_nll(policy, ROWS, train_on_prompt)
    assert float(packed.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted, found = gradients(policy, expected), gradients(policy, packed)
    assert found.keys() == wanted.keys() and wanted
    largest = max(float(g.norm()) for g in wanted.values())
    for name, gradient in wanted.items():
        # the gradient of a key's bias is rounding only, hence the second part
        assert float((found[name] - gradient).norm()) < 1e-4 * float(gradient.norm()) + 1e-6 * largest, name


# ---------------------------------------------------------------------------------------------------------------------- the row


def test_a_packed_row_has_all_tokens_their_places_and_the_learnt_ones() -> None:
    rows = [([5, 6, 7], [40, 41]), ([8], [42]), ([9, 10], [])]
    ids, position_ids, learnt = pack(rows, False, CPU)
    assert ids.tolist() == [[5, 6, 7, 40, 41, 8, 42, 9, 10]] and ids.dtype == torch.int64
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1]]
    assert learnt.long().tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 0]]
    assert pack(rows, True, CPU)[2].long().tolist() == [[0, 1, 1, 1, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_first_token_of_a_demonstration_is_never_learnt(train_on_prompt: bool) -> None:
    rows = [*ROWS, ([], [50, 51]), ([52], []), ([], []), ([53], [54])]
    _, position_ids, learnt = pack(rows, train_on_prompt, CPU)
    assert not learnt[position_ids == 0].any()
    counted = sum(max(0, len(prompt) + len(answer) - first_learnt(prompt, train_on_prompt)) for prompt, answer in rows)
    assert int(learnt.sum()) == counted


# -------------------------------------------------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("family", PACKABLE)
def test_loss_and_gradients_are_those_of_the_padded_batch(base: Any, tokenizer: Any, family: str, train_on_prompt: bool) -> None:
    assert_same(models.load_policy(base(family), tokenizer, Precision.fp32).train(), train_on_prompt)


@pytest.mark.parametrize("family", PACKABLE)
def test_also_with_attention_that_is_not_fused(base: Any, tokenizer: Any, family: str) -> None:
    policy = models.load_policy(base(family), tokenizer, Precision.fp32).train()
    policy.hf.set_attn_implementation("eager")
    assert_same(policy)
    assert can_pack(engine_like(policy))


@pytest.mark.parametrize("family", PACKABLE)
def test_a_demonstration_moves_no_logit_of_another(base: Any, tokenizer: Any, family: str) -> None:
    policy = models.load_policy(base(family), tokenizer, Precision.fp32).eval()
    ids, position_ids, _ = pack(ROWS, False, CPU)
    start = len(ROWS[0][0]) + len(ROWS[0][1])
    other = torch.cat([ids[:, :start].flip(1), ids[:, start:]], 1)
    with torch.no_grad():
        one, two = (policy(x, None, x.shape[1] - 1, position_ids)[0] for x in (ids, other))
    assert torch.equal(one[start:], two[start:]) and not torch.allclose(one[:start], two[:start], atol=1e-2)


@pytest.mark.parametrize("family", PACKABLE)
def test_with_adapter_and_activation_checkpointing(base: Any, tokenizer: Any, tmp_path: Path, one_process: None, family: str) -> None:
    cfg = composed("stage=sft", "actor.lora.rank=3", "deploy.activation_checkpointing=true")
    engine = engines.build_engine(lambda: models.load_policy(base(family), tokenizer, Precision.fp32), cfg, "actor", tmp_path)
    engine.train()
    policy = engine.module
    blocks = [module for module in policy.modules() if getattr(module, "gradient_checkpointing", False)]
    assert blocks and all(module.training for module in blocks)
    for name, p in policy.named_parameters():  # B starts at zero: nothing would reach A
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    assert_same(policy)


# ------------------------------------------------------------------------------------------------------------- who can be packed


@pytest.mark.parametrize("family", FAMILIES)
def test_who_can_be_packed(base: Any, tokenizer: Any, family: str) -> None:
    policy = models.load_policy(base(family), tokenizer, Precision.fp32)
    state = torch.get_rng_state()
    for training in (True, False):
        policy.train(training)
        assert can_pack(engine_like(policy)) == (family in PACKABLE)
        assert policy.training == training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16, Precision.autocast], ids=lambda p: p.name)
def test_rounding_is_not_taken_for_a_wrong_mask(base: Any, tokenizer: Any, family: str, precision: Precision) -> None:
    policy = models.load_policy(base(family), tokenizer, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.autocast):
        assert can_pack(engine_like(policy))


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.name)
@pytest.mark.parametrize("family", PACKABLE)
def test_a_model_that_looks_across_a_border_is_not_packed(base: Any, tokenizer: Any, family: str, precision: Precision) -> None:
    policy = models.load_policy(base(family), tokenizer, precision)

    def unmasked(ids: Tensor, mask: Tensor | None, positions: int, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            return policy(ids, mask, positions)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": position_ids}
        return policy.hf(**inputs, use_cache=False, logits_to_keep=positions + 1).logits[:, :-1]

    assert not can_pack(engine_like(policy, unmasked))


@pytest.mark.parametrize("family", ["opt", "gpt2"])  # the others' positions are relative
def test_a_model_whose_positions_go_on_is_not_packed(base: Any, tokenizer: Any, family: str) -> None:
    policy = models.load_policy(base(family), tokenizer, Precision.fp32)
    inner = policy.hf.forward

    def forward(position_ids: Tensor, **inputs: Any) -> Any:
        return inner(position_ids=torch.arange(position_ids.shape[1]).expand_as(position_ids), **inputs)

    assert can_pack(engine_like(policy))
    policy.hf.forward = forward
    assert not can_pack(engine_like(policy))


def test_an_engine_can_pack_too_in_bf16(base: Any, tokenizer: Any, tmp_path: Path, one_process: None) -> None:
    cfg = composed("stage=sft", "deploy.precision=bf16", "actor.lora.rank=3", "actor.lora.dropout=0.5")
    engine = engines.build_engine(lambda: models.load_policy(base("opt"), tokenizer, Precision.bf16), cfg, "actor", tmp_path)
    engine.train()
    for _, p in engine.module.named_parameters():  # so that dropout would be seen
        torch.nn.init.normal_(p, std=0.1)
    assert can_pack(engine) and engine.module.training
