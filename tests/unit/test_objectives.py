"""The formulas, each against plain loops over Python floats and against numbers by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import composed, rl_node
from torch import Tensor

from rlhf.config.choices import KlEstimator, LossAggregation, Schedule
from rlhf.evaluation.statistics import repetition
from rlhf.models.logprobs import token_logprobs
from rlhf.rl.advantages import gae, masked_mean, token_rewards, whiten
from rlhf.rl.losses import kl_estimate, policy_loss, token_weights, value_loss
from rlhf.rl.metrics import explained_variance
from rlhf.training.losses import pairwise_loss, pairwise_loss_per_token
from rlhf.training.schedule import learning_rate

SEEDS = range(6)
F64 = torch.float64


def shape_of(seed: int) -> tuple[torch.Generator, int, int]:
    """A random number of rows and columns, 1 x 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    b, r = (int(torch.randint(1, 7, (1,), generator=generator)) for _ in range(2))
    return generator, *((1, 1) if seed == 0 else (b, r))


def prefix_mask(generator: torch.Generator, b: int, r: int) -> Tensor:
    """Masks of right-padded rows, of which some have no token at all."""
    lengths = torch.randint(0, r + 1, (b, 1), generator=generator)
    lengths[0] = r
    return (torch.arange(r) < lengths).to(F64)


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64) * scale


def t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def masked(x: Tensor, mask: Tensor) -> list[float]:
    """The values under the mask as a flat list."""
    return [x[i, j].item() for i in range(x.shape[0]) for j in range(x.shape[1]) if mask[i, j] > 0]


# --------------------------------------------------------------------------------------- token_logp


@pytest.mark.parametrize("seed", SEEDS)
def test_token_logp_and_entropy_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    v = 2 + seed
    logits, targets = (
        normal(generator, b, r, v, scale=3),
        torch.randint(0, v, (b, r), generator=generator),
    )
    logp, entropy = token_logprobs(logits, targets)
    for i in range(b):
        for j in range(r):
            weights = [math.exp(x) for x in logits[i, j].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logp[i, j].item() == pytest.approx(math.log(p[targets[i, j]]), abs=1e-5)
            assert entropy[i, j].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)


def test_token_logp_by_hand() -> None:
    # weights 1, 2, 1 of 4: probabilities 1/4, 1/2, 1/4
    logp, entropy = token_logprobs(torch.tensor([[[0.0, math.log(2), 0.0]]]), torch.tensor([[1]]))
    assert logp.item() == pytest.approx(-0.693147, abs=1e-6)
    assert entropy.item() == pytest.approx(1.039721, abs=1e-6)  # 1.5 log 2
    _, uniform = token_logprobs(torch.zeros(1, 1, 8), torch.tensor([[3]]))
    assert uniform.item() == pytest.approx(math.log(8), abs=1e-6)


def test_token_logp_is_float32_and_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=torch.bfloat16)
    logp, entropy = token_logprobs(logits, torch.tensor([[0]]))
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.item() == 0.0 and entropy.item() == 0.0


def test_probabilities_of_all_targets_sum_to_one() -> None:
    logits = normal(torch.Generator().manual_seed(1), 1, 1, 11).expand(1, 11, 11)
    logp, _ = token_logprobs(logits, torch.arange(11)[None])
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


# ------------------------------------------------------------------------------------ pairwise_loss


@pytest.mark.parametrize("seed", SEEDS)
def test_pairwise_loss_equals_a_loop(seed: int) -> None:
    generator, b, _ = shape_of(seed)
    chosen, rejected = normal(generator, b, scale=3), normal(generator, b, scale=3)
    expected = sum(
        math.log(1 + math.exp(r - c)) for c, r in zip(chosen.tolist(), rejected.tolist())
    )
    assert pairwise_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-5)


def test_an_identical_pair_costs_log_2() -> None:
    score = torch.tensor([0.7, -40.0])
    assert pairwise_loss(score, score).item() == pytest.approx(2 * 0.693147, abs=1e-5)


def test_swapping_a_pair_mirrors_loss_and_gradient() -> None:
    a = torch.tensor([1.5, -0.2], requires_grad=True)
    b = torch.tensor([0.5, 0.4], requires_grad=True)
    # -log sigmoid(x) and -log sigmoid(-x) differ by x
    assert (pairwise_loss(b, a) - pairwise_loss(a, b)).item() == pytest.approx(
        (1.5 - 0.5) + (-0.2 - 0.4), abs=1e-6
    )
    to_a, to_b = torch.autograd.grad(pairwise_loss(a, b), (a, b))
    assert torch.allclose(to_a, -to_b)
    assert to_a[0].item() == pytest.approx(-1 / (1 + math.exp(1.0)), abs=1e-6)  # -sigmoid(-margin)


def test_pairwise_loss_is_finite_for_a_hopeless_pair() -> None:
    assert pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(
        1000.0
    )


# -------------------------------------------------------------------------- pairwise_loss_per_token


