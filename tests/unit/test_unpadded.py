"""Batches without padding.

Every sequence gets the values it gets alone. A common beginning is computed once.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, PAD
from helpers import composed
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.data.batches import pad_left, pad_right
from rlhf.distributed.engine import build_engine
from rlhf.models import packing
from rlhf.models.loading import load_policy, load_scorer
from rlhf.models.logprobs import token_logprobs
from rlhf.models.wrappers import Policy

PLAIN = ["opt", "gpt2", "gpt_neox", "llama", "qwen2", "gemma3_text"]
BEGINNING = list(range(20, 32))
# Some are longer than the sliding window of gemma3_text (8), some are as short as can be, and some
# begin alike.
ROWS = [
    [*BEGINNING, 40, 41, 42, 43, 44, 45, 46, EOS],
    [8, EOS],
    [*BEGINNING, 300, 301, EOS],
    [9, 10, 11, 12, 303, 304, EOS],
    [*BEGINNING, 40, 41, 42, 300],
    [9, 10, 11, 12, 303, 304, EOS],
]


def batch(left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, and which tokens are wanted: all but the first of each row."""
    ids, mask = (pad_left if left else pad_right)(ROWS, PAD)
    return ids, mask, (mask > 0) & (mask.cumsum(1) > 1)


def one_by_one(policy: Policy, temperature: float = 1.0) -> list[Tensor]:
    """Log-probability and entropy of each row's tokens behind the first one, (T - 1, 2).

    The model itself computes them, each row alone.
    """
    found = []
    for row in ROWS:
        ids = torch.tensor([row])
        logits = policy.hf(input_ids=ids, use_cache=False).logits[:, :-1]
        found.append(torch.stack(token_logprobs(logits, ids[:, 1:], temperature), -1)[0])
    return found


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and wanted
    largest = max(float(g.norm()) for g in wanted.values())
    for name, gradient in wanted.items():
        # the gradient of a key's bias is rounding only, hence the second part
        assert (
            float((found[name] - gradient).norm()) < 1e-4 * float(gradient.norm()) + 1e-6 * largest
        ), name


def assert_same(policy: Policy, left: bool = False) -> None:
    """Values within 1e-5 of those of each row alone, and so are the gradients."""
    ids, mask, wanted = batch(left)
    logp, entropy, _ = policy(ids, mask, wanted)
    alone = one_by_one(policy)
    for i, row in enumerate(alone):
        assert torch.allclose(torch.stack([logp[i], entropy[i]], -1)[wanted[i]], row, atol=1e-5)
    assert not logp[~wanted].any() and not entropy[~wanted].any()
    expected = gradients(
        policy, sum((row[:, 0] * torch.arange(len(row)) + row[:, 1]).sum() for row in alone)
    )
    weight = (wanted.cumsum(1) - 1) * wanted
    assert_close(gradients(policy, (logp * weight + entropy * wanted).sum()), expected)


# --------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_there_once_and_at_its_place(seed: int) -> None:
    """Padding on either side, holes, rows that are others' beginnings or are there twice."""
    random = Random(seed)
    beginnings = [[random.randint(1, 3) for _ in range(random.randint(1, 14))] for _ in range(3)]
    rows = [
        random.choice(beginnings)[: random.randint(1, 14)]
        + [random.randint(1, 3) for _ in range(random.randint(0, 9))]
        for _ in range(9)
    ]
    ids, mask = (pad_left if seed % 2 else pad_right)(rows, 0)
    for i in range(len(rows)):  # holes, but not where a row would be empty
        if random.random() < 0.3 and len(rows[i]) > 2:
            hole = random.choice(mask[i].nonzero()[:, 0].tolist())
            mask[i, hole] = 0
    packed = packing.pack(ids, mask)
    real = [ids[i][mask[i] > 0].tolist() for i in range(len(rows))]
    beginnings_seen = {tuple(row[: t + 1]) for row in real for t in range(len(row))}
    # a token is its whole beginning; the same one twice only where too little is alike
    assert len(beginnings_seen) <= packed.ids.shape[1] <= sum(map(len, real))
    for i, row in enumerate(real):
        places = packed.gather_index[i][mask[i] > 0]
        assert packed.ids[0, places].tolist() == row
        assert packed.position_ids[0, places].tolist() == list(range(len(row)))
        seen = (mask[i].cumsum(0) - 1).clamp(min=0)
        assert packed.gather_index[i].tolist() == places[seen].tolist()
        assert any(
            line[: len(row)] == places.tolist() for part in packed.buckets for line in part.tolist()
        )
    assert sum(map(len, packed.buckets)) == len(rows)
    assert torch.cat([part.flatten() for part in packed.buckets])[
        packed.scatter_index
    ].tolist() == list(range(packed.ids.shape[1]))


