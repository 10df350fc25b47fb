"""The reward of each token from score and KL, against plain loops and numbers by hand."""

from __future__ import annotations

import pytest
import torch
from formulas import F64, SEEDS, normal, prefix_mask, shape_of, t

from rlhf.rl.advantages import token_rewards


@pytest.mark.parametrize("seed", SEEDS)
def test_token_rewards_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, score = prefix_mask(generator, b, r), normal(generator, b)
    logp, ref = normal(generator, b, r), normal(generator, b, r)
    rewards = token_rewards(score, 0.05 * (logp - ref), mask)
    for i in range(b):
        length = int(sum(mask[i].tolist()))
        for j in range(r):
            expected = 0.0
            if j < length:
                expected = -0.05 * (logp[i, j].item() - ref[i, j].item())
            if j == length - 1:
                expected += score[i].item()
            assert rewards[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_token_rewards_in_the_three_ways_an_answer_ends() -> None:
    # A response that stops in the middle, one that fills all places without EOS, and one of a
    # single token.
    mask = t([1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0])
    logp = t([-1.0, -2.0, -9.0, -9.0], [-1.0, -1.0, -1.0, -1.0], [-0.5, -9.0, -9.0, -9.0])
    ref = t([-1.5, -1.0, -3.0, -3.0], [-1.0, -2.0, -1.0, -0.5], [-0.7, -3.0, -3.0, -3.0])
    rewards = token_rewards(torch.tensor([3.0, -2.0, 1.0], dtype=F64), 0.1 * (logp - ref), mask)
    # -0.1 * (-1 + 1.5) = -0.05;  -0.1 * (-2 + 1) + 3 = 3.1;
    # nothing behind EOS, whatever the log-probabilities of the padding
    expected = t([-0.05, 3.1, 0.0, 0.0], [0.0, -0.1, 0.0, 0.05 - 2.0], [-0.02 + 1.0, 0.0, 0.0, 0.0])
    assert torch.allclose(rewards, expected, atol=1e-12)


def test_an_empty_answer_gets_no_reward() -> None:
    rewards = token_rewards(torch.tensor([5.0]), torch.full((1, 3), 0.1), torch.zeros(1, 3))
    assert (rewards == 0).all()


def test_rewards_of_a_row_sum_to_score_minus_its_penalties() -> None:
    generator = torch.Generator().manual_seed(3)
    penalty, score = normal(generator, 4, 5), normal(generator, 4)
    mask = t([1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0])
    rewards = token_rewards(score, penalty, mask)
    assert torch.allclose(rewards.sum(1), score - (penalty * mask).sum(1))


def test_without_a_penalty_the_score_stands_alone_on_the_last_token() -> None:
    mask = t([1, 1, 0], [1, 1, 1], [1, 0, 0])
    rewards = token_rewards(torch.tensor([3.0, -2.0, 1.0], dtype=F64), torch.zeros_like(mask), mask)
    assert torch.equal(rewards, t([0, 3, 0], [0, 0, -2], [1, 0, 0]))
