"""The formulas, each against a second one written as plain loops over Python floats, and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf import objectives as o

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


# ------------------------------------------------------------------------------------------------------------------- token_logp


@pytest.mark.parametrize("seed", SEEDS)
def test_token_logp_and_entropy_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    v = 2 + seed
    logits, targets = normal(generator, b, r, v, scale=3), torch.randint(0, v, (b, r), generator=generator)
    logp, entropy = o.token_logp(logits, targets)
    for i in range(b):
        for j in range(r):
            weights = [math.exp(x) for x in logits[i, j].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logp[i, j].item() == pytest.approx(math.log(p[targets[i, j]]), abs=1e-5)
            assert entropy[i, j].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)


def test_token_logp_by_hand() -> None:
    # weights 1, 2, 1 of 4: probabilities 1/4, 1/2, 1/4
    logp, entropy = o.token_logp(torch.tensor([[[0.0, math.log(2), 0.0]]]), torch.tensor([[1]]))
    assert logp.item() == pytest.approx(-0.693147, abs=1e-6)
    assert entropy.item() == pytest.approx(1.039721, abs=1e-6)  # 1.5 log 2
    _, uniform = o.token_logp(torch.zeros(1, 1, 8), torch.tensor([[3]]))
    assert uniform.item() == pytest.approx(math.log(8), abs=1e-6)


def test_token_logp_is_float32_and_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=torch.bfloat16)
    logp, entropy = o.token_logp(logits, torch.tensor([[0]]))
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.item() == 0.0 and entropy.item() == 0.0


def test_probabilities_of_all_targets_sum_to_one() -> None:
    logits = normal(torch.Generator().manual_seed(1), 1, 1, 11).expand(1, 11, 11)
    logp, _ = o.token_logp(logits, torch.arange(11)[None])
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------- pairwise_loss


@pytest.mark.parametrize("seed", SEEDS)
def test_pairwise_loss_equals_a_loop(seed: int) -> None:
    generator, b, _ = shape_of(seed)
    chosen, rejected = normal(generator, b, scale=3), normal(generator, b, scale=3)
    expected = sum(math.log(1 + math.exp(r - c)) for c, r in zip(chosen.tolist(), rejected.tolist()))
    assert o.pairwise_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-5)


def test_an_identical_pair_costs_log_2() -> None:
    score = torch.tensor([0.7, -40.0])
    assert o.pairwise_loss(score, score).item() == pytest.approx(2 * 0.693147, abs=1e-5)


def test_swapping_a_pair_mirrors_loss_and_gradient() -> None:
    a = torch.tensor([1.5, -0.2], requires_grad=True)
    b = torch.tensor([0.5, 0.4], requires_grad=True)
    # -log sigmoid(x) and -log sigmoid(-x) differ by x
    assert (o.pairwise_loss(b, a) - o.pairwise_loss(a, b)).item() == pytest.approx((1.5 - 0.5) + (-0.2 - 0.4), abs=1e-6)
    to_a, to_b = torch.autograd.grad(o.pairwise_loss(a, b), (a, b))
    assert torch.allclose(to_a, -to_b)
    assert to_a[0].item() == pytest.approx(-1 / (1 + math.exp(1.0)), abs=1e-6)  # -sigmoid(-margin)


def test_pairwise_loss_is_finite_for_a_hopeless_pair() -> None:
    assert o.pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000.0)


# ------------------------------------------------------------------------------------------------------------------------ kl_k3


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_k3_equals_a_loop_and_is_never_negative(seed: int) -> None:
    generator, b, r = shape_of(seed)
    logp, ref = normal(generator, b, r), normal(generator, b, r)
    k3 = o.kl_k3(logp, ref)
    for i in range(b):
        for j in range(r):
            quotient = math.exp(ref[i, j].item()) / math.exp(logp[i, j].item())  # q / p
            assert k3[i, j].item() == pytest.approx(quotient - 1 - math.log(quotient), rel=1e-9)
    assert (k3 >= 0).all()
    assert (o.kl_k3(logp, logp) == 0).all()


def test_kl_k3_by_hand() -> None:
    # p = 1/2, q = 1/4: q/p - 1 - log(q/p) = -1/2 + log 2
    assert o.kl_k3(t([math.log(0.5)]), t([math.log(0.25)])).item() == pytest.approx(0.193147, abs=1e-6)


def test_kl_k3_is_an_unbiased_estimate_of_the_kl() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64), torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=F64)
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    assert (p * o.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(exact, abs=1e-12)  # its expectation under p
    draws = torch.multinomial(p, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    k3 = o.kl_k3(p.log()[draws], q.log()[draws])
    assert abs(k3.mean().item() - exact) < 4 * k3.std().item() / math.sqrt(len(draws))


# ---------------------------------------------------------------------------------------------------------------- token_rewards


@pytest.mark.parametrize("seed", SEEDS)
def test_token_rewards_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, score = prefix_mask(generator, b, r), normal(generator, b)
    logp, ref = normal(generator, b, r), normal(generator, b, r)
    rewards = o.token_rewards(score, logp, ref, mask, 0.05)
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
    # an answer that stops in the middle, one that fills all places without EOS, one that is a single token
    mask = t([1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0])
    logp = t([-1.0, -2.0, -9.0, -9.0], [-1.0, -1.0, -1.0, -1.0], [-0.5, -9.0, -9.0, -9.0])
    ref = t([-1.5, -1.0, -3.0, -3.0], [-1.0, -2.0, -1.0, -0.5], [-0.7, -3.0, -3.0, -3.0])
    rewards = o.token_rewards(torch.tensor([3.0, -2.0, 1.0], dtype=F64), logp, ref, mask, 0.1)
    # -0.1 * (-1 + 1.5) = -0.05;  -0.1 * (-2 + 1) + 3 = 3.1;  nothing behind EOS, whatever the padding's log-probabilities
    expected = t([-0.05, 3.1, 0.0, 0.0], [0.0, -0.1, 0.0, 0.05 - 2.0], [-0.02 + 1.0, 0.0, 0.0, 0.0])
    assert torch.allclose(rewards, expected, atol=1e-12)


def test_an_empty_answer_gets_no_reward() -> None:
    rewards = o.token_rewards(torch.tensor([5.0]), torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), 0.1)
    assert (rewards == 0).all()


def test_rewards_of_a_row_sum_to_score_minus_its_kl() -> None:
    generator = torch.Generator().manual_seed(3)
    logp, ref, score = normal(generator, 4, 5), normal(generator, 4, 5), normal(generator, 4)
    mask = t([1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0])
    rewards = o.token_rewards(score, logp, ref, mask, 0.2)
    assert torch.allclose(rewards.sum(1), score - 0.2 * ((logp - ref) * mask).sum(1))


# -------------------------------------------------------------------------------------------------------------------------- gae


def gae_as_double_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, for one row without padding (Schulman 2016, eq. 16)."""
    n = len(rewards)
    delta = [rewards[k] + gamma * (values[k + 1] if k + 1 < n else 0.0) - values[k] for k in range(n)]
    return [sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, n)) for i in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_equals_the_double_sum(seed: int, gamma: float, lam: float) -> None:
    generator, b, r = shape_of(seed)
    mask = prefix_mask(generator, b, r)
    rewards, values = normal(generator, b, r) * mask, normal(generator, b, r)  # the critic has values on padding too
    advantages, returns = o.gae(rewards, values, mask, gamma, lam)
    for i in range(b):
        n = int(mask[i].sum())
        expected = gae_as_double_sum(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i].tolist() == pytest.approx(expected + [0.0] * (r - n), abs=1e-12)
        assert returns[i].tolist() == pytest.approx([a + v for a, v in zip(expected, values[i, :n].tolist())] + [0.0] * (r - n), abs=1e-12)


