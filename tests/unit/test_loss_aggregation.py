"""The weight of each token in the loss of a step, however the step is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch
from formulas import F64, SEEDS, normal, policy_loss_by_token, prefix_mask, shape_of, t
from helpers import rl_node
from torch import Tensor

from rlhf.config.choices import LossAggregation
from rlhf.rl.losses import policy_loss, token_weights, value_loss

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
