"""CISPO, the dual clip and sequence importance (GSPO): against loops over Python floats, by hand,
and their gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from formulas import F64, B, R, some_batch, t
from helpers import composed, rl_node

from rlhf.config.choices import Importance, PolicyLoss
from rlhf.config.stage_nodes import Rl
from rlhf.rl.advantages import estimate_advantages
from rlhf.rl.losses import importance_ratio, kl_estimate, policy_loss, token_weights

SEEDS = range(4)


def settings(
    loss: str, importance: str, low: float = 0.2, high: float = 0.28, dual: float | None = None
) -> Rl:
    return rl_node(
        policy_loss=PolicyLoss[loss],
        importance=Importance[importance],
        clip_low=low,
        clip_high=high,
        dual_clip=dual,
    )


def by_loops(
    logprobs: list[list[float]],
    old: list[list[float]],
    advantages: list[list[float]],
    lengths: list[int],
    rl: Rl,
) -> tuple[list[list[float]], list[list[float]], int, int]:
    """Losses, their sum's gradient for log pi, and how many clips are active on each side."""
    losses = [[0.0] * R for _ in lengths]
    slopes = [[0.0] * R for _ in lengths]
    low = high = 0
    for i, n in enumerate(lengths):
        gaps = [logprobs[i][j] - old[i][j] for j in range(n)]
        if rl.importance == Importance.sequence and n:
            gaps = [sum(gaps) / n] * n
        for j in range(n):
            ratio, a = math.exp(gaps[j]), advantages[i][j]
            bounded = min(max(ratio, 1 - rl.clip_low), 1 + rl.clip_high)
            if rl.policy_loss == PolicyLoss.cispo:
                losses[i][j] = -bounded * a * logprobs[i][j]
                slopes[i][j] += -bounded * a
                active = bounded != ratio
            else:
                losses[i][j] = max(-a * ratio, -a * bounded)
                active = -a * bounded > -a * ratio
                if rl.dual_clip is not None and a < 0 and losses[i][j] > -a * rl.dual_clip:
                    losses[i][j], active = -a * rl.dual_clip, True
                slope = 0.0 if active else -a * ratio
                if rl.importance == Importance.sequence:  # shared by all tokens of the response
                    for k in range(n):
                        slopes[i][k] += slope / n
                else:
                    slopes[i][j] += slope
            low += active and ratio < 1
            high += active and ratio > 1
    return losses, slopes, low, high


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss", ["clip", "cispo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_and_gradients_equal_loops(seed: int, loss: str, importance: str) -> None:
    logprobs, old, advantages, mask = some_batch(seed)
    rl = settings(loss, importance, 0.1, 0.15)
    found, sums = policy_loss(logprobs, old, advantages, mask, rl)
    found.sum().backward()
    lengths = [int(n) for n in mask.sum(1)]
    rows = [x.detach().tolist() for x in (logprobs, old, advantages)]
    losses, slopes, low, high = by_loops(*rows, lengths, rl)
    assert torch.allclose(found, t(*losses), atol=1e-12)
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, t(*slopes), atol=1e-12)
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (low, high)
    assert low + high > 0


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_dual_clip_and_its_gradient_equal_loops(seed: int, importance: str) -> None:
    logprobs, old, advantages, mask = some_batch(seed)
    rl = settings("clip", importance, 0.1, 0.15, dual=1.2)
    found, sums = policy_loss(logprobs, old, advantages, mask, rl)
    found.sum().backward()
    rows = [x.detach().tolist() for x in (logprobs, old, advantages)]
    losses, slopes, low, high = by_loops(*rows, [int(n) for n in mask.sum(1)], rl)
    assert torch.allclose(found, t(*losses), atol=1e-12)
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, t(*slopes), atol=1e-12)
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (low, high)
    plain, _ = policy_loss(logprobs, old, advantages, mask, settings("clip", importance, 0.1, 0.15))
    assert ((found < plain) & (advantages < 0) & (mask > 0)).any() and (found <= plain).all()


