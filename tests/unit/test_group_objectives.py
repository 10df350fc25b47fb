"""The formulas of RLOO, GRPO, DPO and the evaluation, against loops and by hand."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
import torch
from helpers import rl_node
from scipy import stats

from rlhf.config.choices import DpoLoss, KlEstimator, LossAggregation
from rlhf.evaluation.reward_model import (
    LENGTHS,
    accuracy_by,
    calibration,
    length_group,
    pairwise_accuracy,
)
from rlhf.evaluation.statistics import best_of_n, wilson_interval
from rlhf.reporting.eval_results import CalibrationBin
from rlhf.rl.advantages import gae, group_relative, leave_one_out, token_rewards
from rlhf.rl.losses import kl_estimate, policy_loss, token_weights
from rlhf.training.losses import preference_loss

SEEDS = [1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ RLOO and GRPO


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [2, 3, 8])
def test_groups_equal_loops(seed: int, k: int) -> None:
    rewards = numbers(seed, 5, k)
    for row, loo, group, plain in zip(
        rewards,
        leave_one_out(rewards),
        group_relative(rewards, True),
        group_relative(rewards, False),
    ):
        values = row.tolist()
        for i, value in enumerate(values):
            others = values[:i] + values[i + 1 :]
            assert float(loo[i]) == pytest.approx(value - statistics.fmean(others), abs=1e-6)
            assert float(plain[i]) == pytest.approx(value - statistics.fmean(values), abs=1e-6)
            assert float(group[i]) == pytest.approx(
                (value - statistics.fmean(values)) / (statistics.stdev(values) + 1e-4), abs=1e-4
            )


def test_groups_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0], [4.0, 4.0]])
    assert leave_one_out(rewards).tolist() == [
        [-2.0, 2.0],
        [0.0, 0.0],
    ]  # of two: their difference, and its negative
    assert group_relative(rewards, False).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    root = math.sqrt(2)
    assert group_relative(rewards, True)[0].tolist() == pytest.approx(
        [-1 / (root + 1e-4), 1 / (root + 1e-4)]
    )
    assert group_relative(rewards, True)[1].tolist() == [0.0, 0.0], (
        "equal answers teach nothing, and divide by nothing"
    )


@pytest.mark.parametrize("k", [2, 4, 16])
def test_rloo_is_grpo_without_its_deviation_up_to_a_factor(k: int) -> None:
    rewards = numbers(k, 6, k)
    assert torch.allclose(
        leave_one_out(rewards), group_relative(rewards, False) * k / (k - 1), atol=1e-6
    )


@pytest.mark.parametrize("by_group", [False, True])
def test_equal_rewards_give_no_advantage_whatever_their_rounding(by_group: bool) -> None:
    """The mean of 7 times 1000.1 is another number in float32."""
    rewards = torch.tensor([[1000.1] * 7, [0.1] * 6 + [0.2]])
    assert float((rewards - rewards.mean(1, keepdim=True))[0].abs().max()) > 0
    for advantages in (group_relative(rewards, by_group), leave_one_out(rewards, by_group)):
        assert advantages[0].tolist() == [0.0] * 7 and float(advantages[1].abs().min()) > 0


def test_a_constant_added_to_all_answers_of_a_prompt_changes_nothing() -> None:
    rewards, shift = numbers(1, 4, 5), torch.tensor([[3.0], [-7.0], [0.5], [100.0]])
    for advantage in (
        leave_one_out,
        lambda r: group_relative(r, True),
        lambda r: group_relative(r, False),
    ):
        assert torch.allclose(advantage(rewards), advantage(rewards + shift), atol=2e-4)
        assert torch.allclose(advantage(rewards).sum(1), torch.zeros(4), atol=1e-4)


def test_the_leave_one_out_gradient_is_unbiased_and_that_of_the_mean_is_shrunk() -> None:
    """A policy over three responses with known rewards.

    All groups of two responses count, each with its probability.
    """
    logits, reward = (
        torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True),
        torch.tensor([1.0, 4.0, -2.0]).double(),
    )
    true = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)[0]
    found = {}
    for name, advantage in (("rloo", leave_one_out), ("grpo", lambda r: group_relative(r, False))):
        total = torch.zeros(3, dtype=torch.float64)
        for group in itertools.product(range(3), repeat=2):
            logp = logits.log_softmax(0)[list(group)]
            chance = float(logp.sum().exp().detach())
            loss = (advantage(reward[list(group)][None])[0] * logp).mean()
            total += chance * torch.autograd.grad(loss, logits)[0]
        found[name] = total
    assert torch.allclose(found["rloo"], true, atol=1e-12)
    assert torch.allclose(found["grpo"], true / 2, atol=1e-12), (
        "the answer itself is in the mean: (k - 1) / k"
    )


def test_without_deviation_and_with_constant_length_it_is_dr_grpo() -> None:
    """arXiv:2503.20783, eq. 2: 1/G sum over responses and tokens of min(ratio A, clip A).

    The divisor is a constant instead of the length.
    """
    torch.manual_seed(0)
    g, r, longest = 4, 5, 9
    logp, old = numbers(1, g, r) * 0.3, numbers(2, g, r) * 0.3
    mask = (torch.arange(r) < torch.tensor([[5], [2], [3], [1]])).float()
    score = torch.tensor([1.0, 0.0, 2.0, -1.0])
    advantages = group_relative(score[None], False).view(-1, 1) * mask
    loss, _ = policy_loss(logp, old, advantages, mask, rl_node(clip_low=0.2, clip_high=0.28))
    weights = token_weights(mask, LossAggregation.constant, float(mask.sum()), g, longest)
    expected = 0.0
    for i in range(g):
        a = float(score[i]) - statistics.fmean(score.tolist())
        for t in range(int(mask[i].sum())):
            ratio = math.exp(float(logp[i, t] - old[i, t]))
            expected -= min(ratio * a, max(0.8, min(1.28, ratio)) * a) / (g * longest)
    assert float((weights * loss).sum()) == pytest.approx(expected, abs=1e-6)


def test_grpo_of_two_answers_by_hand() -> None:
    """DeepSeekMath, eq. 3: mean over responses of the mean over tokens.

    At ratio 1 each token's loss is minus the advantage of its response.
    """
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    advantages = group_relative(torch.tensor([[2.0, 0.0]]), False).view(-1, 1) * mask
    loss, _ = policy_loss(
        torch.zeros(2, 3), torch.zeros(2, 3), advantages, mask, rl_node(clip_low=0.2, clip_high=0.2)
    )
    weights = token_weights(mask, LossAggregation.sequence, 4.0, 2, 3)
    assert (weights * loss).tolist() == [[pytest.approx(-1 / 6)] * 3, [0.5, 0.0, 0.0]]


def test_with_gamma_and_lambda_1_advantages_are_returns_minus_values() -> None:
    rewards, values = numbers(1, 3, 6), numbers(2, 3, 6)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1]])).float()
    rewards, values = rewards * mask, values * mask
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_come, atol=1e-5) and torch.allclose(
        advantages, to_come - values, atol=1e-5
    )


def test_the_reward_of_an_answer_is_its_score_minus_its_whole_penalty() -> None:
    """What is compared within a group: the tokens' rewards, summed."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    logp, ref = numbers(1, 2, 3) * mask, numbers(2, 2, 3) * mask
    rewards = token_rewards(
        torch.tensor([1.0, -2.0]), 0.1 * kl_estimate(logp, ref, KlEstimator.k1), mask
    )
    assert rewards.sum(1).tolist() == pytest.approx(
        [s - 0.1 * float(d) for s, d in zip((1.0, -2.0), (logp - ref).sum(1))], abs=1e-6
    )


