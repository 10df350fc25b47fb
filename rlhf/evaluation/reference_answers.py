"""The reward functions on the reference answers of the data: what a verifier must pass.

A verifier that refuses the right answers teaches nothing; stage=inspect finds that out in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.base.log import log
from rlhf.config.schema import Config
from rlhf.config.stage_graph import score_sources
from rlhf.data.inspection.measuring import ReferenceCheck
from rlhf.data.records import Dataset, Prompt, Turn
from rlhf.evaluation.pass_rates import PASSING_SCORE
from rlhf.rewards.batch import NOT_TRAINING, make_batch, reference_in
from rlhf.rewards.process import RewardProcess
from rlhf.rewards.trial import check_columns, column_names, spec_of, token_ids
from rlhf.verifiers import REFERENCES

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = 1000  # of the prompts, spread over all of them
CALL = 100  # rows of a call, as each call has a time limit


def check_references(
    cfg: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> list[ReferenceCheck]:
    """Score the reference answers of online RL's prompts with each function and reward URL of
    rl.rewards. A judge is not asked: its grade of a right answer may be any.

    Args: tokenizer: of the policy.
    Raises: UserError for a function or server that cannot be called.
    """
    sources = score_sources(cfg, cfg.rl.name).items()
    tried = {name: source for name, source in sources if source.function or source.url}
    names = column_names(data) if tried else set()
    checks = []
    for name, source in tried.items():
        columns = [source.kwargs["column"]] if source.kwargs.get("column") else REFERENCES
        prompts, answers = reference_answers(data.ppo, columns)
        if not prompts:
            log.info(
                f"{name}: not tried on reference answers, as no prompt of online RL has one (an "
                f"answer, or a column {', '.join(columns)})"
            )
            continue
        process = RewardProcess({name: spec_of(f"rl.rewards.{name}", source)})
        try:
            process.columns = names
            check_columns(process, prompts)
            scores = score_rows(process, prompts, answers, tokenizer)
        finally:
            process.close()
        checks.append(check_of(name, prompts, answers, scores[name]))
    return checks


def score_rows(
    process: RewardProcess,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[float | None]]:
    """The scores of each function; None where it does not apply.

    Raises: UserError where one fails.
    """
    scores: dict[str, list[float | None]] = {name: [] for name in process.specs}
    for start in range(0, len(prompts), CALL):
        part = slice(start, start + CALL)
        ids = token_ids(responses[part], tokenizer)
        batch = make_batch(
            prompts[part], responses[part], ids, NOT_TRAINING, columns=process.columns
        )
        for name, result in process.score(batch).items():
            scores[name] += result.scores
    return scores


def check_of(
    name: str, prompts: Sequence[Prompt], answers: Sequence[str], scores: Sequence[float | None]
) -> ReferenceCheck:
    """How many answers do not pass, and the first of them; to how many it does not apply, and the
    first of them."""
    result = ReferenceCheck(
        reward=name, rows=len(scores), not_applicable=scores.count(None), failed=0
    )
    for prompt, answer, value in zip(prompts, answers, scores):
        if value is None:
            result.setdefault("without_score", answer)
        elif value < PASSING_SCORE:
            result["failed"] += 1
            if "score" not in result:
                result["score"] = value
                result["prompt"], result["answer"] = prompt.turns[-1].text, answer
    return result


def reference_answers(
    table: datasets.Dataset, columns: Sequence[str]
) -> tuple[list[Prompt], list[str]]:
    """The prompts of at most MOST_ROWS rows that have a reference answer, and these answers.

    Args: columns: where the reference is, in a row without an answer.
    """
    step = -(-len(table) // MOST_ROWS) or 1
    prompts, answers = [], []
    for row in table.select(range(0, len(table), step)):
        turns = [Turn(**turn) for turn in row["prompt"]]
        prompt = Prompt(turns, row["columns"], row["is_messages"])
        if answer := row["chosen"] or reference_in(prompt, columns):
            prompts.append(prompt)
            answers.append(answer)
    return prompts, answers


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
            continue
        if check["not_applicable"]:
            lines.append(
                f"reward {check['reward']}: it does not apply to {check['not_applicable']:,} of "
                f"{check['rows']:,} reference answers (None), the first one "
                f"{check['without_score'][:80]!r}: these rows have no score from it"
            )
        if check["failed"]:
            lines.append(
                f"reward {check['reward']}: {check['failed']:,} of {applies:,} reference answers "
                f"({check['failed'] / applies:.0%}) score less than 1, the first one"
                f" {check['score']:g}: {check['answer'][:80]!r} to {check['prompt'][-80:]!r}; if it"
                " checks answers, repair it or the data before training"
            )
    return lines
