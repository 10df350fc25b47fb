"""Win rates: how often a policy's response is better than another policy's to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.evaluation.statistics import wilson_interval
from rlhf.reporting.eval_results import WinRate

Responses = list[dict[str, Any]]  # a row per prompt, as evaluate_policy returns them


def win_rates(
    responses: dict[str, Responses], against: str, judges: Sequence[str]
) -> list[WinRate]:
    """The win rate of each policy over `against`, by each judge; a tie counts half.

    None by a judge that applies to no prompt.
    """
    rates = [
        win_rate(responses, policy, against, judge)
        for policy in responses
        if policy != against
        for judge in judges
    ]
    return [rate for rate in rates if rate]


def win_rate(
    responses: dict[str, Responses], policy: str, against: str, judge: str
) -> WinRate | None:
    """One policy over another by one judge, with the 95 % Wilson interval.

    Prompts that the judge does not apply to are left out; None where that is all.
    """
    pairs = [
        (judgement(a, judge), judgement(b, judge))
        for a, b in zip(responses[policy], responses[against])
    ]
    margins = [a - b for a, b in pairs if a is not None and b is not None]
    if not margins:
        return None
    wins, ties = sum(x > 0 for x in margins), sum(x == 0 for x in margins)
    prompts = len(margins)
    low, high = wilson_interval(wins + ties / 2, prompts)
    rate = (wins + ties / 2) / prompts
    return WinRate(policy, against, judge, rate, low, high, wins, ties, prompts)


def judgement(row: dict[str, Any], judge: str) -> float | None:
    """The score that a judge gives a response: gold, or a source of the score by its name.

    None where the source does not apply to it.
    """
    if judge == "gold" and "gold" in row:
        return float(row["gold"])
    score: float | None = row.get(f"score/{judge}", row["score"])
    return score
