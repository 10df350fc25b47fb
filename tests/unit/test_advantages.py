"""Advantages by rl.advantage and rl.normalize: against loops over Python floats, and by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from formulas import R, some_batch, t
from helpers import composed, rl_node
from torch import Tensor

from rlhf.config.choices import COMPARES_RESPONSES, NEEDS_CRITIC, PER_TOKEN, Advantage, Normalize
from rlhf.config.presets import preset_names
from rlhf.config.stage_nodes import Rl
from rlhf.rl.advantages import discounted_returns, estimate_advantages
from rlhf.rl.experience import Experience

SEEDS = range(4)


def experience(mask: Tensor, values: Tensor) -> Experience:
    """What advantages are estimated from; all else is empty."""
    none: dict[str, Any] = dict.fromkeys(
        (
            "prompt_ids",
            "prompt_mask",
            "response_ids",
            "sampler_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "scores",
            "finished",
        ),
        torch.empty(0),
    )
    return Experience(response_mask=mask, loss_mask=mask, values=values, **none)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_discounted_returns_equal_loops(seed: int, gamma: float) -> None:
    _, rewards, _, mask = some_batch(seed)
    found = discounted_returns(rewards, mask, gamma)
    for i, n in enumerate(int(x) for x in mask.sum(1)):
        row = rewards[i].tolist()
        expected = [sum(gamma ** (k - j) * row[k] for k in range(j, n)) for j in range(n)]
        assert found[i].tolist() == pytest.approx(expected + [0.0] * (R - n), abs=1e-12)


def test_discounted_returns_by_hand() -> None:
    rewards, mask = t([1.0, 2.0, 4.0, 99.0]), t([1, 1, 1, 0])
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0, 0.0]]
    assert discounted_returns(rewards, mask, 1.0).tolist() == [[7.0, 6.0, 4.0, 0.0]]


def expected_advantages(
    rewards: list[list[float]], values: list[list[float]], lengths: list[int], rl: Rl
) -> list[list[float]]:
    """Of the tokens of each response, by loops; gamma and lambda are those of rl, groups of 2."""
    rows = []
    for i, n in enumerate(lengths):
        if rl.advantage == Advantage["return"]:
            rows.append(
                [sum(rl.gamma ** (k - j) * rewards[i][k] for k in range(j, n)) for j in range(n)]
            )
        elif rl.advantage == Advantage["gae"]:
            following = [*values[i][1:n], 0.0]
            delta = [rewards[i][k] + rl.gamma * following[k] - values[i][k] for k in range(n)]
            decay = rl.gamma * rl.gae_lambda
            rows.append([sum(decay ** (k - j) * delta[k] for k in range(j, n)) for j in range(n)])
        else:
            totals = [sum(rewards[j][: lengths[j]]) for j in (i // 2 * 2, i // 2 * 2 + 1)]
            mine, other = totals[i % 2], totals[1 - i % 2]
            one = rl.advantage == Advantage["leave_one_out"]
            advantage = mine - other if one else mine - statistics.fmean(totals)
            if rl.normalize == Normalize.group:
                advantage /= statistics.stdev(totals) + 1e-4
            rows.append([advantage] * n)
    if rl.normalize == Normalize.batch:
        flat = [x for row in rows for x in row]
        mean, std = statistics.fmean(flat), math.sqrt(statistics.pvariance(flat) + 1e-8)
        rows = [[(x - mean) / std for x in row] for row in rows]
    return rows


def test_every_advantage_is_per_token_or_compares_responses() -> None:
    assert PER_TOKEN.isdisjoint(COMPARES_RESPONSES)
    assert PER_TOKEN | COMPARES_RESPONSES == set(Advantage) >= NEEDS_CRITIC


ALLOWED = [
    (advantage.name, normalize.name)
    for advantage in Advantage
    for normalize in Normalize
    if normalize != Normalize.group or advantage.name in ("group", "leave_one_out")
]


@pytest.mark.parametrize("advantage, normalize", ALLOWED)
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_equal_loops(seed: int, advantage: str, normalize: str) -> None:
    _, rewards, values, mask = some_batch(seed)
    rewards, values = rewards * mask, values * mask
    rl = rl_node(
        advantage=Advantage[advantage],
        normalize=Normalize[normalize],
        gamma=0.9,
        gae_lambda=0.8,
        responses_per_prompt=2,
    )
    found, returns = estimate_advantages(rewards, experience(mask, values), rl)
    lengths = [int(n) for n in mask.sum(1)]
    rows = expected_advantages(rewards.tolist(), values.tolist(), lengths, rl)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        assert found[i].tolist() == pytest.approx(row + [0.0] * (R - n), abs=1e-9)
    if advantage != "gae":
        assert returns is None
        return
    plain = rl_node(advantage=rl.advantage, normalize=Normalize.none, gamma=0.9, gae_lambda=0.8)
    unscaled, _ = estimate_advantages(rewards, experience(mask, values), plain)
    assert returns is not None and torch.allclose(returns, (unscaled + values) * mask)


def test_scaled_rewards_keep_their_mean_and_are_for_advantages_per_token_only() -> None:
    mask, values = t([1, 1], [1, 1]), t([0.0, 0.0], [0.0, 0.0])
    rewards = t([1.0, 2.0], [3.0, 6.0])  # mean 3, variance 3.5
    one = {"gamma": 0.0, "normalize": Normalize.none, "whiten_rewards": True}
    scaled, _ = estimate_advantages(
        rewards, experience(mask, values), rl_node(advantage=Advantage["return"], **one)
    )
    assert torch.allclose(scaled, 3 + (rewards - 3) / math.sqrt(3.5), atol=1e-6)
    group = rl_node(advantage=Advantage["group"], responses_per_prompt=2, **one)
    found, _ = estimate_advantages(rewards, experience(mask, values), group)
    assert found.tolist() == [[-3.0, -3.0], [3.0, 3.0]]


# Two responses of two tokens to each of two prompts, with scores 1, 3 and 2, 6 on the last token
BY_PRESET = {
    "grpo": [-0.70706, 0.70706, -0.70708, 0.70708],  # 1 / (sqrt 2 + 1e-4), 2 / (sqrt 8 + 1e-4)
    "dapo": [-0.70706, 0.70706, -0.70708, 0.70708],
    "gspo": [-0.70706, 0.70706, -0.70708, 0.70708],
    "cispo": [-0.70706, 0.70706, -0.70708, 0.70708],
    "dr_grpo": [-1, 1, -2, 2],
    "rloo": [-2, 2, -4, 4],  # minus the other one
    "reinforce_pp": [-1.06904, 0, -0.53452, 1.60357],  # mean 3, variance 3.5
    "reinforce_pp_baseline": [-0.63246, 0.63246, -1.26491, 1.26491],  # variance 2.5
}


@pytest.mark.parametrize("name", BY_PRESET)
def test_advantages_of_the_presets_by_hand(name: str) -> None:
    rl = composed(f"stage={name}").rl
    if rl.responses_per_prompt > 1:
        rl.responses_per_prompt = 2
    rewards = t([0, 1], [0, 3], [0, 2], [0, 6])
    mask = torch.ones_like(rewards)
    found, returns = estimate_advantages(rewards, experience(mask, 0 * mask), rl)
    assert returns is None
    assert torch.allclose(found, t(*([x, x] for x in BY_PRESET[name])), atol=1e-5)


def test_every_preset_without_a_critic_is_in_the_table() -> None:
    """A new preset gets a line of its own."""
    critic = {
        name for name in preset_names() if composed(f"stage={name}").rl.advantage in NEEDS_CRITIC
    }
    assert set(preset_names()) - critic == set(BY_PRESET)
