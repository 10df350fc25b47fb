"""Packed rows: demonstrations one behind the other learn what they learn in rows of their own."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import EOS, FAMILIES, PAD
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
    ids, position_ids, learnt = pack(rows, PAD, train_on_prompt, CPU)
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


# --------------------------------------------------------------------------------------------------------------------- the rows


def demonstrations_in(ids: Tensor, position_ids: Tensor, learnt: Tensor) -> list[tuple[list[int], list[bool]]]:
    """What lies between two places 0, row by row, the filling too: ids, and which are learnt."""
    found = []
    for row, positions, marks in zip(ids.tolist(), position_ids.tolist(), learnt.tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(row)]
        assert positions == [place for start, end in zip(starts, starts[1:]) for place in range(end - start)]
        found += [(row[start:end], marks[start:end]) for start, end in zip(starts, starts[1:])]
    return found


def test_packed_rows_are_as_long_as_the_longest_demonstration() -> None:
    rows = [([8], [42]), ([5, 6, 7], [40, 41, 43]), ([9, 10], []), ([11], [44, 45])]
    ids, position_ids, learnt = pack(rows, PAD, False, CPU)
    assert ids.tolist() == [[5, 6, 7, 40, 41, 43], [11, 44, 45, 8, 42, PAD], [9, 10, PAD, PAD, PAD, PAD]] and ids.dtype == torch.int64
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert learnt.long().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert pack(rows, PAD, True, CPU)[2].long().tolist() == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_nothing_is_there_twice(seed: int, train_on_prompt: bool) -> None:
    random, token = Random(seed), count(PAD + 1)  # each token is there once

    def some(longest: int) -> list[int]:
        return [next(token) for _ in range(random.randint(0, longest))]

    rows = [(some(9), some(random.choice([2, 20]))) for _ in range(random.randint(1, 30))] + [([next(token)], [])]
    packed = pack(rows, PAD, train_on_prompt, CPU)
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    assert packed[0].shape == packed[1].shape == packed[2].shape and packed[0].shape[1] == max(lengths)
    expected = []
    for prompt, answer in rows:
        first = first_learnt(prompt, train_on_prompt)
        expected.append(([*prompt, *answer], [place >= first for place in range(len(prompt) + len(answer))]))
    found = demonstrations_in(*packed)
    filling = [row for row in found if PAD in row[0]]
    assert sorted(row for row in found if PAD not in row[0]) == sorted(row for row in expected if row[0])
    assert all({*ids} == {PAD} and not any(marks) for ids, marks in filling)
    assert not packed[2][packed[1] == 0].any()
    # no row could take in another one whole: all but one are more than half full
    assert sum(int((row != PAD).sum()) * 2 <= max(lengths) for row in packed[0]) <= 1


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
    ids, position_ids, _ = pack(ROWS, PAD, False, CPU)
    second = position_ids.eq(0).cumsum(1).eq(2)  # the second demonstration of each row, or the filling
    assert ids.shape[0] > 1 and (position_ids[:, 1:] == 0).any()
    other = ids.where(second, (ids + 1) % 500)
    with torch.no_grad():
        one, two = (policy(x, None, x.shape[1] - 1, position_ids) for x in (ids, other))
    same = second[:, :-1]
    assert torch.equal(one[same], two[same]) and not torch.allclose(one[~same], two[~same], atol=1e-2)


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


@pytest.mark.parametrize("only_of_several_rows", [False, True])  # True: as flash attention
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.name)
@pytest.mark.parametrize("family", PACKABLE)
def test_a_model_that_looks_across_a_border_is_not_packed(
    base: Any, tokenizer: Any, family: str, precision: Precision, only_of_several_rows: bool
) -> None:
    policy = models.load_policy(base(family), tokenizer, precision)

    def unmasked(ids: Tensor, mask: Tensor | None, positions: int, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None or (only_of_several_rows and len(ids) == 1):
            return policy(ids, mask, positions, position_ids)
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