def test_gae_of_three_tokens_by_hand() -> None:
    rewards, values, mask = t([0.0, 0.0, 1.0]), t([0.5, 0.4, 0.3]), torch.ones(1, 3, dtype=F64)
    # delta = 0.4 - 0.5, 0.3 - 0.4, 1 - 0.3;  A3 = 0.7,  A2 = -0.1 + 0.95 * 0.7,  A1 = -0.1 + 0.95 * 0.565
    advantages, returns = o.gae(rewards, values, mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.43675, 0.565, 0.7], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.93675, 0.965, 1.0], abs=1e-12)
    # delta = 0.36 - 0.5, 0.27 - 0.4, 0.7;  A2 = -0.13 + 0.855 * 0.7,  A1 = -0.14 + 0.855 * 0.4685
    advantages, _ = o.gae(rewards, values, mask, 0.9, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.2605675, 0.4685, 0.7], abs=1e-12)


def test_reward_of_the_last_token_reaches_the_first_and_not_one_place_further() -> None:
    # EOS is the second token: its reward counts in full, the value behind it counts as 0
    rewards = o.token_rewards(torch.tensor([2.0], dtype=F64), t([-1.0, -1.0, -5.0]), t([-1.0, -1.0, 0.0]), t([1, 1, 0]), 0.1)
    advantages, returns = o.gae(rewards, t([0.5, 1.0, 77.0]), t([1, 1, 0]), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.5 + 0.95 * 1.0, 1.0, 0.0])
    assert returns[0].tolist() == pytest.approx([0.5 + 0.5 + 0.95, 2.0, 0.0])