@pytest.mark.parametrize("seed", SEEDS)
def test_pairwise_loss_per_token_equals_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    chosen, rejected = normal(generator, b, r, scale=3), normal(generator, b, r, scale=3)
    ends = torch.randint(1, r + 1, (b,), generator=generator)
    starts = (torch.rand(b, generator=generator) * ends).long()
    expected = 0.0
    for i in range(b):
        places = range(int(starts[i]), int(ends[i]))
        losses = [
            math.log(1 + math.exp(rejected[i, j].item() - chosen[i, j].item())) for j in places
        ]
        expected += sum(losses) / len(losses)
    assert pairwise_loss_per_token(chosen, rejected, starts, ends).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_pairwise_loss_per_token_by_hand() -> None:
    chosen, rejected = (
        t([9.0, 1.0, 2.0, -50.0], [0.0, 0.0, 0.0, 1.0]),
        t([9.0, 0.0, 0.0, 50.0], [0.0, 0.0, 0.0, 0.0]),
    )
    # margins 1 and 2: (log(1 + e^-1) + log(1 + e^-2)) / 2 = (0.313262 + 0.126928) / 2
    # margin 1 alone
    parts = [
        pairwise_loss_per_token(
            chosen[[i]], rejected[[i]], torch.tensor([start]), torch.tensor([end])
        ).item()
        for i, start, end in ((0, 1, 3), (1, 3, 4))
    ]
    assert parts == pytest.approx([0.220095, 0.313262], abs=1e-6)
    both = pairwise_loss_per_token(chosen, rejected, torch.tensor([1, 3]), torch.tensor([3, 4]))
    assert both.item() == pytest.approx(
        sum(parts), abs=1e-6
    )  # a pair counts once, however many tokens it is compared at


def test_an_identical_pair_costs_log_2_per_token_too() -> None:
    score = t([0.7, -40.0, 3.0], [1.0, 2.0, 3.0])
    same = pairwise_loss_per_token(score, score, torch.tensor([2, 0]), torch.tensor([3, 3]))
    assert same.item() == pytest.approx(2 * 0.693147, abs=1e-5)


def test_compared_at_one_token_it_is_the_loss_of_two_scores() -> None:
    generator = torch.Generator().manual_seed(2)
    chosen, rejected, last = (
        normal(generator, 4, 5),
        normal(generator, 4, 5),
        torch.tensor([0, 2, 4, 1]),
    )
    rows = torch.arange(4)
    expected = pairwise_loss(chosen[rows, last], rejected[rows, last])
    assert pairwise_loss_per_token(chosen, rejected, last, last + 1).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_pairwise_loss_per_token_has_its_gradient_where_it_compares() -> None:
    chosen, rejected = (
        torch.tensor([[9.0, 1.0, 2.0, -7.0]], requires_grad=True),
        torch.tensor([[9.0, 0.0, 0.0, 8.0]], requires_grad=True),
    )
    pairwise_loss_per_token(chosen, rejected, torch.tensor([1]), torch.tensor([3])).backward()
    slopes = [0.0, -0.5 / (1 + math.exp(1)), -0.5 / (1 + math.exp(2)), 0.0]  # -sigmoid(-margin) / 2
    assert chosen.grad[0].tolist() == pytest.approx(slopes, abs=1e-6)
    assert rejected.grad[0].tolist() == pytest.approx([-x for x in slopes], abs=1e-6)


def test_padding_does_not_change_pairwise_loss_per_token() -> None:
    chosen, rejected, rubbish = t([1.0, 2.0]), t([0.5, -2.0]), t([-300.0, 55.0])
    starts, ends = torch.tensor([0]), torch.tensor([2])
    wide = pairwise_loss_per_token(
        torch.cat([chosen, rubbish], 1), torch.cat([rejected, -rubbish], 1), starts, ends
    )
    assert wide.item() == pairwise_loss_per_token(chosen, rejected, starts, ends).item()


# -------------------------------------------------------------------------------------- kl_estimate


def kl_by_token(p: float, q: float) -> dict[KlEstimator, float]:
    """All estimates from one token of probability p under the policy and q under the reference."""
    log = math.log(q / p)
    return {KlEstimator.k1: -log, KlEstimator.k2: 0.5 * log * log, KlEstimator.k3: q / p - 1 - log}


