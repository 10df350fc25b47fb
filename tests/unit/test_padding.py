"""What a model says depends on its text only, whatever the padding, the company and the dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import PAD
from model_outputs import (
    FP32,
    ROWS,
    all_but_the_first,
    each_family,
    logits_of,
    logp_of,
    padded,
    score_of,
)
from transformers import AutoModelForCausalLM

from rlhf.data.batches import pad_left, pad_right
from rlhf.models.loading import load_policy, load_scorer
from rlhf.models.logprobs import token_logprobs
from rlhf.models.wrappers import last_token_score, model_inputs


@each_family
def test_log_probabilities_do_not_depend_on_padding(base: Any, tokenizer: Any, family: str) -> None:
    policy = load_policy(base(family), tokenizer, FP32).eval()
    for row in ROWS:
        alone = logp_of(policy, row)
        assert torch.allclose(
            alone, token_logprobs(logits_of(policy.hf, row), torch.tensor(row[1:]))[0], atol=1e-5
        )
        for left, right in ((4, 0), (0, 4), (3, 2)):
            assert torch.allclose(logp_of(policy, row, left, right), alone, atol=1e-5)
    # that means something only if these models notice what is in front of a token
    ids, mask = padded(ROWS[1], 4, 0)
    seen = policy(ids, torch.ones_like(mask), all_but_the_first(mask))[0][0, -5:]
    assert (seen - logp_of(policy, ROWS[1])).abs().max() > 1e-2


@each_family
def test_log_probabilities_of_a_batch_are_those_of_its_rows(
    base: Any, tokenizer: Any, family: str
) -> None:
    policy = load_policy(base(family), tokenizer, FP32).eval()
    for pad, place in (
        (pad_left, lambda row: slice(7 - len(row), 6)),
        (pad_right, lambda row: slice(1, len(row))),
    ):
        ids, mask = pad(ROWS, PAD)
        logp = policy(ids, mask, all_but_the_first(mask))[0]
        for i, row in enumerate(ROWS):
            assert torch.allclose(logp[i, place(row)], logp_of(policy, row), atol=1e-5)


@pytest.mark.parametrize("plain", [True, False])
def test_a_policy_answers_for_the_wanted_tokens_only(tokenizer: Any, plain: bool) -> None:
    policy = load_policy("builtin:tiny", tokenizer, FP32).eval()
    assert policy.supports_packing()
    policy.can_pack = plain
    for pad in (pad_left, pad_right):
        ids, mask = pad(ROWS, PAD)
        everything = policy.hf(**model_inputs(policy.hf, ids, mask)).logits
        some = all_but_the_first(mask)
        few = some & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
        last = some & (torch.arange(ids.shape[1]) >= ids.shape[1] - 2)
        assert 0 < few.sum() < some.sum() and 0 < last.sum() < some.sum()
        for wanted in (some, few, last):
            for temperature in (1.0, 0.6):
                found = policy(ids, mask, wanted, temperature)
                logp, entropy = token_logprobs(everything[:, :-1], ids[:, 1:], temperature)
                likeliest = (everything[:, :-1].argmax(-1) == ids[:, 1:]).float()
                for one, expected in zip(found, (logp, entropy, likeliest)):
                    assert one.shape == ids.shape and one.dtype == torch.float32
                    assert not one[~wanted].any() and torch.allclose(
                        one[wanted], expected[wanted[:, 1:]], atol=1e-5
                    )
    likely = torch.cat(
        [ids[:, :3], everything[:, 2:3].argmax(-1)], 1
    )  # no token so far was the likeliest
    assert (
        policy(likely, torch.ones_like(likely), torch.tensor([[False, False, True, True]] * 3))[
            2
        ].tolist()
        == [[0, 0, 0, 1]] * 3
    )


@each_family
def test_each_token_has_its_score_and_padding_that_of_the_last_one_before_it(
    base: Any, tokenizer: Any, family: str
) -> None:
    scorer = load_scorer(base(family), tokenizer, FP32).eval()
    hf = scorer.hf
    for pad in (pad_left, pad_right):
        ids, mask = pad(ROWS, PAD)
        with torch.no_grad():
            scores, read = scorer(ids, mask), scorer(ids, mask, with_padding=True)
            states = hf.base_model(
                **model_inputs(hf.base_model, ids, mask), use_cache=False
            ).last_hidden_state
            assert torch.allclose(
                read, hf.score(states)[..., 0], atol=1e-5
            )  # also where nobody should look
            for i, row in enumerate(ROWS):
                alone = hf.score(
                    hf.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
                )[0, :, 0]
                for found in (scores, read):
                    assert torch.allclose(found[i][mask[i] > 0], alone, atol=1e-5)
                if pad is pad_right:
                    assert (scores[i, len(row) :] == scores[i, len(row) - 1]).all()


@each_family
def test_a_score_does_not_depend_on_padding_or_company(
    base: Any, tokenizer: Any, family: str
) -> None:
    scorer = load_scorer(base(family), tokenizer, FP32).eval()
    alone = [score_of(scorer, row) for row in ROWS]
    assert max(alone) - min(alone) > 1e-2
    for row, score in zip(ROWS, alone):
        for left, right in ((5, 0), (0, 5), (2, 3)):
            assert score_of(scorer, row, left, right) == pytest.approx(score, abs=1e-5)
    for pad in (pad_left, pad_right):
        for order in ([0, 1, 2], [2, 0], [1, 1, 0, 2]):
            ids, mask = pad([ROWS[i] for i in order], PAD)
            assert last_token_score(scorer(ids, mask), mask).tolist() == pytest.approx(
                [alone[i] for i in order], abs=1e-5
            )


def test_the_last_token_is_found_by_the_mask_and_not_by_its_id(tokenizer: Any) -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    assert last_token_score(scores, mask).tolist() == [1.0, 7.0, 8.0]
    scorer = load_scorer("builtin:tiny", tokenizer, FP32).eval()
    ends_with_pad = [5, 6, PAD]  # a real token that has the pad's id
    assert score_of(scorer, ends_with_pad, 0, 3) == pytest.approx(
        score_of(scorer, ends_with_pad), abs=1e-5
    )
    assert abs(score_of(scorer, ends_with_pad) - score_of(scorer, [5, 6])) > 1e-3


@each_family
def test_dropout_of_the_configuration_is_off_after_loading(
    base: Any, tokenizer: Any, family: str
) -> None:
    """The update has the log-probabilities of the rollout; else PPO's first ratio is not 1."""
    ids, mask = pad_right(ROWS, PAD)
    as_it_comes = AutoModelForCausalLM.from_pretrained(base(family)).train()
    assert not torch.equal(as_it_comes(input_ids=ids).logits, as_it_comes(input_ids=ids).logits)
    policy, scorer = (
        load_policy(base(family), tokenizer, FP32).train(),
        load_scorer(base(family), tokenizer, FP32).train(),
    )
    wanted = all_but_the_first(mask)
    for _ in range(3):
        assert all(
            torch.equal(one, other)
            for one, other in zip(policy(ids, mask, wanted), policy(ids, mask, wanted))
        )
        assert torch.equal(scorer(ids, mask), scorer(ids, mask))


@each_family
def test_every_weight_of_a_model_learns(base: Any, tokenizer: Any, family: str) -> None:
    ids, mask = pad_right(ROWS, PAD)
    policy, scorer = (
        load_policy(base(family), tokenizer, FP32),
        load_scorer(base(family), tokenizer, FP32),
    )
    policy(ids, mask, all_but_the_first(mask))[0].sum().backward()
    scorer(ids, mask).square().sum().backward()
    for module in (policy, scorer):
        assert [name for name, p in module.named_parameters() if p.grad is None] == []