def test_with_gamma_and_lambda_1_returns_are_the_rewards_to_come() -> None:
    generator, b, r = shape_of(4)
    mask = prefix_mask(generator, b, r)
    rewards, values = normal(generator, b, r) * mask, normal(generator, b, r)
    advantages, returns = o.gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_come)
    assert torch.allclose(advantages, (to_come - values) * mask)


def test_padding_does_not_change_gae() -> None:
    generator = torch.Generator().manual_seed(5)
    rewards, values, mask = normal(generator, 2, 4), normal(generator, 2, 4), t([1, 1, 1, 1], [1, 1, 1, 0])
    rewards = rewards * mask
    pad = normal(generator, 2, 3, scale=100)
    wide = o.gae(torch.cat([rewards, 0 * pad], 1), torch.cat([values, pad], 1), torch.cat([mask, 0 * pad], 1), 0.9, 0.8)
    for padded, plain in zip(wide, o.gae(rewards, values, mask, 0.9, 0.8)):
        assert torch.equal(padded[:, :4], plain)
        assert (padded[:, 4:] == 0).all()


# --------------------------------------------------------------------------------------------------------- masked_mean and whiten


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_mean_equals_a_loop(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, x = prefix_mask(generator, b, r), normal(generator, b, r)
    chosen = masked(x, mask)
    assert o.masked_mean(x, mask).item() == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


def test_masked_mean_by_hand_and_of_nothing() -> None:
    assert o.masked_mean(t([1.0, 2.0, 100.0], [6.0, 100.0, 100.0]), t([1, 1, 0], [1, 0, 0])).item() == 3.0
    assert o.masked_mean(t([1.0, 2.0]), t([0, 0])).item() == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_equals_a_loop(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, x = prefix_mask(generator, b, r), normal(generator, b, r, scale=5) + 3
    white = o.whiten(x, mask)
    chosen = masked(x, mask)
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((c - mean) ** 2 for c in chosen) / len(chosen) + 1e-8)
    assert masked(white, mask) == pytest.approx([(c - mean) / std for c in chosen], abs=1e-9)
    assert (white * (1 - mask) == 0).all()


def test_whitened_values_have_mean_0_and_biased_variance_1() -> None:
    white = o.whiten(t([1.0, 2.0, 99.0], [3.0, 6.0, 99.0]), t([1, 1, 0], [1, 1, 0]))
    # 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    assert masked(white, t([1, 1, 0], [1, 1, 0])) == pytest.approx([-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 3 / 3.5**0.5], abs=1e-6)


def test_whitening_is_over_the_batch_and_not_over_each_row() -> None:
    white = o.whiten(t([0.0, 0.0], [1.0, 1.0]), torch.ones(2, 2, dtype=F64))
    assert white[0].tolist() == pytest.approx([-1.0, -1.0], abs=1e-6) and white[1].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_whiten_of_one_token_of_equal_tokens_and_of_none_is_zero() -> None:
    assert o.whiten(t([4.0]), t([1])).item() == 0.0
    assert (o.whiten(t([4.0, 4.0, 9.0]), t([1, 1, 0])) == 0).all()
    assert (o.whiten(t([4.0, 5.0]), t([0, 0])) == 0).all()


# ------------------------------------------------------------------------------------------------------------------ policy_loss


def policy_loss_by_token(logp: float, old: float, advantage: float, clip: float) -> tuple[float, float]:
    """Loss of one token and its derivative with respect to log pi."""
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    if -advantage * ratio >= -advantage * clipped:
        return -advantage * ratio, -advantage * ratio
    return -advantage * clipped, 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_and_its_gradient_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, advantages, old = prefix_mask(generator, b, r), normal(generator, b, r), normal(generator, b, r) - 2
    logp = (old + normal(generator, b, r, scale=0.4)).requires_grad_()
    loss, sums = o.policy_loss(logp, old, advantages, mask, 0.2)
    loss.backward()
    total, counts, ratios, kl = 0.0, 0, [], 0.0
    for i in range(b):
        for j in range(r):
            part, slope = policy_loss_by_token(logp[i, j].item(), old[i, j].item(), advantages[i, j].item(), 0.2)
            assert logp.grad[i, j].item() == pytest.approx(slope * mask[i, j].item(), abs=1e-12)
            if mask[i, j] > 0:
                total += part
                counts += slope == 0.0
                ratios.append(math.exp(logp[i, j].item() - old[i, j].item()))
                kl += 0.5 * (logp[i, j].item() - old[i, j].item()) ** 2
    assert loss.item() == pytest.approx(total, abs=1e-10)
    assert sums["clipfrac"].item() == counts
    assert sums["approxkl"].item() == pytest.approx(kl)
    assert sums["ratio"].item() == pytest.approx(sum(ratios))
    assert sums["ratio_sq"].item() == pytest.approx(sum(x * x for x in ratios))
    assert sums["ratio_max"].item() == pytest.approx(max(ratios))


def test_at_ratio_1_the_loss_is_minus_the_advantages_and_so_is_its_gradient() -> None:
    old = t([-1.0, -2.0, -3.0])
    advantages, mask = t([0.5, -1.5, 7.0]), t([1, 1, 0])
    logp = old.clone().requires_grad_()
    loss, sums = o.policy_loss(logp, old, advantages, mask, 0.2)
    loss.backward()
    assert loss.item() == 1.0  # -(0.5 - 1.5)
    assert logp.grad[0].tolist() == [-0.5, 1.5, 0.0]
    assert [sums[key].item() for key in ("clipfrac", "approxkl", "ratio", "ratio_sq", "ratio_max")] == [0, 0, 2, 2, 1]


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, clipped",
    [
        (1.5, 2.0, -2.4, 0.0, 1),  # more likely than the clip rewards: no more push
        (1.5, -2.0, 3.0, 3.0, 0),  # a bad token became likelier: push it down, unclipped
        (0.5, 2.0, -1.0, -1.0, 0),  # a good token became rarer: push it up, unclipped
        (0.5, -2.0, 1.6, 0.0, 1),  # rarer than the clip rewards: no more push
        (1.1, 2.0, -2.2, -2.2, 0),  # inside the clip
    ],
)
def test_the_clip_acts_on_both_sides(ratio: float, advantage: float, loss: float, slope: float, clipped: int) -> None:
    logp = t([math.log(ratio)]).requires_grad_()
    value, sums = o.policy_loss(logp, t([0.0]), t([advantage]), t([1]), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(slope)
    assert sums["clipfrac"].item() == clipped


def test_policy_loss_gradient_is_the_numerical_one() -> None:
    generator = torch.Generator().manual_seed(7)
    old, advantages, mask = normal(generator, 3, 4), normal(generator, 3, 4), t([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0])
    logp = (old + normal(generator, 3, 4, scale=0.5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: o.policy_loss(x, old, advantages, mask, 0.2)[0], (logp,))


@pytest.mark.parametrize("gap", [50.0, 1e4, -50.0, -1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_huge_ratio_stays_finite(gap: float, advantage: float) -> None:
    logp = torch.tensor([[gap]], requires_grad=True)  # float32, as in training
    loss, sums = o.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, logp.grad, *sums.values()))
    if gap * advantage > 0:  # the clip decides
        assert loss.item() == pytest.approx(-advantage * (1.2 if gap > 0 else 0.8)) and logp.grad.item() == 0


def test_padding_does_not_change_policy_loss_whatever_stands_there() -> None:
    old, advantages, mask = t([-1.0, -2.0]), t([1.0, -1.0]), t([1, 1])
    logp = t([-1.1, -1.7])
    plain, plain_sums = o.policy_loss(logp, old, advantages, mask, 0.2)
    rubbish = t([-300.0, 55.0])
    wide, wide_sums = o.policy_loss(
        torch.cat([logp, rubbish], 1), torch.cat([old, -rubbish], 1), torch.cat([advantages, rubbish], 1), t([1, 1, 0, 0]), 0.2
    )
    assert wide.item() == plain.item()
    assert {key: x.item() for key, x in wide_sums.items()} == {key: x.item() for key, x in plain_sums.items()}


def test_policy_loss_of_masked_rows_is_zero_without_gradient() -> None:
    logp = t([-1.0, -2.0]).requires_grad_()
    loss, _ = o.policy_loss(logp, t([-3.0, -1.0]), t([1.0, 1.0]), t([0, 0]), 0.2)
    loss.backward()
    assert loss.item() == 0 and (logp.grad == 0).all()


# ------------------------------------------------------------------------------------------------------------------- value_loss


@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_and_its_gradient_equal_loops(seed: int) -> None:
    generator, b, r = shape_of(seed)
    mask, old, returns = prefix_mask(generator, b, r), normal(generator, b, r), normal(generator, b, r)
    values = (old + normal(generator, b, r, scale=0.4)).requires_grad_()
    loss, count = o.value_loss(values, old, returns, mask, 0.2)
    loss.backward()
    total, clipped_tokens = 0.0, 0
    for i in range(b):
        for j in range(r):
            v, v_old, g = values[i, j].item(), old[i, j].item(), returns[i, j].item()
            clipped = min(max(v, v_old - 0.2), v_old + 0.2)
            plain_error, clipped_error = (v - g) ** 2, (clipped - g) ** 2
            slope = v - g if plain_error >= clipped_error else 0.0
            assert values.grad[i, j].item() == pytest.approx(slope * mask[i, j].item(), abs=1e-12)
            total += 0.5 * max(plain_error, clipped_error) * mask[i, j].item()
            clipped_tokens += clipped_error > plain_error and mask[i, j] > 0
    assert loss.item() == pytest.approx(total, abs=1e-12) and loss.item() >= 0
    assert count.item() == clipped_tokens


def test_the_value_clip_counts_no_rounding() -> None:
    values, old = torch.rand(4, 500, generator=torch.Generator().manual_seed(1)), torch.rand(4, 500)
    assert o.value_loss(values, old, torch.rand(4, 500), torch.ones(4, 500), 5.0)[1] == 0


def test_value_loss_by_hand() -> None:
    # inside the clip: 0.5 (1.1 - 2)^2 = 0.405.  Moved 1 towards the return, of which 0.2 count: 0.5 (1.2 - 2)^2 = 0.32 > 0.
    # Moved 1 away from it: 0.5 (0 - 2)^2 = 2, the clip does not help.
    loss, clipped = o.value_loss(t([1.1, 2.0, 0.0, 50.0]), t([1.0, 1.0, 1.0, 1.0]), t([2.0, 2.0, 2.0, 2.0]), t([1, 1, 1, 0]), 0.2)
    assert loss.item() == pytest.approx(0.405 + 0.32 + 2.0)
    assert clipped.item() == 1


def test_value_loss_gradient_is_the_numerical_one() -> None:
    generator = torch.Generator().manual_seed(8)
    old, returns, mask = normal(generator, 2, 4), normal(generator, 2, 4), t([1, 1, 1, 1], [1, 1, 0, 0])
    values = (old + normal(generator, 2, 4, scale=0.5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: o.value_loss(x, old, returns, mask, 0.2)[0], (values,))


def test_value_loss_of_masked_rows_is_zero() -> None:
    loss, clipped = o.value_loss(t([3.0]), t([0.0]), t([9.0]), t([0]), 0.2)
    assert loss.item() == 0 and clipped.item() == 0


# --------------------------------------------------------------------------------------------------------------- sums and splits


def test_sums_over_rows_add_up_so_that_micro_batches_change_nothing() -> None:
    generator = torch.Generator().manual_seed(9)
    mask = prefix_mask(generator, 6, 5)
    old, advantages, returns = (normal(generator, 6, 5) for _ in range(3))
    new = old + normal(generator, 6, 5, scale=0.3)
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    for loss in (
        lambda part: o.policy_loss(new[part], old[part], advantages[part], mask[part], 0.2)[0],
        lambda part: o.value_loss(new[part], old[part], returns[part], mask[part], 0.2)[0],
        lambda part: o.pairwise_loss(new[part, 0], old[part, 0]),
    ):
        assert sum(loss(part).item() for part in cuts) == pytest.approx(loss(slice(0, 6)).item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- explained_variance


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_explained_variance_equals_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask, returns = prefix_mask(generator, 4, 5), normal(generator, 4, 5)
    values = returns + normal(generator, 4, 5, scale=0.5)
    g, v = masked(returns, mask), masked(values, mask)

    def variance(x: list[float]) -> float:
        return sum((y - sum(x) / len(x)) ** 2 for y in x) / len(x)

    expected = 1 - variance([a - b for a, b in zip(g, v)]) / variance(g)
    assert o.explained_variance(values, returns, mask) == pytest.approx(expected)


def test_explained_variance_of_known_values() -> None:
    returns, mask = t([1.0, 2.0, 3.0, 77.0]), t([1, 1, 1, 0])
    assert o.explained_variance(returns, returns, mask) == 1.0
    assert o.explained_variance(returns + 5, returns, mask) == 1.0  # a constant error is not a variance
    assert o.explained_variance(t([4.0, 4.0, 4.0, 4.0]), returns, mask) == pytest.approx(0.0)
    assert o.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)  # 1 - Var(2 G) / Var(G)
    assert math.isnan(o.explained_variance(returns, t([1.0, 1.0, 1.0, 9.0]), mask))
    assert math.isnan(o.explained_variance(t([2.0]), t([1.0]), t([1])))


# ---------------------------------------------------------------------------------------------------------------- learning_rate


def test_learning_rate_by_hand() -> None:
    def rates(schedule: str, final: float = 0.1) -> list[float]:
        return [o.learning_rate(step, 10, 2.0, 0.2, schedule, final) for step in range(10)]

    # two steps of warm-up, then seven equal steps down from 2.0 to 0.2
    assert rates("constant") == pytest.approx([1.0] + [2.0] * 9)
    down = [2.0 - 1.8 * k / 7 for k in range(8)]
    assert rates("linear") == pytest.approx([1.0, 2.0, *down])
    cosine = [0.2 + 0.9 * (1 + math.cos(math.pi * k / 7)) for k in range(8)]
    assert rates("cosine") == pytest.approx([1.0, 2.0, *cosine])
    assert [round(x, 3) for x in rates("cosine")] == [1.0, 2.0, 2.0, 1.911, 1.661, 1.3, 0.9, 0.539, 0.289, 0.2]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total, warmup", [(2, 0.0), (3, 0.3), (10, 0.0), (10, 0.05), (100, 0.1), (1000, 0.5)])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_rate_and_the_first_is_not_zero(schedule: str, total: int, warmup: float, final: float) -> None:
    rates = [o.learning_rate(step, total, 3e-4, warmup, schedule, final) for step in range(total)]
    assert rates[-1] == pytest.approx(final * 3e-4, abs=1e-18)
    assert rates[0] > 0 and max(rates) == pytest.approx(3e-4)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert [o.learning_rate(step, 20, 1.0, 0.25, "constant", 0.0) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert o.learning_rate(0, 20, 1.0, 0.0, "constant", 0.0) == 1.0