# ---------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta, smoothing", [(0.1, 0.0), (0.5, 0.2), (2.0, 0.0)])
def test_preference_losses_equal_loops(seed: int, beta: float, smoothing: float) -> None:
    chosen, rejected = 3 * numbers(seed, 7), 3 * numbers(seed + 10, 7)
    for h, dpo, ipo in zip(
        (chosen - rejected).tolist(),
        preference_loss(chosen, rejected, beta, DpoLoss.sigmoid, smoothing).tolist(),
        preference_loss(chosen, rejected, beta, DpoLoss.ipo, 0.0).tolist(),
    ):
        p = 1 / (1 + math.exp(-beta * h))
        assert dpo == pytest.approx(
            -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p), abs=1e-5
        )
        assert ipo == pytest.approx((h - 1 / (2 * beta)) ** 2, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_where_policy_and_reference_agree_the_losses_are_ln_2_and_a_square(beta: float) -> None:
    zero = torch.zeros(3)
    for smoothing in (0.0, 0.1):
        assert preference_loss(
            zero, zero, beta, DpoLoss.sigmoid, smoothing
        ).tolist() == pytest.approx([math.log(2)] * 3)
    assert preference_loss(zero, zero, beta, DpoLoss.ipo, 0.0).tolist() == pytest.approx(
        [1 / (4 * beta**2)] * 3
    )


def test_dpo_learns_the_margin_of_the_labels_and_ipo_stops_at_its_own() -> None:
    """With a share e of wrong labels the loss is least where sigmoid(beta h) = 1 - e.

    IPO's loss is least at h = 1 / (2 beta).
    """
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    zero = torch.zeros_like(grid)
    best = float(grid[preference_loss(grid, zero, 0.5, DpoLoss.sigmoid, 0.2).argmin()])
    assert best == pytest.approx(math.log(0.8 / 0.2) / 0.5, abs=1e-3)
    assert float(
        grid[preference_loss(grid, zero, 0.5, DpoLoss.ipo, 0.0).argmin()]
    ) == pytest.approx(1.0, abs=1e-3)


def test_swapping_a_pair_swaps_what_the_gradient_raises() -> None:
    chosen, rejected = (
        torch.tensor([0.4], requires_grad=True),
        torch.tensor([-0.3], requires_grad=True),
    )
    up, down = torch.autograd.grad(
        preference_loss(chosen, rejected, 0.1, DpoLoss.sigmoid, 0.0).sum(), [chosen, rejected]
    )
    assert float(up) < 0 < float(down) and float(up) == pytest.approx(-float(down))


def test_preference_loss_is_finite_for_a_hopeless_pair() -> None:
    far = torch.tensor([-1e4], requires_grad=True)
    loss = preference_loss(far, torch.tensor([1e4]), 1.0, DpoLoss.sigmoid, 0.1)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss.sum(), far)[0])


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("seed", SEEDS)
def test_best_of_n_is_the_mean_over_all_choices_of_n_answers(seed: int) -> None:
    scores, values = numbers(seed, 3, 6), numbers(seed + 5, 3, 6)
    for n in (1, 2, 4, 6):
        wanted = []
        for row, value in zip(scores.tolist(), values.tolist()):
            choices = itertools.combinations(range(6), n)
            wanted.append(
                statistics.fmean(value[max(some, key=lambda i: row[i])] for some in choices)
            )
        assert best_of_n(scores, values, n) == pytest.approx(statistics.fmean(wanted), abs=1e-6)
    assert best_of_n(scores, scores, 6) == pytest.approx(float(scores.amax(1).mean()), abs=1e-6)
    assert best_of_n(scores, values, 1) == pytest.approx(float(values.mean()), abs=1e-6)


