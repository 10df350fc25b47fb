"""The critic's clipped loss and its explained variance, against plain loops and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import SEEDS, masked, normal, prefix_mask, shape_of, t

from rlhf.rl.losses import value_loss
from rlhf.rl.metrics import explained_variance

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