def test_what_begins_alike_is_there_once() -> None:
    packed = packing.pack(*batch()[:2])
    # The last row but one shares more than BEGINNING.
    # The last one is there already, but is too short to share.
    fresh = [
        8,
        2,
        3,
        7,
        1,
        0,
    ]
    assert packed.ids.shape[1] == len(BEGINNING) + sum(fresh[:5]) + 7
    alike = packing.pack(*pad_right([ROWS[0], ROWS[0]], PAD))
    assert (
        alike.ids.tolist() == [ROWS[0]]
        and alike.buckets[0].tolist() == [list(range(len(ROWS[0])))] * 2
    )


def test_attention_pads_little() -> None:
    """A part has sequences of at least 0.8 times its longest; all short ones are one part."""
    rows = [[1] * n for n in (100, 79, 81, 5, 32, 64, 100, 63, 2)]
    packed = packing.pack(*pad_right([[i] * len(row) for i, row in enumerate(rows)], PAD))
    assert [tuple(part.shape) for part in packed.buckets] == [(3, 100), (2, 79), (1, 63), (3, 32)]


def test_equal_lengths_need_no_rearrangement() -> None:
    assert packing.pack(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3)).is_dense
    assert not packing.pack(
        torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    ).is_dense
    with pytest.raises(ValueError, match="without any token"):
        packing.pack(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]))


# ----------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", PLAIN)
def test_values_and_gradients_are_those_of_each_row_alone(
    base: Any, tokenizer: Any, family: str, left: bool
) -> None:
    policy = load_policy(base(family), tokenizer, Precision.fp32).train()
    assert_same(policy, left)
    assert policy.can_pack


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in PLAIN])
def test_others_are_padded_and_give_the_same(base: Any, tokenizer: Any, family: str) -> None:
    policy = load_policy(base(family), tokenizer, Precision.fp32).train()
    assert_same(policy)
    assert not policy.can_pack


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_row_alone(base: Any, tokenizer: Any, family: str) -> None:
    scorer = load_scorer(base(family), tokenizer, Precision.fp32).eval()
    for left in (False, True):
        ids, mask, _ = batch(left)
        scores = scorer(ids, mask)
        for i, row in enumerate(ROWS):
            states = scorer.hf.base_model(
                input_ids=torch.tensor([row]), use_cache=False
            ).last_hidden_state
            alone = scorer.hf.score(states)[0, :, 0]
            assert torch.allclose(scores[i][mask[i] > 0], alone, atol=1e-5)
            if not left:  # padding has the score of the last token
                assert torch.equal(
                    scores[i, len(row) :], scores[i, len(row) - 1].expand(ids.shape[1] - len(row))
                )
    assert scorer.can_pack == (family in PLAIN)


@pytest.mark.parametrize("family", PLAIN)
def test_a_row_moves_nothing_of_another(base: Any, tokenizer: Any, family: str) -> None:
    policy = load_policy(base(family), tokenizer, Precision.fp32).eval()
    ids, mask, wanted = batch()
    changed = ids.clone()
    changed[1, 0], changed[3, 5], changed[5, 6] = 77, 78, 79
    with torch.no_grad():
        one, two = (policy(x, mask, wanted)[0] for x in (ids, changed))
    same = [0, 2, 4]
    assert torch.allclose(one[same], two[same], atol=1e-6) and not torch.allclose(
        one[1], two[1], atol=1e-2
    )