@pytest.mark.parametrize("wins, n", [(0, 10), (5, 10), (10, 10), (180, 256), (1, 1)])
def test_the_interval_of_a_win_rate_is_wilsons(wins: int, n: int) -> None:
    known = stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert wilson_interval(wins, n) == pytest.approx((known.low, known.high), abs=1e-6)


def test_the_interval_with_ties_by_hand() -> None:
    low, high = wilson_interval(
        2.5, 4
    )  # p = 0.625: centre (p + z^2/8) / (1 + z^2/4), with z^2 = 3.841459
    centre = (0.625 + 3.841459 / 8) / (1 + 3.841459 / 4)
    half = 1.959964 / (1 + 3.841459 / 4) * math.sqrt(0.625 * 0.375 / 4 + 3.841459 / 64)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(1)
    inside = 0
    for _ in range(4000):
        wins = sum(draw.random() < 0.7 for _ in range(60))
        low, high = wilson_interval(wins, 60)
        inside += low <= 0.7 <= high
    assert 0.93 < inside / 4000 < 0.97


def test_accuracy_counts_a_tie_as_half_and_by_group() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0, -1.0])
    assert pairwise_accuracy(chosen, rejected) == 2.5 / 4
    assert accuracy_by(["a", "b", "a", "b"], chosen, rejected) == {"a": (2, 0.75), "b": (2, 0.5)}


def test_calibration_by_hand() -> None:
    logit = math.log(0.9 / 0.1)  # confidence 0.9
    # three of four are right; and one with confidence 0.5
    margins = torch.tensor([logit, logit, -logit, logit, 0.0])
    error, bins = calibration(margins)
    assert [b.pairs for b in bins] == [1, 4]
    assert bins[0] == CalibrationBin(low=0.5, high=0.55, pairs=1, probability=0.5, accuracy=0.5)
    assert bins[1].probability == pytest.approx(0.9) and bins[1].accuracy == 0.75
    assert error == pytest.approx(4 / 5 * 0.15)


def test_a_judge_that_says_what_is_true_is_calibrated_and_one_that_is_too_sure_is_not() -> None:
    draw = random.Random(2)
    margins = [draw.gauss(0, 2) for _ in range(20_000)]
    labelled = torch.tensor(
        [abs(m) if draw.random() < 1 / (1 + math.exp(-abs(m))) else -abs(m) for m in margins]
    )
    assert calibration(labelled)[0] < 0.01 and calibration(3 * labelled)[0] > 0.08


@pytest.mark.parametrize(
    "chosen, rejected, group",
    [(1, 1, 2), (10, 1, 4), (1, 10, 0), (10, 8, 3), (8, 10, 1), (100, 95, 2), (5, 0, 4)],
)
def test_lengths_are_grouped_by_their_share(chosen: int, rejected: int, group: int) -> None:
    assert length_group(chosen, rejected) == LENGTHS[group][0]