def test_the_dual_clip_by_hand() -> None:
    # A = -2, c = 3: ratios 2, 2.9 and 5 lose 4, 5.8 and 6 instead of 10; with A = 2 it is PPO's
    logprobs = t([2.0, 2.9, 5.0]).log().requires_grad_()
    zeros, ones = t([0.0, 0.0, 0.0]), t([1, 1, 1])
    rl = settings("clip", "token", dual=3.0)
    loss, sums = policy_loss(logprobs, zeros, t([-2.0, -2.0, -2.0]), ones, rl)
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([4.0, 5.8, 6.0])
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([4.0, 5.8, 0.0])
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (0, 1)
    positive, _ = policy_loss(logprobs, zeros, t([2.0, 2.0, 2.0]), ones, rl)
    assert positive[0].tolist() == pytest.approx([-2.56] * 3)


# ratio, advantage; loss and slope for log pi as each paper defines them, worked out by hand
TABLE = {
    "dapo": [  # min(r A, clip(r, 0.8, 1.28) A)
        (1.0, 1.0, -1.0, -1.0),
        (1.27, 1.0, -1.27, -1.27),
        (1.4, 1.0, -1.28, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.4, -1.0, 1.4, 1.4),
    ],
    "gspo": [  # the same of a response of one token, clip(r, 0.9997, 1.0004)
        (1.0, 2.0, -2.0, -2.0),
        (1.001, 2.0, -2.0008, 0.0),
        (0.999, 2.0, -1.998, -1.998),
        (0.999, -2.0, 1.9994, 0.0),
        (1.001, -2.0, 2.002, 2.002),
    ],
    "cispo": [  # sg(min(r, 1.28)) A log pi, without a lower limit
        (1.0, 1.0, 0.0, -1.0),
        (1.28, 1.0, -1.28 * math.log(1.28), -1.28),
        (2.0, 1.0, -1.28 * math.log(2), -1.28),
        (2.0, -1.0, 1.28 * math.log(2), 1.28),
        (0.25, 1.0, -0.25 * math.log(0.25), -0.25),
    ],
}
CLIPS = {
    "dapo": ("clip", "token", 0.2, 0.28),
    "gspo": ("clip", "sequence", 3e-4, 4e-4),
    "cispo": ("cispo", "token", 1.0, 0.28),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_losses_of_single_tokens_by_hand(name: str) -> None:
    rows = TABLE[name]
    ratios, advantages = t(*([row[0]] for row in rows)), t(*([row[1]] for row in rows))
    logprobs = ratios.log().requires_grad_()
    mask = torch.ones_like(ratios)
    loss, _ = policy_loss(logprobs, 0 * ratios, advantages, mask, settings(*CLIPS[name]))
    loss.sum().backward()
    assert loss[:, 0].tolist() == pytest.approx([row[2] for row in rows])
    assert logprobs.grad is not None
    assert logprobs.grad[:, 0].tolist() == pytest.approx([row[3] for row in rows])


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_that_of_the_preset(name: str) -> None:
    """The clip ranges of gspo are those of its paper; the preset has wider ones for tiny models."""
    rl = composed(f"stage={name}").rl
    assert (rl.policy_loss.name, rl.importance.name) == CLIPS[name][:2]
    if name != "gspo":
        assert (rl.clip_low, rl.clip_high) == CLIPS[name][2:]


def test_cispo_of_three_tokens_by_hand() -> None:
    # ratios 1.1, 1.5 and 0.5, of which 0.8 to 1.28 count; -1.1 x 2 x log 1.1, and so on
    logprobs = t([1.1, 1.5, 0.5]).log().requires_grad_()
    zeros, twos, ones = t([0.0, 0.0, 0.0]), t([2.0, 2.0, 2.0]), t([1, 1, 1])
    loss, sums = policy_loss(logprobs, zeros, twos, ones, settings("cispo", "token"))
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([-0.209682, -1.037991, 1.109035], abs=1e-6)
    assert logprobs.grad is not None  # clipped tokens have a gradient too
    assert logprobs.grad[0].tolist() == pytest.approx([-2.2, -2.56, -1.6])
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (1, 1)


def test_cispo_at_ratio_1_is_reinforce() -> None:
    old = t([-1.0, -2.0, -3.0])
    logprobs, mask = old.clone().requires_grad_(), t([1, 1, 0])
    loss, sums = policy_loss(logprobs, old, t([0.5, -1.5, 7.0]), mask, settings("cispo", "token"))
    loss.sum().backward()
    assert loss[0].tolist() == [0.5, -3.0, 0.0]
    assert logprobs.grad is not None and logprobs.grad[0].tolist() == [-0.5, 1.5, 0.0]
    assert (sums["clipfrac_low"].item(), sums["clipfrac_high"].item()) == (0, 0)


def test_the_sequence_ratio_by_hand() -> None:
    # ratios 2 and 8 have the geometric mean 4; a response of one token has its own; none has 1
    log_ratio = t([math.log(2), math.log(8), 0.0], [math.log(3), 0.0, 0.0], [0.0, 0.0, 0.0])
    mask = t([1, 1, 0], [1, 0, 0], [0, 0, 0])
    ratio = importance_ratio(log_ratio, mask, Importance.sequence)
    assert torch.allclose(ratio, t([4.0] * 3, [3.0] * 3, [1.0] * 3))
    assert torch.allclose(
        importance_ratio(log_ratio, mask, Importance.token), t([2, 8, 1], [3, 1, 1], [1, 1, 1])
    )


def test_gspo_of_two_tokens_by_hand() -> None:
    # mean log ratio (log 1.21 + 0) / 2 = log 1.1: both tokens lose 1.1, each gets half of 2 x 1.1
    logprobs = t([math.log(1.21), 0.0, 5.0]).requires_grad_()
    zeros, ones, mask = t([0.0] * 3), t([1.0] * 3), t([1, 1, 0])
    rl = settings("clip", "sequence")
    loss, _ = policy_loss(logprobs, zeros, ones, mask, rl)
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([-1.1, -1.1, 0.0])
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([-1.1, -1.1, 0.0])
    far = t([math.log(1.96), 0.0, 0.0]).requires_grad_()  # mean ratio 1.4: clipped as a whole
    loss, sums = policy_loss(far, zeros, ones, mask, rl)
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([-1.28, -1.28, 0.0])
    assert far.grad is not None and not far.grad.any() and sums["clipfrac_high"].item() == 2


@pytest.mark.parametrize("loss, importance", [("clip", "sequence"), ("clip", "token")])
def test_gradients_are_the_numerical_ones(loss: str, importance: str) -> None:
    logprobs, old, advantages, mask = some_batch(7)
    rl = settings(loss, importance)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, rl)[0], (logprobs,)
    )


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_padding_changes_nothing_whatever_it_holds(loss: str, importance: str) -> None:
    logprobs, old, advantages, mask = some_batch(3)
    rl = settings(loss, importance)
    plain, sums = policy_loss(logprobs, old, advantages, mask, rl)
    rubbish = 50 * torch.randn(B, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    wide, more = policy_loss(
        torch.cat([logprobs, rubbish], 1),
        torch.cat([old, -rubbish], 1),
        torch.cat([advantages, rubbish], 1),
        torch.cat([mask, 0 * rubbish], 1),
        rl,
    )
    assert torch.equal(wide[:, :R], plain) and not wide[:, R:].any()
    assert list(map(float, more.values())) == pytest.approx(list(map(float, sums.values())))


def test_what_has_no_formula_is_not_taken_for_another_one() -> None:
    """A new member of an enum without its case: an error, not the formula of another member."""
    new = cast(Any, SimpleNamespace(name="new"))
    _, rewards, values, mask = some_batch(1)
    experience = cast(Any, SimpleNamespace(response_mask=mask, values=values))
    with pytest.raises(NotImplementedError, match="rl.advantage=new"):
        estimate_advantages(rewards, experience, rl_node(advantage=new, responses_per_prompt=1))
    with pytest.raises(NotImplementedError, match="rl.policy_loss=new"):
        policy_loss(rewards, rewards, rewards, mask, rl_node(policy_loss=new))
    with pytest.raises(NotImplementedError, match="rl.importance=new"):
        importance_ratio(rewards, mask, new)
    with pytest.raises(NotImplementedError, match="rl.kl.estimator=new"):
        kl_estimate(rewards, rewards, new)
    with pytest.raises(NotImplementedError, match="rl.loss_aggregation=new"):
        token_weights(mask, new, 1.0, 1, 1)