@pytest.mark.parametrize("family", PLAIN)
def test_with_adapter_and_activation_checkpointing(
    base: Any, tokenizer: Any, tmp_path: Path, one_process: None, family: str
) -> None:
    cfg = composed("stage=sft", "actor.lora.rank=3", "deploy.activation_checkpointing=true")
    engine = build_engine(
        lambda: load_policy(base(family), tokenizer, Precision.fp32, adapter=cfg.actor.lora),
        cfg,
        "actor",
        tmp_path,
    )
    engine.train()
    policy = engine.module
    blocks = [
        module for module in policy.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    assert blocks and all(module.training for module in blocks)
    for name, p in policy.named_parameters():  # B starts at zero: nothing would reach A
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    assert_same(policy)
    assert policy.can_pack


@pytest.mark.parametrize("family", PLAIN)
def test_temperature_divides_the_logits(base: Any, tokenizer: Any, family: str) -> None:
    policy = load_policy(base(family), tokenizer, Precision.fp32).eval()
    ids, mask, wanted = batch()
    logp = policy(ids, mask, wanted, 0.6)[0]
    for i, row in enumerate(one_by_one(policy, 0.6)):
        assert torch.allclose(logp[i][wanted[i]], row[:, 0], atol=1e-5)


# ----------------------------------------------------------------------------------- who is trusted


@pytest.mark.parametrize("family", FAMILIES)
def test_who_needs_no_padding(base: Any, tokenizer: Any, family: str) -> None:
    policy = load_policy(base(family), tokenizer, Precision.fp32)
    state = torch.get_rng_state()
    for training in (True, False):
        policy.train(training)
        assert (policy.can_pack is not False and policy.packing_matches_unpacked()) == (
            family in PLAIN
        )
        assert policy.training == training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize(
    "precision", [Precision.bf16, Precision.fp16, Precision.autocast], ids=lambda p: p.name
)
def test_rounding_is_not_taken_for_a_difference(
    base: Any, tokenizer: Any, family: str, precision: Precision
) -> None:
    for load in (load_policy, load_scorer):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.autocast):
            assert load(base(family), tokenizer, precision).packing_matches_unpacked()


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.name)
@pytest.mark.parametrize("family", PLAIN)
def test_a_model_that_looks_across_a_border_is_padded(
    base: Any, tokenizer: Any, family: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose attention is not told of the layout: it sees one long sequence."""
    policy = load_policy(base(family), tokenizer, precision)
    monkeypatch.setattr(
        packing,
        "packed_inputs",
        lambda packed, dtype: {"input_ids": packed.ids, "position_ids": packed.position_ids},
    )
    assert not policy.supports_packing()


@pytest.mark.parametrize("broken", [False, True])
def test_a_trained_models_large_rounding_is_not_taken_for_a_difference(
    base: Any, tokenizer: Any, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained models have dimensions with large values, which in bf16 round much.

    Here rounding alone moves the logits by half of what other tokens do.
    """
    policy = load_policy(base("qwen2"), tokenizer, Precision.bf16)
    with torch.no_grad():
        policy.hf.get_input_embeddings().weight[:, 0] = 10
        policy.hf.get_output_embeddings().weight[:, 0] *= 100
    if broken:  # it sees one long sequence
        monkeypatch.setattr(
            packing,
            "packed_inputs",
            lambda packed, dtype: {"input_ids": packed.ids, "position_ids": packed.position_ids},
        )
    assert policy.supports_packing() is not broken


@pytest.mark.parametrize("family", ["opt", "gpt2"])  # the others' positions are relative
def test_a_model_whose_positions_go_on_is_padded(base: Any, tokenizer: Any, family: str) -> None:
    policy = load_policy(base(family), tokenizer, Precision.fp32)
    inner = policy.hf.base_model.forward

    def forward(input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        return inner(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **inputs)

    policy.hf.base_model.forward = forward
    assert not policy.supports_packing()


def test_a_model_that_changes_its_logits_afterwards_is_used_as_it_is(
    base: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Some scale or cap their logits behind the output layer: the product alone would be wrong."""
    policy = load_policy(base("llama"), tokenizer, Precision.fp32)
    inner = policy.hf.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        out = inner(*args, **inputs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    policy.hf.forward = forward
    with caplog.at_level("INFO", "rlhf"):
        assert not policy.supports_packing()
    assert "LlamaForCausalLM: packed batches give other results" in caplog.text
    assert_same(policy)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_nothing_may_be_wanted(base: Any, tokenizer: Any, family: str) -> None:
    """A process of several may have a prompt without answer, so that all have as many rows."""
    policy = load_policy(base(family), tokenizer, Precision.fp32)
    ids, mask, wanted = batch()
    logp, entropy, correct = policy(ids, mask, torch.zeros_like(wanted))
    assert logp.shape == ids.shape and not logp.any() and not entropy.any() and not correct.any()
    (logp.sum() + entropy.sum()).backward()
