"""Pass rates of verifiers: pass@k, maj@k and accuracy by column, on responses to held-out prompts.

A response passes where its score is at least 1. One that the verifier does not apply to (score
None) is left out. Intervals are Wilson's, over the prompts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.data.records import Prompt
from rlhf.evaluation.statistics import majority_at_k, pass_at_k, sizes, wilson_interval
from rlhf.evaluation.win_rates import Responses, judgement
from rlhf.reporting.eval_results import PassRate
from rlhf.rewards.batch import columns_of
from rlhf.verifiers import final_answer

PASSING_SCORE = 1.0
MAX_VALUES = 50  # of a column that divides the prompts


class Checked(NamedTuple):
    """The responses to a prompt that a verifier applies to."""

    passed: list[bool]
    answers: list[str | None]  # final ones


def pass_rates(
    policy: str,
    prompts: Sequence[Prompt],
    rows: Responses,
    verifiers: Sequence[str],
    columns: Sequence[str] = (),
) -> list[PassRate]:
    """All pass rates of a policy.

    Args:
        rows: the responses, as evaluate_policy returns them: equally many to each prompt, side by
            side.
        verifiers: sources of the score.
        columns: of the prompts' rows; pass@1 is also given for each of their values.
    """
    if not prompts:
        return []
    samples = len(rows) // len(prompts)
    rates = []
    for verifier in verifiers:
        checked = [
            check(rows[i * samples : (i + 1) * samples], verifier) for i in range(len(prompts))
        ]
        if not any(one.passed for one in checked):
            log.warning(f"{policy}: {verifier} applies to none of the responses: no pass rate")
            continue
        rates += at_k(policy, verifier, checked, samples)
        for column in columns:
            rates += by_column(policy, verifier, checked, values_of(prompts, column), column)
    return rates


def check(rows: Responses, verifier: str) -> Checked:
    """Which responses to a prompt pass."""
    scores = [(judgement(row, verifier), row) for row in rows]
    applies = [(score, row) for score, row in scores if score is not None]
    return Checked(
        [score >= PASSING_SCORE for score, _ in applies],
        [final_answer(row["completion"]) for _, row in applies],
    )


def at_k(policy: str, verifier: str, checked: Sequence[Checked], samples: int) -> list[PassRate]:
    """pass@k for k = 1, 2, 4, ... samples, and maj@k for k > 1 where responses have an answer.

    Over the prompts with at least k responses that the verifier applies to.
    """
    has_answers = any(answer is not None for one in checked for answer in one.answers)
    rates = []
    for measure in ("pass", "maj") if has_answers else ("pass",):
        for k in sizes(samples):
            enough = [one for one in checked if len(one.passed) >= k]
            if not enough or (measure, k) == ("maj", 1):
                continue
            values = [
                pass_at_k(len(one.passed), sum(one.passed), k)
                if measure == "pass"
                else majority_at_k(one.answers, one.passed, k)
                for one in enough
            ]
            rates.append(PassRate(policy, verifier, measure, k, *mean_and_interval(values)))
    return rates


def by_column(
    policy: str, verifier: str, checked: Sequence[Checked], values: Sequence[str], column: str
) -> list[PassRate]:
    """pass@1 of the prompts with each value of a column. Args: values: of each prompt."""
    groups: dict[str, list[float]] = defaultdict(list)
    for one, value in zip(checked, values):
        if one.passed:
            groups[value].append(pass_at_k(len(one.passed), sum(one.passed), 1))
    return [
        PassRate(policy, verifier, "pass", 1, *mean_and_interval(groups[value]), column, value)
        for value in sorted(groups, key=in_order)
    ]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, 95 % interval, and number of prompts. Args: values: one of each prompt."""
    total, prompts = sum(values), len(values)
    return total / prompts, *wilson_interval(total, prompts), prompts


def values_of(prompts: Sequence[Prompt], column: str) -> list[str]:
    """The value of a column in each prompt's row, as text; null where a row does not have it."""
    values = [columns_of(prompt).get(column) for prompt in prompts]
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def in_order(value: str) -> tuple[bool, float, str]:
    """Numbers in their order, then texts."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def check_columns(prompts: Sequence[Prompt], columns: Sequence[str]) -> None:
    """Check that the columns of eval.by are there, before a model is loaded.

    Raises: UserError naming those that there are, or a column with too many values.
    """
    known = list(dict.fromkeys(name for prompt in prompts for name in columns_of(prompt)))
    for column in columns:
        if column not in known:
            there = ", ".join(known) or "none"
            raise UserError(
                f"eval.by=[{column}]: the rows of the held-out prompts have no such column; they "
                f"have {there}"
            )
        if (count := len(set(values_of(prompts, column)))) > MAX_VALUES:
            raise UserError(
                f"eval.by=[{column}]: it has {count} values in {len(prompts)} rows, and each would "
                f"be a group: name a column with at most {MAX_VALUES}"
            )
