"""The reward model's losses on pairs, against plain loops and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import SEEDS, normal, shape_of, t

from rlhf.training.losses import pairwise_loss, pairwise_loss_per_token

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


# ---------------------------------------------------------------------------------- sums and splits


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
