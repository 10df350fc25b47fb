"""A judge: a language model that grades one response at a time.

`rlhf/rewards/pairwise.py` compares two responses. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.rewards.batch import question_text
from rlhf.rewards.language_model import LanguageModel
from rlhf.rewards.rubric import read_rubric, render
from rlhf.verifiers import Scores, Text, references_of, text_of

# 7, 7.5, .5, 7e-1; with the scale in 7/10 and 7 out of 10
NUMBER = r"(?>(-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?))(?:\s*(?:/|out of)\s*(?>(\d+(?:\.\d+)?)))?"
NO_RANGE = r"(?!\s*[-\u2013\u2014]\s*\d)"  # not the 9 in 9 - 10
GRADE = re.compile(  # Score: 7, **Score:** 7, Score (0-10): 7, "score": 7, a score of 7, Score - 7
    r"score(?: out of [\d.]+| of| is| \([^)\n]*\))?[^\w.+-]{0,6}(?:[-\u2013\u2014]\s+)?"
    rf"{NUMBER}{NO_RANGE}",
    re.IGNORECASE,
)
ANY_NUMBER = re.compile(rf"(?<![\w.]){NUMBER}", re.IGNORECASE)
LAST_LINE = re.compile(rf"^[^\w\n.-]*{NUMBER}[^\w\n]*\Z", re.IGNORECASE | re.MULTILINE)
WARNED: set[str] = set()  # endpoints whose replies without a grade have been named


async def judge(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    rubric: str,
    max_score: float = 10.0,
    column: str | None = None,
    **named: Any,
) -> Scores:
    """Grades from a language model behind an OpenAI-compatible server, from 0 to 1.

    Each row is one request with the rubric as the user's message. The grade in the reply (see
    `grade`) is divided by `max_score`. A reply without one gives None; a warning names the first.
    With {ground_truth} in the rubric, a row without a reference gets None without a request.
    Replies with a grade are kept on disk.

    Args:
        rubric: a file; {prompt}, {completion} and {ground_truth} in it are replaced.
        max_score: the highest grade of the rubric.
        column: the column with the reference.
        named: the fields of `LanguageModel`, such as endpoint and model; and the data's columns.
    Raises: UserError where the server fails, and for a rubric that cannot be used.
    """
    of_model = {field.name for field in fields(LanguageModel)} & named.keys()
    model = LanguageModel(**{name: named.pop(name) for name in of_model})
    if model.concurrency < 1 or max_score <= 0:
        wrong = f"concurrency={model.concurrency}, max_score={max_score:g}"
        raise UserError(f"a judge needs both above 0 ({wrong})")
    template = read_rubric(rubric, "rubric", ["completion"])
    references = [[""]] * len(prompts)
    if "{ground_truth}" in template:
        references = references_of(len(prompts), named, column)
    rows = zip(prompts, completions, references)
    questions = [question_of(template, *row) if row[2] else None for row in rows]
    asked = [question for question in questions if question is not None]
    replies = await model.ask_all(asked, lambda reply: grade(reply, max_score) is not None)
    grades = {question: grade(reply, max_score) for question, reply in replies.items()}
    lacking = [replies[question] for question, score in grades.items() if score is None]
    if lacking and model.endpoint not in WARNED:
        WARNED.add(model.endpoint)
        log.warning(
            f"{model.server.shown}: no score from 0 to {max_score:g} in {len(lacking)} of "
            f"{len(grades)} replies; one ends in {lacking[0].strip()[-80:]!r}"
        )
    scores = [grades[question] if question is not None else None for question in questions]
    return [None if score is None else score / max_score for score in scores]


def question_of(rubric: str, prompt: Text, completion: Text, references: Sequence[str]) -> str:
    """What the judge is asked about a row."""
    texts = {
        "prompt": question_text(prompt),
        "completion": text_of(completion),
        "ground_truth": " or ".join(references),
    }
    return render(rubric, texts)


def grade(reply: str, max_score: float) -> float | None:
    """The grade in a judge's reply: the number after the last "Score", else a number that is the
    last line, else the only number. Not just the last one: a small model repeats the rubric, or
    solves the task ("3 + 4 = 7").

    Returns: None where there is none, it is not from 0 to max_score, or it is of another scale, as
        8/100 where max_score is 10.
    """
    found = GRADE.findall(reply) or LAST_LINE.findall(reply.strip())
    if not found and len(every := ANY_NUMBER.findall(reply)) == 1:
        found = every
    number, scale = found[-1] if found else ("-1", "")
    if scale and float(scale) != max_score:
        return None
    return float(number) if 0 <= float(number) <= max_score else None
