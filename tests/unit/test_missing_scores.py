"""Responses without a score, groups with equal rewards, truncated and overlong responses: which
rewards, advantages, losses and metrics they have, against loops and by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from typing import Any, cast

import pytest
import torch
from helpers import rl_node
from torch import Tensor

from rlhf.config.choices import Advantage, LossAggregation, Normalize, Precision
from rlhf.data.batches import PromptOrder, global_batches
from rlhf.data.records import Prompt, Turn
from rlhf.rl.advantages import (
    differ,
    estimate_advantages,
    group_relative,
    leave_one_out,
    loss_mask,
    of_scored,
    shape_scores,
    soft_overlong,
    token_rewards,
)
from rlhf.rl.controllers import RunningScale
from rlhf.rl.experience import Experience, Prompts, concatenate, pick_prompts, sampled_fields
from rlhf.rl.guards import Guards
from rlhf.rl.losses import token_weights
from rlhf.rl.metrics import Scored, drawn_metrics, rollout_metrics, source_metrics
from rlhf.rl.monitor import warnings_of

F64, NAN = torch.float64, math.nan
FORMULAS = {"leave_one_out": leave_one_out, "group": group_relative}


def t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def v(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def experience(mask: Tensor, finished: Tensor | None = None, **fields: Tensor) -> Experience:
    """An experience with this response mask; what is not given is zero."""
    zeros, ends = torch.zeros_like(mask), torch.ones(len(mask), dtype=mask.dtype)
    ids = torch.ones_like(mask, dtype=torch.long)
    plain: dict[str, Any] = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "response_ids": ids,
        "response_mask": mask,
        "loss_mask": mask,
        "scores": zeros[:, :1],
        "finished": ends if finished is None else finished,
    }
    names = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values")
    return Experience(**(dict.fromkeys(names, zeros) | plain | fields))


# ------------------------------------------------------------------------------------- advantages


def by_loop(rewards: list[float], by_group: bool, one_out: bool) -> list[float]:
    """Advantages of the responses to a prompt, of which some have no reward."""
    known = [r for r in rewards if not math.isnan(r)]
    if len(known) < 2:
        return [0.0] * len(rewards)
    spread = statistics.stdev(known) + 1e-4 if by_group else 1.0
    found = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and not math.isnan(r)]
        baseline = statistics.fmean(others if one_out else known)
        found.append(0.0 if math.isnan(reward) else (reward - baseline) / spread)
    return found


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(5))
def test_a_group_with_missing_scores_is_a_smaller_group(
    seed: int, name: str, by_group: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(6, 4, generator=generator, dtype=F64)
    rewards[torch.rand(6, 4, generator=generator) < 0.4] = NAN
    found = of_scored(rewards, by_group, FORMULAS[name])
    expected = [by_loop(row, by_group, name == "leave_one_out") for row in rewards.tolist()]
    assert torch.allclose(found, t(*expected), atol=1e-12)


def test_a_group_with_missing_scores_by_hand() -> None:
    rewards = t([1.0, NAN, 3.0], [NAN, 5.0, NAN], [NAN, NAN, NAN], [1.0, 2.0, 6.0])
    found = of_scored(rewards, False, group_relative)
    assert found.tolist() == [[-1, 0, 1], [0, 0, 0], [0, 0, 0], [-2, -1, 3]]
    assert of_scored(rewards, False, leave_one_out)[0].tolist() == [-2, 0, 2]


@pytest.mark.parametrize("name", FORMULAS)
def test_without_missing_scores_nothing_changes_bit_for_bit(name: str) -> None:
    rewards = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    for by_group in (False, True):
        formula = FORMULAS[name]
        assert torch.equal(of_scored(rewards, by_group, formula), formula(rewards, by_group))


@pytest.mark.parametrize("advantage", [a.name for a in Advantage])
def test_a_row_without_a_score_changes_no_other_one(advantage: str) -> None:
    """Advantages, normalised over the batch, are those of the batch without the row."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4], [2]])).to(F64)
    score, penalty, values = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((6,), (6, 4), (6, 4))
    )
    score[[2, 3]] = NAN  # a whole group
    some = [0, 1, 4, 5]
    rl = rl_node(advantage=Advantage[advantage], normalize=Normalize.batch, responses_per_prompt=2)
    whole, returns = estimate_advantages(
        token_rewards(score, penalty, mask), experience(mask, values=values * mask), rl
    )
    part, returns_of_part = estimate_advantages(
        token_rewards(score[some], penalty[some], mask[some]),
        experience(mask[some], values=(values * mask)[some]),
        rl,
    )
    assert torch.allclose(whole[some], part, atol=1e-12) and not whole[[2, 3]].any()
    if returns is not None and returns_of_part is not None:
        assert torch.allclose(returns[some], returns_of_part) and not returns[[2, 3]].any()