def policy_and_reference(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy, with gradient, and a reference's log-probabilities; 2 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, 2 + seed).requires_grad_(), normal(generator, 2 + seed).log_softmax(0)


def expected_gradient(logits: Tensor, ref: Tensor, estimator: KlEstimator) -> Tensor:
    """The sum over all tokens of p times the gradient of the estimate.

    This is the expectation of the gradient from sampled tokens.
    """
    logp = logits.log_softmax(0)
    return torch.autograd.grad(
        (logp.exp().detach() * kl_estimate(logp, ref, estimator)).sum(), logits
    )[0]


@pytest.mark.parametrize("estimator", KlEstimator)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_estimates_equal_loops(seed: int, estimator: KlEstimator) -> None:
    generator, b, r = shape_of(seed)
    logp, ref = normal(generator, b, r), normal(generator, b, r)
    estimate = kl_estimate(logp, ref, estimator)
    for i in range(b):
        for j in range(r):
            expected = kl_by_token(math.exp(logp[i, j].item()), math.exp(ref[i, j].item()))[
                estimator
            ]
            assert estimate[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (kl_estimate(logp, logp, estimator) == 0).all()


def test_kl_estimates_by_hand() -> None:
    # p = 1/2, 1/4, 1/4 and q = 1/4, 1/2, 1/4: d = log 2, -log 2, 0
    # k2 = (log 2)^2 / 2;  k3 = q/p - 1 + d
    logp, ref = t([0.5, 0.25, 0.25]).log(), t([0.25, 0.5, 0.25]).log()
    assert kl_estimate(logp, ref, KlEstimator.k1)[0].tolist() == pytest.approx(
        [0.693147, -0.693147, 0.0], abs=1e-6
    )
    assert kl_estimate(logp, ref, KlEstimator.k2)[0].tolist() == pytest.approx(
        [0.240227, 0.240227, 0.0], abs=1e-6
    )
    assert kl_estimate(logp, ref, KlEstimator.k3)[0].tolist() == pytest.approx(
        [0.193147, 0.306853, 0.0], abs=1e-6
    )


def test_k2_and_k3_are_never_negative_and_k1_has_both_signs() -> None:
    logp, ref = (normal(torch.Generator().manual_seed(seed), 50, 50, scale=2) for seed in (1, 2))
    k1, k2, k3 = (
        kl_estimate(logp, ref, estimator)
        for estimator in (KlEstimator.k1, KlEstimator.k2, KlEstimator.k3)
    )
    assert (k2 >= 0).all() and (k3 >= 0).all()
    assert (k1 > 0).any() and (k1 < 0).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed: int) -> None:
    logits, ref = policy_and_reference(seed)
    logp = logits.detach().log_softmax(0)
    exact = sum(math.exp(a) * (a - b) for a, b in zip(logp.tolist(), ref.tolist()))
    mean = {
        estimator: (logp.exp() * kl_estimate(logp, ref, estimator)).sum().item()
        for estimator in KlEstimator
    }
    assert mean[KlEstimator.k1] == pytest.approx(exact, abs=1e-12)
    assert mean[KlEstimator.k3] == pytest.approx(exact, abs=1e-12)
    assert abs(mean[KlEstimator.k2] - exact) > 1e-4


@pytest.mark.parametrize("estimator", [KlEstimator.k1, KlEstimator.k3])
def test_the_mean_of_many_samples_is_the_kl(estimator: KlEstimator) -> None:
    p, q = (
        torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64),
        torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=F64),
    )
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    draws = torch.multinomial(
        p, 100_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    estimate = kl_estimate(p.log()[draws], q.log()[draws], estimator)
    assert abs(estimate.mean().item() - exact) < 4 * estimate.std().item() / math.sqrt(len(draws))


@pytest.mark.parametrize("seed", SEEDS)
def test_as_a_loss_k1_does_nothing_k2_lowers_the_kl_and_k3_the_reverse_kl(seed: int) -> None:
    logits, ref = policy_and_reference(seed)
    logp = logits.log_softmax(0)
    of_kl = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[
        0
    ]  # KL(p || q)
    of_reverse = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)[0]  # KL(q || p)
    assert torch.allclose(
        expected_gradient(logits, ref, KlEstimator.k1), torch.zeros_like(logits), atol=1e-12
    )
    assert torch.allclose(expected_gradient(logits, ref, KlEstimator.k2), of_kl, atol=1e-12)
    assert torch.allclose(expected_gradient(logits, ref, KlEstimator.k3), of_reverse, atol=1e-12)
    assert not torch.allclose(of_kl, of_reverse, atol=1e-3)


@pytest.mark.parametrize("estimator", KlEstimator)
def test_the_gradient_of_a_kl_estimate_is_the_numerical_one(estimator: KlEstimator) -> None:
    generator = torch.Generator().manual_seed(6)
    logp, ref = normal(generator, 3, 4).requires_grad_(), normal(generator, 3, 4)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, estimator), (logp,))


# ------------------------------------------------------------------------------------ token_rewards


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


# ---------------------------------------------------------------------------------------------- gae


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


# --------------------------------------------------------------------------- masked_mean and whiten


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_mean_equals_a_loop(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, x = prefix_mask(generator, b, r), normal(generator, b, r)
    chosen = masked(x, mask)
    assert masked_mean(x, mask).item() == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


def test_masked_mean_by_hand_and_of_nothing() -> None:
    assert (
        masked_mean(t([1.0, 2.0, 100.0], [6.0, 100.0, 100.0]), t([1, 1, 0], [1, 0, 0])).item()
        == 3.0
    )
    assert masked_mean(t([1.0, 2.0]), t([0, 0])).item() == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_equals_a_loop(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, x = prefix_mask(generator, b, r), normal(generator, b, r, scale=5) + 3
    white = whiten(x, mask)
    chosen = masked(x, mask)
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((c - mean) ** 2 for c in chosen) / len(chosen) + 1e-8)
    assert masked(white, mask) == pytest.approx([(c - mean) / std for c in chosen], abs=1e-9)
    assert (white * (1 - mask) == 0).all()


def test_whitened_values_have_mean_0_and_biased_variance_1() -> None:
    white = whiten(t([1.0, 2.0, 99.0], [3.0, 6.0, 99.0]), t([1, 1, 0], [1, 1, 0]))
    # 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    assert masked(white, t([1, 1, 0], [1, 1, 0])) == pytest.approx(
        [-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 3 / 3.5**0.5], abs=1e-6
    )


