"""Masked means, whitened advantages and scaled rewards, against plain loops and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import F64, SEEDS, masked, normal, prefix_mask, shape_of, t

from rlhf.rl.advantages import masked_mean, whiten


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


def test_equal_values_are_0_whatever_their_rounding() -> None:
    """The mean of 1,024 times 1000.1 is another number in float32."""
    x, mask = torch.full((16, 64), 1000.1), torch.ones(16, 64)
    assert float((x - x.mean()).abs().max()) > 0
    assert whiten(x, mask).tolist() == torch.zeros(16, 64).tolist()
    assert torch.equal(whiten(x, mask, shift_mean=False), x)