def test_the_running_scale_does_not_count_missing_scores() -> None:
    scale, plain = RunningScale(), RunningScale()
    found, expected = scale(v(1.0, NAN, 4.0)), plain(v(1.0, 4.0))
    assert found[[0, 2]].tolist() == expected.tolist() and math.isnan(found[1])
    assert scale.state_dict() == plain.state_dict()
    assert scale(v(NAN)).isnan().all() and scale.state_dict() == plain.state_dict()


# ------------------------------------------------------------------------------------------- loss


def test_what_is_in_the_loss() -> None:
    mask = t([1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1])
    e = experience(mask, finished=v(1, 0, 1, 0))
    raw = v(0.5, 0.5, NAN, NAN)
    assert loss_mask(e, raw, False).tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert loss_mask(e, raw, True).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(loss_mask(e, v(1, 2, 3, 4), False), mask)


@pytest.mark.parametrize("aggregation", [a.name for a in LossAggregation])
def test_a_response_outside_the_loss_does_not_change_the_weight_of_others(
    aggregation: str,
) -> None:
    mask = t([1, 1, 0], [0, 0, 0], [1, 1, 1])
    kind = LossAggregation[aggregation]
    found = token_weights(mask, kind, 5.0, 2, 3)
    assert torch.equal(found[[0, 2]], token_weights(mask[[0, 2]], kind, 5.0, 2, 3))
    assert not found[1].any()
    assert not token_weights(0 * mask, kind, 0.0, 0, 3).any(), "nothing in the loss, no NaN"


# ---------------------------------------------------------------------------------------- penalty


def test_the_soft_length_penalty_by_hand() -> None:
    # DAPO: 20480 tokens, the last 4096 of them a buffer
    length = v(1, 16384, 16385, 18432, 20480)
    found = soft_overlong(length, 20480, 4096)
    assert found.tolist() == pytest.approx([0, 0, 1 / 4096, 0.5, 1])
    assert soft_overlong(v(3, 4), 4, 1).tolist() == [0, 1]


@pytest.mark.parametrize("longest, buffer", [(10, 1), (10, 4), (64, 12)])
def test_the_soft_length_penalty_is_equation_13(longest: int, buffer: int) -> None:
    for length in range(1, longest + 1):
        expected = 0.0
        if length > longest - buffer:
            expected = ((longest - buffer) - length) / buffer
        found = -float(soft_overlong(v(length), longest, buffer))
        assert found == pytest.approx(expected)


def test_scores_with_all_penalties() -> None:
    e = experience(t([1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]), finished=v(0, 1, 1))
    rl = rl_node(missing_eos_penalty=0.5, length_penalty=0.1, overlong_penalty=2)
    found = shape_scores(v(1.0, 1.0, NAN), e, rl, 4, RunningScale())
    assert found[:2].tolist() == pytest.approx([1 - 0.5 - 0.4 - 1, 1 - 0.3 - 0.5])
    assert math.isnan(found[2])


# ----------------------------------------------------------------------------- dynamic sampling


def test_which_groups_differ() -> None:
    raw = v(1, 1, 1, 0, NAN, 1, NAN, NAN, 0.3, 0.3 + 1e-9, 2, -2)
    assert differ(raw, 2).tolist() == [False, True, False, False, False, True]
    assert differ(v(1, NAN, 1, 0, NAN, 1), 3).tolist() == [False, True]
    assert not differ(v(1, 2, 3), 1).any(), "one response has nothing to be compared with"


def test_the_order_of_prompts_is_that_of_the_batches_and_goes_on() -> None:
    batches = list(global_batches(11, 3, 4, seed=5))
    order = PromptOrder(11, 3, seed=5)
    assert [order.take(3) for _ in batches] == batches
    flat = list(itertools.chain(*batches))
    for seed in range(5):
        order, numbers, taken = PromptOrder(11, 3, seed=5), random.Random(seed), []
        while len(taken) < 30:
            state, count = order.state_dict(), numbers.randint(0, 8)
            resumed = PromptOrder(11, 3, seed=5)
            resumed.load_state_dict(state)
            part = order.take(count)
            assert resumed.take(count) == part and len(part) == count
            taken += part
        assert taken[:36] == flat[: len(taken)]


def test_experiences_are_joined_as_if_they_had_been_one() -> None:
    def some(rows: int, p: int, r: int, seed: int) -> Experience:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(rows, r)
        e = experience(mask, scores=torch.rand(rows, 2, generator=generator))
        e.prompt_ids = torch.randint(5, 9, (rows, p), generator=generator)
        e.prompt_mask = torch.ones_like(e.prompt_ids)
        e.old_logprobs = torch.rand(rows, r, generator=generator)
        return e

    one, two = some(2, 3, 5, 0), some(3, 4, 2, 1)
    both = concatenate([one, two], pad_id=0)
    assert both.prompt_ids[0].tolist() == [0, *one.prompt_ids[0].tolist()]
    assert both.prompt_mask[0].tolist() == [0, 1, 1, 1]
    assert both.response_mask[2].tolist() == [1, 1, 0, 0, 0]
    for name in sampled_fields():  # the rows of each are found again, without the padding
        assert torch.equal(getattr(both.rows([0, 1]), name), getattr(one, name)), name
        assert torch.equal(getattr(both.rows([2, 3, 4]), name), getattr(two, name)), name
    assert concatenate([one], 0) is one


