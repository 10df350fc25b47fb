"""A language model that compares two responses to a prompt, asked in both orders.

Judges prefer the response that they read first (Zheng 2023, arXiv:2306.05685, section 3.3), so each
pair is asked twice with the positions swapped. Where the two verdicts differ, it is a tie.
No torch here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.base.log import log
from rlhf.rewards.language_model import LanguageModel
from rlhf.rewards.rubric import read_rubric, render

VERDICT = re.compile(r"\[\[(A|B|C|tie)\]\]", re.IGNORECASE)
FIRST_WINS = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
# in the form of MT-Bench's: Zheng 2023, appendix A
RUBRIC = """Compare the two responses below to the same prompt. Judge how helpful, relevant,
accurate and complete they are. The order of the responses and their length must not matter.

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

Explain your comparison in a few sentences. Then end with your verdict: [[A]] if response A is
better, [[B]] if response B is better, [[C]] for a tie."""


@dataclass(frozen=True)
class PairwiseJudge(LanguageModel):
    """A language model, and the question that it is asked about a pair."""

    rubric: str | None = None  # file with {prompt}, {first}, {second}; None: RUBRIC

    def read_rubric(self) -> str:
        """The text of the rubric. Raises: UserError where it cannot be used."""
        if self.rubric is None:
            return RUBRIC
        return read_rubric(self.rubric, "pair_rubric", ["prompt", "first", "second"])


def compare(
    judge: PairwiseJudge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[float | None]:
    """Whether the first response to each prompt is better: 1.0, else 0.0; 0.5 is a tie.

    Returns: None where one of the two replies has no verdict; a warning counts these.
    Raises: UserError where the server fails, and for a rubric that cannot be used.
    """
    rubric = judge.read_rubric()
    questions = [
        render(rubric, {"prompt": prompt, "first": one, "second": other})
        for prompt, a, b in zip(prompts, first, second)
        for one, other in ((a, b), (b, a))
    ]
    replies = asyncio.run(judge.ask_all(questions, lambda reply: verdict(reply) is not None))
    verdicts = [verdict(replies[question]) for question in questions]
    if unclear := verdicts.count(None):
        log.warning(
            f"{judge.server.shown}: {unclear} of {len(verdicts)} replies have no verdict such as "
            "[[A]]; their pairs are left out"
        )
    pairs = list(zip(verdicts[::2], verdicts[1::2]))
    both = [(one, two) for one, two in pairs if one is not None and two is not None]
    if both:
        same = sum(one == 1 - two for one, two in both)
        log.info(
            f"{judge.server.shown}: the same verdict in both orders for {same} of {len(both)} pairs"
        )
    return [in_both_orders(one, two) for one, two in pairs]


def in_both_orders(forward: float | None, swapped: float | None) -> float | None:
    """The verdict on a pair; a tie where the two orders do not agree.

    Args: forward: 1.0 where the response that is read first is better.  swapped: the same with the
        responses in the other order.
    """
    if forward is None or swapped is None:
        return None
    return forward if forward == 1 - swapped else 0.5


def verdict(reply: str) -> float | None:
    """Whether response A is better, 1.0, 0.0, or 0.5 for a tie; the last verdict counts."""
    found = VERDICT.findall(reply)
    return FIRST_WINS[found[-1].lower()] if found else None
