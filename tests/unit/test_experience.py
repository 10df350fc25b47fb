"""The record of a rollout: values before tokens, picked rows, and metrics against plain loops."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from rollouts import EOS, FEW, experience_of

from rlhf.config.choices import Precision
from rlhf.models.loading import load_scorer, load_tokenizer
from rlhf.rl import experience as experience_module
from rlhf.rl.metrics import Scored, rollout_metrics


def test_the_value_before_a_token_is_the_score_one_place_earlier() -> None:
    scores = torch.arange(12.0).reshape(2, 6)  # 4 prompt tokens, 2 response tokens
    assert experience_module.values_before(scores, 2).tolist() == [[3.0, 4.0], [9.0, 10.0]]


def test_the_value_before_a_token_does_not_know_the_token() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    torch.manual_seed(0)
    critic = load_scorer("builtin:tiny", tokenizer, Precision.fp32)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    changed = ids.clone()
    changed[0, 4] = 300  # the second of three response tokens
    one, other = (
        experience_module.values_before(critic(x, torch.ones_like(x)), 3)[0] for x in (ids, changed)
    )
    assert torch.equal(one[:2], other[:2]) and one[2] != other[2]


def random_experience(generator: torch.Generator) -> experience_module.Experience:
    prompts, lengths = [[3] * n for n in (2, 5, 1)], torch.tensor([3, 1, 2])
    mask = (torch.arange(4) < lengths[:, None]).float()
    e = experience_of(prompts, torch.randint(3, FEW, (3, 4), generator=generator), mask)
    for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values"):
        setattr(e, name, torch.randn(3, 4, generator=generator) * mask)
    e.scores, e.finished = torch.randn(3, 2, generator=generator), torch.tensor([1.0, 0.0, 1.0])
    e.loss_mask = mask * torch.tensor(
        [1.0, 1.0, 0.0, 1.0]
    )  # not the mask, so that the two are told apart
    return e


def test_picking_rows_trims_their_padding_and_keeps_their_content() -> None:
    e = random_experience(torch.Generator().manual_seed(0))
    picked = e.rows([2, 0])
    assert picked.prompt_ids.shape == (2, 2) and picked.response_ids.shape == (2, 3)
    assert picked.ids.shape == picked.full_mask.shape == (2, 5)
    for new, old in enumerate([2, 0]):
        assert (
            picked.prompt_ids[new][picked.prompt_mask[new] > 0].tolist()
            == e.prompt_ids[old][e.prompt_mask[old] > 0].tolist()
        )
        for name in (
            "response_ids",
            "loss_mask",
            "sampler_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "values",
        ):
            before, after = getattr(e, name)[old], getattr(picked, name)[new]
            assert torch.equal(
                after[picked.response_mask[new] > 0], before[e.response_mask[old] > 0]
            )
        assert (
            torch.equal(picked.scores[new], e.scores[old])
            and picked.finished[new] == e.finished[old]
        )
    again = e.rows(
        [0, 1, 2]
    )  # nothing is lost when nothing can be trimmed but the last column, which no row uses
    assert torch.equal(again.response_mask, e.response_mask[:, :3]) and torch.equal(
        again.prompt_ids, e.prompt_ids
    )
    assert e.response_ids.shape == (3, 4)  # the whole is left as it was


def test_rows_without_an_answer_keep_one_column() -> None:
    e = random_experience(torch.Generator().manual_seed(0))
    e.response_mask = torch.zeros_like(e.response_mask)
    assert e.rows([0, 1]).response_mask.shape == (2, 1)


def test_rollout_metrics_equal_loops_and_do_not_see_padding() -> None:
    e = random_experience(torch.Generator().manual_seed(1))
    returns, penalty = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) * e.response_mask
        for seed in (2, 3)
    )
    raw_score, beta = e.scores[:, 0], 0.05
    score = raw_score - 1.0 * (1 - e.finished)
    e.returns = returns
    scored = Scored(raw_score, score, penalty, torch.zeros_like(penalty))
    found = rollout_metrics(e, scored, beta)
    tokens = [(i, j) for i in range(3) for j in range(4) if e.response_mask[i, j]]
    kl = [
        sum(
            float(e.old_logprobs[i, j] - e.ref_logprobs[i, j])
            for j in range(4)
            if e.response_mask[i, j]
        )
        for i in range(3)
    ]
    k3 = [
        sum(
            math.exp(d) - 1 - d
            for j in range(4)
            if e.response_mask[i, j]
            for d in [float(e.ref_logprobs[i, j] - e.old_logprobs[i, j])]
        )
        for i in range(3)
    ]
    expected = {
        "objective/kl": sum(kl) / 3,
        "objective/kl_per_token": sum(kl) / 6,
        "objective/kl_k3": sum(k3) / 3,
        "objective/kl_coef": beta,
        "objective/entropy": -sum(float(e.old_logprobs[i].sum()) for i in range(3)) / 3,
        "objective/non_score_reward": -sum(float(penalty[i, j]) for i, j in tokens) / 3,
        "objective/rlhf_reward": sum(float(s) for s in score) / 3 - beta * sum(kl) / 3,
        "objective/scores": sum(raw_score.tolist()) / 3,
        "objective/scores_std": statistics.pstdev(raw_score.tolist()),
        "objective/scores_min": min(raw_score.tolist()),
        "objective/scores_max": max(raw_score.tolist()),
        "objective/unscored_frac": 0.0,
        "objective/eos_rate": 2 / 3,
        "val/num_eos_tokens": 2,
        "val/sampler_logp_diff": sum(
            abs(float(e.sampler_logprobs[i, j] - e.old_logprobs[i, j])) for i, j in tokens
        )
        / 6,
        "val/value_mean": float(e.values.sum()) / 6,
        "val/return_mean": float(returns.sum()) / 6,
        "val/return_std": statistics.pstdev(float(returns[i, j]) for i, j in tokens),
        "tokens/response_mean": 2,
        "tokens/response_max": 3,
        "tokens/truncated_frac": 1 / 3,
        "tokens/prompt_mean": 8 / 3,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert set(found) - set(expected) == {"val/explained_variance"}
    fills = {
        "response_ids": EOS,
        "response_mask": 0.0,
        "loss_mask": 0.0,
        "old_logprobs": 9.0,
        "ref_logprobs": -9.0,
        "values": 50.0,
        "sampler_logprobs": 3.0,
        "returns": 7.0,
    }
    wide = {
        name: torch.cat([getattr(e, name), torch.full((3, 5), fill)], 1)
        for name, fill in fills.items()
    }
    scored.penalty = torch.cat([penalty, torch.full((3, 5), 7.0)], 1)
    padded = rollout_metrics(dataclasses.replace(e, **wide), scored, beta)
    assert padded == pytest.approx(found, rel=1e-5, nan_ok=True)