def asked(*columns: str, ids: int = 0) -> Prompts:
    rows = [Prompt([Turn("user", f"{i}")], text) for i, text in enumerate(columns)]
    return Prompts(rows, [[ids + i] for i in range(len(rows))], torch.rand(len(rows), 2))


def test_entries_of_several_prompts_are_picked() -> None:
    one, two = asked("", "", ids=10), asked("", "", "", ids=20)
    found = pick_prompts([one, two], [1, 4])
    assert found.ids == [[11], [22]] and found.rows == [one.rows[1], two.rows[2]]
    assert torch.equal(found.random, torch.stack([one.random[1], two.random[2]]))


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_of_what_was_drawn() -> None:
    levels = [json.dumps({"difficulty": d}) for d in ("easy", "easy", "hard", "hard", 3, 3)]
    found = drawn_metrics([asked(*levels)], v(1, 1, 1, 0, NAN, 0), 2)
    assert found == {
        "rollout/prompts_drawn": 3,
        "frac_reward_zero_std": pytest.approx(2 / 3),
        "reward/difficulty/3": 0.0,
        "reward/difficulty/easy": 1.0,
        "reward/difficulty/hard": 0.5,
    }
    twice = drawn_metrics([asked("", ""), asked("", "")], v(1, 0, NAN, NAN), 2)
    assert twice["rollout/scores_drawn"] == 0.5 and twice["rollout/prompts_drawn"] == 2
    assert drawn_metrics([asked('{"difficulty": 0.25}')], v(1), 1) == {"rollout/prompts_drawn": 1}


def test_metrics_of_sources_are_of_the_responses_they_apply_to() -> None:
    e = experience(torch.ones(3, 1), scores=t([1, NAN], [3, NAN], [NAN, NAN]))
    found = source_metrics(["a", "b"], e)
    assert (found["reward/a/mean"], found["reward/a/std"]) == (2, 1)
    assert math.isnan(found["reward/b/mean"])
    assert not any("rate" in name for name in found), "rates are those of functions"
    e.reward_errors = t([0, 1], [0, 0], [0, 0])
    rates = source_metrics(["a", "b"], e)
    assert rates["reward/a/none_rate"] == pytest.approx(1 / 3) and rates["reward/b/none_rate"] == 1
    assert rates["reward/a/error_rate"] == 0
    assert rates["reward/b/error_rate"] == pytest.approx(1 / 3)


def test_metrics_of_the_critic_are_of_the_responses_with_a_score() -> None:
    """The second response has a value, but no return: it says nothing about the critic."""
    mask = t([1, 1], [1, 1], [1, 0])
    values, returns = t([2, 2], [5, 5], [3, 0]), t([2, 3], [0, 0], [4, 0])
    e = experience(mask, values=values, returns=returns)
    raw = v(1, NAN, 2)
    found = rollout_metrics(e, Scored(raw, raw, 0 * mask, 0 * mask), 0.1)
    assert found["val/value_mean"] == pytest.approx(7 / 3)
    assert found["val/return_mean"] == 3
    assert found["val/return_std"] == pytest.approx(statistics.pstdev([2, 3, 4]))
    variances = statistics.pvariance([0, 1, 1]), statistics.pvariance([2, 3, 4])
    assert found["val/explained_variance"] == pytest.approx(1 - variances[0] / variances[1])


@pytest.mark.parametrize("last, is_broken", [(-0.1, True), (NAN, False), (0.2, False)])
def test_only_a_critic_that_is_measured_can_be_broken(last: float, is_broken: bool) -> None:
    usual = {"objective/kl": 1.0, "objective/kl_per_token": 0.1, "objective/eos_rate": 1.0}
    usual |= {"objective/scores": 0.0, "objective/kl_coef": 0.1, "val/explained_variance": -0.1}
    rows = [usual] * 9 + [usual | {"val/explained_variance": last}]
    assert [title for title, _ in warnings_of(rows)] == ["critic broken"] * is_broken
    assert not warnings_of(rows[1:])


def test_a_missing_score_is_no_broken_reward_model() -> None:
    mask = torch.ones(2, 2)
    ids = torch.tensor([[5, 2], [5, 2]])
    e = experience(mask, response_ids=ids, scores=torch.tensor([[1.0, NAN], [1.0, 1.0]]))
    off = rl_node().dschat
    Guards(Precision.fp32, off).check_rollout(e, 2, functions=[1])
    with pytest.raises(RuntimeError, match="guard finite: scores is not finite in 1 places"):
        Guards(Precision.fp32, off).check_rollout(e, 2, functions=[0])
    with pytest.raises(RuntimeError, match="guard finite: scores"):
        Guards(Precision.fp32, off).check_rollout(e, 2, functions=cast(Any, ()))
