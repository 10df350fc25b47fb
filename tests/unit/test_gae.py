"""Generalized advantage estimation, against its double sum and numbers by hand."""

from __future__ import annotations

import pytest
import torch
from formulas import F64, SEEDS, normal, prefix_mask, shape_of, t

from rlhf.rl.advantages import gae, token_rewards


def gae_as_double_sum(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l} (Schulman 2016, eq. 16).

    For one row without padding.
    """
    n = len(rewards)
    delta = [
        rewards[k] + gamma * (values[k + 1] if k + 1 < n else 0.0) - values[k] for k in range(n)
    ]
    return [sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, n)) for i in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_equals_the_double_sum(seed: int, gamma: float, lam: float) -> None:
    generator, b, r = shape_of(seed)
    mask = prefix_mask(generator, b, r)
    rewards, values = (
        normal(generator, b, r) * mask,
        normal(generator, b, r),
    )  # the critic has values on padding too
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i in range(b):
        n = int(mask[i].sum())
        expected = gae_as_double_sum(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i].tolist() == pytest.approx(expected + [0.0] * (r - n), abs=1e-12)
        assert returns[i].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[i, :n].tolist())] + [0.0] * (r - n), abs=1e-12
        )


def test_gae_of_three_tokens_by_hand() -> None:
    rewards, values, mask = t([0.0, 0.0, 1.0]), t([0.5, 0.4, 0.3]), torch.ones(1, 3, dtype=F64)
    # delta = 0.4 - 0.5, 0.3 - 0.4, 1 - 0.3
    # A3 = 0.7,  A2 = -0.1 + 0.95 * 0.7,  A1 = -0.1 + 0.95 * 0.565
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.43675, 0.565, 0.7], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.93675, 0.965, 1.0], abs=1e-12)
    # delta = 0.36 - 0.5, 0.27 - 0.4, 0.7;  A2 = -0.13 + 0.855 * 0.7,  A1 = -0.14 + 0.855 * 0.4685
    advantages, _ = gae(rewards, values, mask, 0.9, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.2605675, 0.4685, 0.7], abs=1e-12)


def test_reward_of_the_last_token_reaches_the_first_and_not_one_place_further() -> None:
    # EOS is the second token: its reward counts in full, the value behind it counts as 0
    rewards = token_rewards(torch.tensor([2.0], dtype=F64), t([0.0, 0.0, -0.5]), t([1, 1, 0]))
    advantages, returns = gae(rewards, t([0.5, 1.0, 77.0]), t([1, 1, 0]), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.5 + 0.95 * 1.0, 1.0, 0.0])
    assert returns[0].tolist() == pytest.approx([0.5 + 0.5 + 0.95, 2.0, 0.0])


def test_with_gamma_and_lambda_1_returns_are_the_rewards_to_come() -> None:
    generator, b, r = shape_of(4)
    mask = prefix_mask(generator, b, r)
    rewards, values = normal(generator, b, r) * mask, normal(generator, b, r)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_come)
    assert torch.allclose(advantages, (to_come - values) * mask)


def test_padding_does_not_change_gae() -> None:
    generator = torch.Generator().manual_seed(5)
    rewards, values, mask = (
        normal(generator, 2, 4),
        normal(generator, 2, 4),
        t([1, 1, 1, 1], [1, 1, 1, 0]),
    )
    rewards = rewards * mask
    pad = normal(generator, 2, 3, scale=100)
    wide = gae(
        torch.cat([rewards, 0 * pad], 1),
        torch.cat([values, pad], 1),
        torch.cat([mask, 0 * pad], 1),
        0.9,
        0.8,
    )
    for padded, plain in zip(wide, gae(rewards, values, mask, 0.9, 0.8)):
        assert torch.equal(padded[:, :4], plain)
        assert (padded[:, 4:] == 0).all()
