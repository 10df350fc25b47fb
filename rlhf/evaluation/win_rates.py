"""Win rates: how often a policy's response is better than another policy's to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config.schema import Config
from rlhf.config.stage_graph import score_sources
from rlhf.data.records import Prompt
from rlhf.data.template import message_of
from rlhf.distributed import collectives
from rlhf.evaluation.statistics import wilson_interval
from rlhf.reporting.eval_results import WinRate
from rlhf.rewards.batch import question_text
from rlhf.rewards.pairwise import PairwiseJudge, compare

Responses = list[dict[str, Any]]  # a row per prompt, as evaluate_policy returns them


def win_rates(
    responses: dict[str, Responses],
    against: str,
    judges: Sequence[str],
    prompts: Sequence[Prompt] = (),
    comparing: Mapping[str, PairwiseJudge] | None = None,
) -> list[WinRate]:
    """The win rate of each policy over `against`, by each judge; a tie counts half.

    None by a judge that applies to no prompt.

    Args:
        prompts: of the responses; for `comparing` only.
        comparing: the judges that read both responses, by name. The others compare their scores.
    """
    rates = []
    for policy in responses:
        if policy == against:
            continue
        for name in judges:
            rows, others = responses[policy], responses[against]
            if comparing and name in comparing:
                if collectives.rank() != 0:  # its results are not written
                    continue
                margins = compared(comparing[name], prompts, rows, others)
            else:
                margins = differences(rows, others, name)
            if margins:
                rates.append(win_rate(policy, against, name, margins))
    return rates


def comparing_judges(cfg: Config) -> dict[str, PairwiseJudge]:
    """The language models among the sources of stage=eval."""
    return {
        name: PairwiseJudge(
            source.judge.endpoint,
            source.judge.model,
            source.judge.api_key_env,
            source.timeout,
            rubric=source.judge.pair_rubric,
            max_tokens=source.judge.max_tokens,
            concurrency=source.judge.concurrency,
            cache=source.judge.cache,
        )
        for name, source in score_sources(cfg, "eval").items()
        if source.judge
    }


def compared(
    judge: PairwiseJudge, prompts: Sequence[Prompt], rows: Responses, others: Responses
) -> list[float]:
    """What a judge says that reads both responses: above 0 where the first is better.

    A prompt without a verdict is left out.
    """
    texts = [question_text([message_of(turn) for turn in prompt.turns]) for prompt in prompts]
    first, second = ([row["completion"] for row in side] for side in (rows, others))
    return [one - 0.5 for one in compare(judge, texts, first, second) if one is not None]


def differences(rows: Responses, others: Responses, judge: str) -> list[float]:
    """The differences of two policies' scores; prompts that have none are left out.

    Equal responses are a tie, also where rounding in other batches gave them other scores.
    """
    margins = []
    for row, other in zip(rows, others):
        score, other_score = judgement(row, judge), judgement(other, judge)
        if score is not None and other_score is not None:
            same = all(row[key] == other[key] for key in ("completion", "length", "eos_rate"))
            margins.append(0.0 if same else score - other_score)
    return margins


def win_rate(policy: str, against: str, judge: str, margins: Sequence[float]) -> WinRate:
    """One policy over another with the 95 % Wilson interval.

    Args: margins: of each prompt; above 0 where the policy's response is better.
    """
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