def test_whitening_is_over_the_batch_and_not_over_each_row() -> None:
    white = whiten(t([0.0, 0.0], [1.0, 1.0]), torch.ones(2, 2, dtype=F64))
    assert white[0].tolist() == pytest.approx([-1.0, -1.0], abs=1e-6) and white[
        1
    ].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_whiten_of_one_token_of_equal_tokens_and_of_none_is_zero() -> None:
    assert whiten(t([4.0]), t([1])).item() == 0.0
    assert (whiten(t([4.0, 4.0, 9.0]), t([1, 1, 0])) == 0).all()
    assert (whiten(t([4.0, 5.0]), t([0, 0])) == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_scaled_rewards_equal_a_loop_and_keep_their_mean(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, x = prefix_mask(generator, b, r), normal(generator, b, r, scale=5) + 3
    scaled = whiten(x, mask, shift_mean=False)
    chosen = masked(x, mask)
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((c - mean) ** 2 for c in chosen) / len(chosen) + 1e-8)
    assert masked(scaled, mask) == pytest.approx(
        [mean + (c - mean) / std for c in chosen], abs=1e-9
    )
    assert (scaled * (1 - mask) == 0).all()
    assert masked_mean(scaled, mask).item() == pytest.approx(mean, abs=1e-12)


def test_scaled_rewards_by_hand() -> None:
    mask = t([1, 1, 0], [1, 1, 0])
    scaled = whiten(t([1.0, 2.0, 99.0], [3.0, 6.0, 99.0]), mask, shift_mean=False)
    # 1, 2, 3, 6: mean 3, which stays, variance 3.5
    assert masked(scaled, mask) == pytest.approx(
        [3 - 2 / 3.5**0.5, 3 - 1 / 3.5**0.5, 3.0, 3 + 3 / 3.5**0.5], abs=1e-6
    )
    assert whiten(t([4.0]), t([1]), shift_mean=False).item() == 4.0
    assert (whiten(t([4.0, 5.0]), t([0, 0]), shift_mean=False) == 0).all()


# ------------------------------------------------------------------------------------ token_weights


def weights_by_loop(mask: Tensor, over: LossAggregation, longest: int) -> list[list[float]]:
    """The weights of a whole optimizer step, from the lengths of its answers."""
    lengths = [sum(row) for row in mask.tolist()]
    of_row = {
        LossAggregation.token: [1 / max(1.0, sum(lengths))] * len(lengths),
        LossAggregation.sequence: [1 / n / len(lengths) if n else 0.0 for n in lengths],
        LossAggregation.constant: [1 / (len(lengths) * longest)] * len(lengths),
    }[over]
    return [
        [weight if j < n else 0.0 for j in range(mask.shape[1])]
        for weight, n in zip(of_row, lengths)
    ]


@pytest.mark.parametrize("over", LossAggregation)
@pytest.mark.parametrize("seed", SEEDS)
def test_token_weights_equal_loops(seed: int, over: LossAggregation) -> None:
    generator, b, r = shape_of(seed)
    mask = prefix_mask(generator, b, r)
    weights = token_weights(mask, over, float(mask.sum()), b, r + 3)
    for row, expected in zip(weights.tolist(), weights_by_loop(mask, over, r + 3)):
        assert row == pytest.approx(expected, abs=1e-15)


def test_token_weights_by_hand() -> None:
    # answers of 3, 1 and 2 tokens, of which each may have 4
    mask = t([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0])
    expected = {
        LossAggregation.token: t([1 / 6, 1 / 6, 1 / 6, 0], [1 / 6, 0, 0, 0], [1 / 6, 1 / 6, 0, 0]),
        LossAggregation.sequence: t(
            [1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 0, 0], [1 / 6, 1 / 6, 0, 0]
        ),
        LossAggregation.constant: t(
            [1 / 12, 1 / 12, 1 / 12, 0], [1 / 12, 0, 0, 0], [1 / 12, 1 / 12, 0, 0]
        ),
    }
    # The loss of a token is 1 in the first response, 2 in the second and 3 in the third:
    # (3 + 2 + 6) / 6, (1 + 2 + 3) / 3, (3 + 2 + 6) / (3 x 4).
    means = {
        LossAggregation.token: 11 / 6,
        LossAggregation.sequence: 2.0,
        LossAggregation.constant: 11 / 12,
    }
    assert set(expected) == set(LossAggregation)
    for over, weights in expected.items():
        found = token_weights(mask, over, 6.0, 3, 4)
        assert torch.allclose(found, weights, atol=1e-15)
        assert (found * t([1.0], [2.0], [3.0])).sum().item() == pytest.approx(means[over])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_weights_of_a_step_sum_to_one_or_to_the_share_of_places_taken(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask = prefix_mask(generator, b, r)
    tokens, answered = float(mask.sum()), sum(row[0] for row in mask.tolist())
    assert token_weights(mask, LossAggregation.token, tokens, b, 9).sum().item() == pytest.approx(
        1.0
    )
    assert token_weights(
        mask, LossAggregation.sequence, tokens, b, 9
    ).sum().item() == pytest.approx(answered / b)  # an empty one has none
    assert token_weights(
        mask, LossAggregation.constant, tokens, b, 9
    ).sum().item() == pytest.approx(tokens / (b * 9))


@pytest.mark.parametrize("over", LossAggregation)
def test_the_weights_of_micro_batches_are_those_of_the_whole_step(over: LossAggregation) -> None:
    mask = prefix_mask(torch.Generator().manual_seed(11), 6, 5)
    step = (over, float(mask.sum()), 6, 8)
    whole = token_weights(mask, *step)
    for rows in ([0], [1, 2, 3], [5, 4]):
        width = max(
            1, int(mask[rows].sum(1).max())
        )  # a micro-batch has no more columns than its longest row
        assert torch.equal(token_weights(mask[rows, :width], *step), whole[rows, :width])


@pytest.mark.parametrize("over", LossAggregation)
def test_rows_without_tokens_have_no_weight_but_count_as_answers(over: LossAggregation) -> None:
    weights = token_weights(t([1, 1], [0, 0]), over, 2.0, 2, 2)
    assert (weights[1] == 0).all()
    assert weights[0].tolist() == pytest.approx(
        {LossAggregation.token: [0.5, 0.5]}.get(over, [0.25, 0.25])
    )
    assert (
        token_weights(t([0, 0], [0, 0]), over, 0.0, 2, 2) == 0
    ).all()  # no NaN where nothing is learnt


# -------------------------------------------------------------------------------------- policy_loss


def policy_loss_by_token(
    logp: float, old: float, advantage: float, clip_low: float, clip_high: float
) -> tuple[float, float]:
    """Loss of one token and its derivative with respect to log pi."""
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    if -advantage * ratio >= -advantage * clipped:
        return -advantage * ratio, -advantage * ratio
    return -advantage * clipped, 0.0


@pytest.mark.parametrize("clip_low, clip_high", [(0.2, 0.2), (0.2, 0.28), (0.4, 0.1), (9.0, 9.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_and_its_gradient_equal_loops(
    seed: int, clip_low: float, clip_high: float
) -> None:
    generator, b, r = shape_of(seed)
    mask, advantages, old = (
        prefix_mask(generator, b, r),
        normal(generator, b, r),
        normal(generator, b, r) - 2,
    )
    logp = (old + normal(generator, b, r, scale=0.4)).requires_grad_()
    loss, sums = policy_loss(
        logp, old, advantages, mask, rl_node(clip_low=clip_low, clip_high=clip_high)
    )
    loss.sum().backward()
    low, high, ratios, kl = 0, 0, [], 0.0
    for i in range(b):
        for j in range(r):
            new, before = logp[i, j].item(), old[i, j].item()
            part, slope = policy_loss_by_token(
                new, before, advantages[i, j].item(), clip_low, clip_high
            )
            assert loss[i, j].item() == pytest.approx(part * mask[i, j].item(), abs=1e-12)
            assert logp.grad[i, j].item() == pytest.approx(slope * mask[i, j].item(), abs=1e-12)
            if mask[i, j] > 0:
                low += slope == 0.0 and new < before
                high += slope == 0.0 and new > before
                ratios.append(math.exp(new - before))
                kl += 0.5 * (new - before) ** 2
    assert loss.shape == mask.shape
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (low, high)
    assert sums["approxkl"].item() == pytest.approx(kl)
    assert sums["ratio"].item() == pytest.approx(sum(ratios))
    assert sums["ratio_sq"].item() == pytest.approx(sum(x * x for x in ratios))
    assert sums["ratio_max"].item() == pytest.approx(max(ratios))


def test_at_ratio_1_the_loss_is_minus_the_advantages_and_so_is_its_gradient() -> None:
    old = t([-1.0, -2.0, -3.0])
    advantages, mask = t([0.5, -1.5, 7.0]), t([1, 1, 0])
    logp = old.clone().requires_grad_()
    loss, sums = policy_loss(logp, old, advantages, mask, rl_node(clip_low=0.2, clip_high=0.3))
    loss.sum().backward()
    assert loss[0].tolist() == [-0.5, 1.5, 0.0]
    assert logp.grad[0].tolist() == [-0.5, 1.5, 0.0]
    names = ("clipfrac_low", "clipfrac_high", "approxkl", "ratio", "ratio_sq", "ratio_max")
    assert [sums[name].item() for name in names] == [0, 0, 0, 2, 2, 1]


@pytest.mark.parametrize(
    "advantage, losses, slopes, low, high",
    [
        # A good token. Ratio inside the clip; above it, no gradient; below it, not clipped.
        (2.0, [-2.2, -2.56, -1.0], [-2.2, 0.0, -1.0], 0, 1),
        # A bad token. Ratio inside the clip; above it, not clipped; below it, no gradient.
        (-2.0, [2.2, 3.0, 1.6], [2.2, 3.0, 0.0], 1, 0),
    ],
)
def test_policy_loss_of_three_tokens_by_hand(
    advantage: float, losses: list[float], slopes: list[float], low: int, high: int
) -> None:
    logp = t([1.1, 1.5, 0.5]).log().requires_grad_()  # the ratios, of which 0.8 to 1.28 count
    loss, sums = policy_loss(
        logp,
        t([0.0, 0.0, 0.0]),
        t([advantage] * 3),
        t([1, 1, 1]),
        rl_node(clip_low=0.2, clip_high=0.28),
    )
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx(losses)
    assert logp.grad[0].tolist() == pytest.approx(slopes)
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (low, high)
    # 1.1 + 1.5 + 0.5, 1.21 + 2.25 + 0.25, (0.095310^2 + 0.405465^2 + 0.693147^2) / 2
    assert [sums[name].item() for name in ("ratio", "ratio_sq", "ratio_max")] == pytest.approx(
        [3.1, 3.71, 1.5]
    )
    assert sums["approxkl"].item() == pytest.approx(0.326970, abs=1e-6)


@pytest.mark.parametrize("ratio, advantage, low, high", [(1.25, 2.0, 0, 1), (0.75, -2.0, 1, 0)])
def test_each_side_has_its_own_clip(ratio: float, advantage: float, low: int, high: int) -> None:
    def clipped(clip_low: float, clip_high: float) -> tuple[float, float]:
        _, sums = policy_loss(
            t([math.log(ratio)]),
            t([0.0]),
            t([advantage]),
            t([1]),
            rl_node(clip_low=clip_low, clip_high=clip_high),
        )
        return sums["clipfrac_low"].item(), sums["clipfrac_high"].item()

    assert clipped(0.2, 0.2) == (low, high)
    assert clipped(0.2, 0.28) == (low, 0)
    assert clipped(0.3, 0.2) == (0, high)
    assert clipped(0.3, 0.28) == (0, 0)


def test_the_gradient_is_zero_where_the_clip_is_active_and_only_there() -> None:
    generator = torch.Generator().manual_seed(12)
    old, advantages = normal(generator, 20, 20), normal(generator, 20, 20)
    logp = (old + normal(generator, 20, 20, scale=0.5)).requires_grad_()
    loss, sums = policy_loss(
        logp, old, advantages, torch.ones_like(old), rl_node(clip_low=0.2, clip_high=0.28)
    )
    loss.sum().backward()
    ratio = (logp - old).exp().detach()
    above, below = (ratio > 1.28) & (advantages > 0), (ratio < 0.8) & (advantages < 0)
    assert torch.equal(logp.grad == 0, above | below)
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (
        int(below.sum()),
        int(above.sum()),
    )
    assert above.any() and below.any()


def test_policy_loss_gradient_is_the_numerical_one() -> None:
    generator = torch.Generator().manual_seed(7)
    old, advantages, mask = (
        normal(generator, 3, 4),
        normal(generator, 3, 4),
        t([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]),
    )
    logp = (old + normal(generator, 3, 4, scale=0.5)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, rl_node(clip_low=0.2, clip_high=0.3))[0],
        (logp,),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_and_without_a_clip_the_gradient_is_that_of_reinforce(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, advantages, logits = (
        prefix_mask(generator, b, r),
        normal(generator, b, r),
        normal(generator, b, r, 5).requires_grad_(),
    )
    targets = torch.randint(0, 5, (b, r, 1), generator=generator)
    logp = logits.log_softmax(-1).gather(-1, targets)[..., 0]
    loss, sums = policy_loss(
        logp, logp.detach(), advantages, mask, rl_node(clip_low=1e9, clip_high=1e9)
    )
    (found,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * mask * logp).sum(), logits)
    assert torch.allclose(found, reinforce, atol=1e-14)
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (0, 0)


@pytest.mark.parametrize("gap", [50.0, 1e4, -50.0, -1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_huge_ratio_stays_finite(gap: float, advantage: float) -> None:
    logp = torch.tensor([[gap]], requires_grad=True)  # float32, as in training
    loss, sums = policy_loss(
        logp,
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.ones(1, 1),
        rl_node(clip_low=0.2, clip_high=0.3),
    )
    loss.sum().backward()
    assert all(torch.isfinite(x).all() for x in (loss, logp.grad, *sums.values()))
    if gap * advantage > 0:  # the clip decides
        assert (
            loss.item() == pytest.approx(-advantage * (1.3 if gap > 0 else 0.8))
            and logp.grad.item() == 0
        )


def test_padding_does_not_change_policy_loss_whatever_stands_there() -> None:
    old, advantages, mask = t([-1.0, -2.0]), t([1.0, -1.0]), t([1, 1])
    logp = t([-1.1, -1.7])
    plain, plain_sums = policy_loss(
        logp, old, advantages, mask, rl_node(clip_low=0.2, clip_high=0.3)
    )
    rubbish = t([-300.0, 55.0])
    wide, wide_sums = policy_loss(
        torch.cat([logp, rubbish], 1),
        torch.cat([old, -rubbish], 1),
        torch.cat([advantages, rubbish], 1),
        t([1, 1, 0, 0]),
        rl_node(clip_low=0.2, clip_high=0.3),
    )
    assert torch.equal(wide[:, :2], plain) and (wide[:, 2:] == 0).all()
    assert {key: x.item() for key, x in wide_sums.items()} == {
        key: x.item() for key, x in plain_sums.items()
    }


def test_policy_loss_of_masked_rows_is_zero_without_gradient() -> None:
    logp = t([-1.0, -2.0]).requires_grad_()
    loss, sums = policy_loss(
        logp, t([-3.0, -1.0]), t([1.0, 1.0]), t([0, 0]), rl_node(clip_low=0.2, clip_high=0.2)
    )
    loss.sum().backward()
    assert (loss == 0).all() and (logp.grad == 0).all()
    assert all(x.item() == 0 for x in sums.values())


# --------------------------------------------------------------------------------------- value_loss


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_and_its_gradient_equal_loops(seed: int, clip: float | None) -> None:
    generator, b, r = shape_of(seed)
    mask, old, returns = (
        prefix_mask(generator, b, r),
        normal(generator, b, r),
        normal(generator, b, r),
    )
    values = (old + normal(generator, b, r, scale=0.4)).requires_grad_()
    loss, count = value_loss(values, old, returns, mask, clip)
    loss.sum().backward()
    clipped_tokens = 0
    for i in range(b):
        for j in range(r):
            v, v_old, g = values[i, j].item(), old[i, j].item(), returns[i, j].item()
            clipped = v if clip is None else min(max(v, v_old - clip), v_old + clip)
            plain_error, clipped_error = (v - g) ** 2, (clipped - g) ** 2
            slope = v - g if plain_error >= clipped_error else 0.0
            assert loss[i, j].item() == pytest.approx(
                0.5 * max(plain_error, clipped_error) * mask[i, j].item(), abs=1e-12
            )
            assert values.grad[i, j].item() == pytest.approx(slope * mask[i, j].item(), abs=1e-12)
            clipped_tokens += clipped_error > plain_error and mask[i, j] > 0
    assert loss.shape == mask.shape and (loss >= 0).all()
    assert count.item() == clipped_tokens and not count.requires_grad


def test_the_value_clip_counts_no_rounding() -> None:
    values, old = torch.rand(4, 500, generator=torch.Generator().manual_seed(1)), torch.rand(4, 500)
    assert value_loss(values, old, torch.rand(4, 500), torch.ones(4, 500), 5.0)[1] == 0


def test_value_loss_by_hand() -> None:
    # Inside the clip: 0.5 (1.1 - 2)^2 = 0.405.
    # Moved 1 towards the return, of which 0.2 count: 0.5 (1.2 - 2)^2 = 0.32 > 0.
    # Moved 1 away from it: 0.5 (0 - 2)^2 = 2, the clip does not help.
    values, old, returns, mask = (
        t([1.1, 2.0, 0.0, 50.0]),
        t([1.0, 1.0, 1.0, 1.0]),
        t([2.0, 2.0, 2.0, 2.0]),
        t([1, 1, 1, 0]),
    )
    loss, clipped = value_loss(values, old, returns, mask, 0.2)
    assert loss[0].tolist() == pytest.approx([0.405, 0.32, 2.0, 0.0])
    assert clipped.item() == 1
    loss, clipped = value_loss(values, old, returns, mask, None)
    assert loss[0].tolist() == pytest.approx([0.405, 0.0, 2.0, 0.0])
    assert clipped.item() == 0


def test_a_clip_that_never_acts_is_none_and_a_clip_lowers_no_loss() -> None:
    generator = torch.Generator().manual_seed(13)
    values, old, returns, mask = (
        *(normal(generator, 5, 6) for _ in range(3)),
        prefix_mask(generator, 5, 6),
    )
    plain, _ = value_loss(values, old, returns, mask, None)
    assert torch.equal(value_loss(values, old, returns, mask, 100.0)[0], plain)
    assert (value_loss(values, old, returns, mask, 0.1)[0] >= plain).all()


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_gradient_is_the_numerical_one(clip: float | None) -> None:
    generator = torch.Generator().manual_seed(8)
    old, returns, mask = (
        normal(generator, 2, 4),
        normal(generator, 2, 4),
        t([1, 1, 1, 1], [1, 1, 0, 0]),
    )
    values = (old + normal(generator, 2, 4, scale=0.5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, mask, clip)[0], (values,))


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_of_masked_rows_is_zero(clip: float | None) -> None:
    loss, clipped = value_loss(t([3.0]), t([0.0]), t([9.0]), t([0]), clip)
    assert loss.item() == 0 and clipped.item() == 0


# ---------------------------------------------------------------------------------- sums and splits

STEP = ("mask", "logp", "old_logp", "advantages", "values", "old_values", "returns")


def random_step(seed: int) -> dict[str, Tensor]:
    """Seven answers, of which some have no token, as one optimizer step sees them."""
    generator = torch.Generator().manual_seed(seed)
    x = {name: normal(generator, 7, 5) for name in STEP} | {"mask": prefix_mask(generator, 7, 5)}
    return x | {
        "logp": x["old_logp"] + 0.4 * x["logp"],
        "values": x["old_values"] + 0.4 * x["values"],
    }


def losses_of(
    x: dict[str, Tensor], over: LossAggregation, tokens: float, sequences: int, longest: int
) -> tuple[list[float], Tensor, Tensor]:
    """The weighted losses of actor and critic on some rows; their gradients for logp, values."""
    logp, values = x["logp"].clone().requires_grad_(), x["values"].clone().requires_grad_()
    weights = token_weights(x["mask"], over, tokens, sequences, longest)
    policy = (
        weights
        * policy_loss(
            logp, x["old_logp"], x["advantages"], x["mask"], rl_node(clip_low=0.2, clip_high=0.28)
        )[0]
    ).sum()
    value = (weights * value_loss(values, x["old_values"], x["returns"], x["mask"], 0.2)[0]).sum()
    (policy + value).backward()
    return [policy.item(), value.item()], logp.grad, values.grad


@pytest.mark.parametrize("over", LossAggregation)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_losses_of_a_step_equal_loops(seed: int, over: LossAggregation) -> None:
    x = random_step(seed)
    weights, mask = weights_by_loop(x["mask"], over, 8), x["mask"]
    policy = value = 0.0
    for i in range(7):
        for j in range(5):
            new, old, advantage, v, v_old, g = (x[name][i, j].item() for name in STEP[1:])
            policy += weights[i][j] * policy_loss_by_token(new, old, advantage, 0.2, 0.28)[0]
            value += (
                weights[i][j]
                * 0.5
                * max((v - g) ** 2, (min(max(v, v_old - 0.2), v_old + 0.2) - g) ** 2)
            )
    losses, _, _ = losses_of(x, over, float(mask.sum()), 7, 8)
    assert losses == pytest.approx([policy, value], abs=1e-12)


@pytest.mark.parametrize("over", LossAggregation)
@pytest.mark.parametrize("seed", SEEDS)
def test_neither_micro_batches_nor_order_nor_padding_change_the_losses_of_a_step(
    seed: int, over: LossAggregation
) -> None:
    x = random_step(seed)
    step = (over, float(x["mask"].sum()), 7, 8)
    losses, of_logp, of_values = losses_of(x, *step)
    generator = torch.Generator().manual_seed(100 + seed)
    for size in (1, 2, 3, 7):
        total = [0.0, 0.0]
        for rows in torch.randperm(7, generator=generator).split(size):
            extra = int(torch.randint(0, 4, (1,), generator=generator))
            rubbish = {name: normal(generator, len(rows), extra, scale=100) for name in STEP} | {
                "mask": torch.zeros(len(rows), extra)
            }
            wide = {name: torch.cat([x[name][rows], rubbish[name].to(F64)], 1) for name in STEP}
            part, part_of_logp, part_of_values = losses_of(wide, *step)
            total = [a + b for a, b in zip(total, part)]
            assert (
                torch.allclose(part_of_logp[:, :5], of_logp[rows], atol=1e-15)
                and (part_of_logp[:, 5:] == 0).all()
            )
            assert (
                torch.allclose(part_of_values[:, :5], of_values[rows], atol=1e-15)
                and (part_of_values[:, 5:] == 0).all()
            )
        assert total == pytest.approx(losses, abs=1e-12)


def test_sums_over_pairs_add_up_so_that_micro_batches_change_nothing() -> None:
    generator = torch.Generator().manual_seed(9)
    chosen, rejected = normal(generator, 6, 5), normal(generator, 6, 5)
    starts, ends = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 5, 4, 4, 5, 3])
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    for loss in (
        lambda part: pairwise_loss(chosen[part, 0], rejected[part, 0]),
        lambda part: pairwise_loss_per_token(
            chosen[part], rejected[part], starts[part], ends[part]
        ),
    ):
        assert sum(loss(part).item() for part in cuts) == pytest.approx(
            loss(slice(0, 6)).item(), rel=1e-6
        )


# --------------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_repetition_equals_loops(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        0,
        2 + seed // 2,
        (int(torch.randint(5, 40, (1,), generator=generator)),),
        generator=generator,
    ).tolist()
    places = range(len(ids) - n + 1)
    stood_before = sum(any(ids[i : i + n] == ids[j : j + n] for j in range(i)) for i in places)
    assert repetition(ids, n) == pytest.approx(stood_before / len(places), abs=1e-12)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 1, 2, 3], 3) == 0.25  # 123, 231, 312, 123: three of four differ
    assert repetition([1, 2, 3, 1, 2, 3]) == 0.25  # trigrams unless told otherwise
    assert repetition([1, 2, 3, 4, 5, 6], 3) == 0.0
    assert repetition([1, 2, 1, 2, 1], 1) == pytest.approx(0.6)
    assert repetition([7] * 102, 3) == 0.99  # a loop: one of a hundred


def test_an_answer_shorter_than_an_n_gram_repeats_nothing() -> None:
    assert [repetition(ids, 3) for ids in ([], [1], [1, 1], [1, 1, 1])] == [0.0] * 4


# ------------------------------------------------------------------------------- explained_variance


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_explained_variance_equals_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask, returns = prefix_mask(generator, 4, 5), normal(generator, 4, 5)
    values = returns + normal(generator, 4, 5, scale=0.5)
    g, v = masked(returns, mask), masked(values, mask)

    def variance(x: list[float]) -> float:
        return sum((y - sum(x) / len(x)) ** 2 for y in x) / len(x)

    expected = 1 - variance([a - b for a, b in zip(g, v)]) / variance(g)
    assert explained_variance(values, returns, mask) == pytest.approx(expected)


def test_explained_variance_of_known_values() -> None:
    returns, mask = t([1.0, 2.0, 3.0, 77.0]), t([1, 1, 1, 0])
    assert explained_variance(returns, returns, mask) == 1.0
    assert (
        explained_variance(returns + 5, returns, mask) == 1.0
    )  # a constant error is not a variance
    assert explained_variance(t([4.0, 4.0, 4.0, 4.0]), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(
        -3.0
    )  # 1 - Var(2 G) / Var(G)
    assert math.isnan(explained_variance(returns, t([1.0, 1.0, 1.0, 9.0]), mask))
    assert math.isnan(explained_variance(t([2.0]), t([1.0]), t([1])))


# ------------------------------------------------------------------------------------ learning_rate


def rates(
    total: int,
    lr: float,
    schedule: str,
    final: float = 0.0,
    ratio: float = 0.0,
    steps: int | None = None,
) -> list[float]:
    """The rate of each step of a run."""
    optim = dataclasses.replace(
        composed().sft,
        lr=lr,
        schedule=Schedule[schedule],
        warmup_ratio=ratio,
        warmup_steps=steps,
        final_lr=final,
    )
    return [learning_rate(step, total, optim) for step in range(total)]


@pytest.mark.parametrize("warmup", [{"ratio": 0.2}, {"ratio": 0.9, "steps": 2}])
def test_learning_rate_by_hand(warmup: dict) -> None:
    # two steps of warm-up, then seven equal steps down from 2.0 to 0.2
    assert rates(10, 2.0, "constant", 0.1, **warmup) == pytest.approx([1.0] + [2.0] * 9)
    down = [2.0 - 1.8 * k / 7 for k in range(8)]
    assert rates(10, 2.0, "linear", 0.1, **warmup) == pytest.approx([1.0, 2.0, *down])
    cosine = [0.2 + 0.9 * (1 + math.cos(math.pi * k / 7)) for k in range(8)]
    found = rates(10, 2.0, "cosine", 0.1, **warmup)
    assert found == pytest.approx([1.0, 2.0, *cosine])
    assert [round(x, 3) for x in found] == [
        1.0,
        2.0,
        2.0,
        1.911,
        1.661,
        1.3,
        0.9,
        0.539,
        0.289,
        0.2,
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "total, ratio, steps",
    [
        (2, 0.0, None),
        (3, 0.3, None),
        (10, 0.0, None),
        (10, 0.05, None),
        (100, 0.1, None),
        (1000, 0.5, None),
    ]
    + [(2, 0.5, 0), (10, 0.5, 0), (10, 0.0, 3), (10, 1.0, 8), (100, 0.0, 1), (50, 0.1, 48)],
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_rate_and_the_first_is_not_zero(
    schedule: str, total: int, ratio: float, steps: int | None, final: float
) -> None:
    found = rates(total, 3e-4, schedule, final, ratio, steps)
    assert found[-1] == pytest.approx(final * 3e-4, abs=1e-18)
    assert found[0] > 0 and max(found) == pytest.approx(3e-4)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates(20, 1.0, "constant", ratio=0.25)[:6] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    )
    assert rates(20, 1.0, "constant")[0] == 1.0
    assert rates(30, 1.0, "constant", ratio=0.05)[:3] == pytest.approx(
        [0.5, 1.0, 1.0]
    )  # one and a half steps are two


def test_steps_of_warm_up_override_the_ratio() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(20, 1.0, schedule, 0.1, ratio=0.9, steps=5) == rates(
            20, 1.0, schedule, 0.1, ratio=0.25
        )
        assert rates(20, 1.0, schedule, 0.1, ratio=0.9, steps=0) == rates(
            20, 1.0, schedule, 0.1
        )  # 0 is a number, not "unset"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_goes_on_to_its_end(schedule: str) -> None:
    assert rates(4, 1.0, schedule, 0.1, steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (
        rates(4, 1.0, schedule, 0.1, steps=4)
        == rates(4, 1.0, schedule, 0.1, ratio=1.0)
        == pytest.approx([0.25, 0.5, 0.75, 1.0])
    )
    assert rates(1, 1.0, schedule, 0.1, steps=3) == pytest.approx([1 / 3])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total, steps", [(1, 0), (2, 1), (10, 9)])
def test_a_run_without_room_for_a_decay_still_has_rates(
    schedule: str, total: int, steps: int
) -> None:
    assert all(0 < x <= 1 for x in rates(total, 1.0, schedule, 0.1, steps=steps))
