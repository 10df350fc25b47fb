"""The reward functions on the reference answers of the data: what a verifier must pass.

A verifier that refuses the right answers teaches nothing; stage=inspect finds that out in seconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.base.log import log
from rlhf.config.schema import Config
from rlhf.config.stage_graph import score_sources
from rlhf.data.inspection.measuring import ReferenceCheck
from rlhf.data.records import Prompt, Turn
from rlhf.rl.functions import RewardFunction, load_function, score

if TYPE_CHECKING:
    import datasets

MOST_ROWS = 1000  # of the prompts, spread over all of them
PASSING_SCORE = 1.0
COLUMNS = ("ground_truth", "answer", "reward_model")  # with the reference, where no answer is given


def check_references(cfg: Config, table: datasets.Dataset) -> list[ReferenceCheck]:
    """Score the reference answers of online RL's prompts with each function of rl.rewards.

    Args: table: Dataset.ppo.
    Raises: UserError for a function that cannot be imported or called.
    """
    sources = {
        name: source for name, source in score_sources(cfg, cfg.rl.name).items() if source.function
    }
    if not sources:
        return []
    prompts, answers = reference_answers(table)
    if not prompts:
        log.info(
            f"{', '.join(sources)}: not tried on reference answers, as no prompt of online RL has "
            f"one (an answer, or a column {', '.join(COLUMNS)})"
        )
        return []
    sys.path.insert(0, os.getcwd())  # the user's modules may be where the command is run
    checks = []
    for name, source in sources.items():
        key = f"rl.rewards.{name}.function={source.function}"
        function = load_function(str(source.function), key)
        scores = score_rows(function, prompts, answers, key)
        checks.append(check_of(name, prompts, answers, scores))
    return checks


def score_rows(
    function: RewardFunction, prompts: Sequence[Prompt], responses: Sequence[str], where: str
) -> list[float | None]:
    """The score of each response; None where the function does not apply.

    Args: where: the key of the function, which begins the messages.
    Raises: UserError where it fails.
    """
    return [score(function, *row, where) for row in zip(prompts, responses)]


def check_of(
    name: str, prompts: Sequence[Prompt], answers: Sequence[str], scores: Sequence[float | None]
) -> ReferenceCheck:
    """How many answers do not pass, and the first of them."""
    result = ReferenceCheck(
        reward=name, rows=len(scores), not_applicable=scores.count(None), failed=0
    )
    for prompt, answer, value in zip(prompts, answers, scores):
        if value is not None and value < PASSING_SCORE:
            result["failed"] += 1
            if "score" not in result:
                result["score"] = value
                result["prompt"], result["answer"] = prompt.turns[-1].text, answer
    return result


def reference_answers(table: datasets.Dataset) -> tuple[list[Prompt], list[str]]:
    """The prompts of at most MOST_ROWS rows that have a reference answer, and these answers."""
    step = -(-len(table) // MOST_ROWS) or 1
    prompts, answers = [], []
    for row in table.select(range(0, len(table), step)):
        if answer := row["chosen"] or reference_in(row["columns"]):
            prompts.append(Prompt([Turn(**turn) for turn in row["prompt"]], row["columns"]))
            answers.append(answer)
    return prompts, answers


def reference_in(columns: str) -> str:
    """The reference in a row's other columns, as text; "" without one. Args: columns: as JSON."""
    row: dict[str, Any] = json.loads(columns or "{}")
    for name in COLUMNS:
        value = row.get(name)
        if isinstance(value, dict):  # verl: {"ground_truth": "7", "style": "rule"}
            value = value.get("ground_truth")
        if isinstance(value, str | int | float):
            return str(value)
    return ""


def verdicts_on_references(checks: Sequence[ReferenceCheck]) -> list[str]:
    """A line for each function that does not pass all reference answers."""
    lines = []
    for check in checks:
        applies = check["rows"] - check["not_applicable"]
        if not applies:
            lines.append(
                f"reward {check['reward']}: it applies to none of {check['rows']:,} reference "
                "answers (None); look at the columns that it reads"
            )
        elif check["failed"]:
            lines.append(
                f"reward {check['reward']}: {check['failed']:,} of {applies:,} reference answers "
                f"({check['failed'] / applies:.0%}) score less than 1, the first one"
                f" {check['score']:g}: {check['answer'][:80]!r} to {check['prompt'][-80:]!r}; if it"
                " checks answers, repair it or the data before training"
            )
    return lines
