"""The clipped policy loss and its gradient, against plain loops and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import SEEDS, normal, policy_loss_by_token, prefix_mask, shape_of, t
from helpers import rl_node

from rlhf.rl.losses import policy_loss


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
