"""Win rates where a judge does not apply to all prompts, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.evaluation.statistics import wilson_interval
from rlhf.evaluation.win_rates import win_rates


def rows(*scores: float | None) -> list[dict[str, Any]]:
    same = {"prompt": "", "length": 1, "eos_rate": 1.0}
    return [same | {"completion": f"worth {score}", "score": score} for score in scores]


def test_equal_responses_are_a_tie_whatever_rounding_says() -> None:
    """A reward model's last digits differ with the other rows of a batch."""
    sft, grpo = rows(0.5, 0.5, 0.5), rows(0.5 + 3e-7, 0.5 - 3e-7, 0.5 + 3e-7)
    for row, other in zip(sft, grpo):
        row["completion"] = other["completion"] = "Hi"
    grpo[2]["eos_rate"] = 0.0  # it was cut off, so it is another one
    [rate] = win_rates({"sft": sft, "grpo": grpo}, "sft", ["model"])
    assert (rate.wins, rate.ties, rate.losses) == (1, 2, 0)


def test_prompts_that_a_judge_does_not_apply_to_are_left_out() -> None:
    sft, grpo = rows(0.0, 1.0, 1.0, None, 0.0), rows(1.0, 0.0, 1.0, 1.0, None)
    [rate] = win_rates({"sft": sft, "grpo": grpo}, "sft", ["number"])
    assert (rate.policy, rate.against, rate.judge) == ("grpo", "sft", "number")
    assert (rate.wins, rate.ties, rate.losses, rate.prompts) == (1, 1, 1, 3)
    assert rate.rate == pytest.approx(0.5) and (rate.low, rate.high) == wilson_interval(1.5, 3)


def test_a_judge_that_applies_to_no_prompt_gives_no_rate() -> None:
    assert win_rates({"sft": rows(None), "grpo": rows(1.0)}, "sft", ["number"]) == []
