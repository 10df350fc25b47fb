"""The prompts of the sandbox, and the gold reward of an answer: the ground truth of this world."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from rlhf.base.errors import UserError
from rlhf.data.records import Turn
from rlhf.data.sandbox.vocabulary import (
    FILLER,
    KIND_OF,
    KIND_OF_STEP,
    KNOWN_SENTENCES,
    LENGTH_WISHES,
    MARKERS,
    OPENERS,
    QUESTIONS,
    RUDE,
    TONE_WISHES,
)


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


@dataclass(frozen=True)
class Request:
    """What a prompt asks for, read from its text."""

    thing: str
    steps: int  # number of steps, 1 to 3
    tone: int  # +1 friendly, -1 plain, 0 no wish


def all_prompts() -> list[str]:
    """Every prompt, in a fixed order: 24 things x 12 questions x 5 length x 5 tone wishes."""
    return [
        question.format(t=thing) + length + tone
        for thing in KIND_OF
        for question in QUESTIONS
        for length in LENGTH_WISHES
        for tone in TONE_WISHES
    ]


@functools.cache  # a prompt is read once for each of its answers
def request_of(prompt: str) -> Request:
    """What a prompt asks for. Raises: UserError when the text names no thing of this world."""
    things = [word for word in words(prompt) if word in KIND_OF]
    if not things:
        raise UserError(f"not a prompt of the sandbox, it names none of its things: {prompt!r}")
    steps = next(
        (n for wish, n in LENGTH_WISHES.items() if wish and wish.strip() in prompt),
        LENGTH_WISHES[""],
    )
    tone = next(
        (n for wish, n in TONE_WISHES.items() if wish and wish.strip() in prompt), TONE_WISHES[""]
    )
    return Request(things[0], steps, tone)


def factors(prompt: str, answer: str) -> dict[str, float]:
    """The terms of the gold reward. Their keys are documented at `gold_reward`."""
    request = request_of(prompt)
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]", answer)]
    steps = [
        s.split(", ", 1)[1][:-1] for s in sentences if s.split(", ", 1)[0] in MARKERS and ", " in s
    ]
    known = [step for step in steps if step in KIND_OF_STEP]
    named = {word for word in words(answer) if word in KIND_OF}
    friendly = any(s in OPENERS for s in sentences[:1])
    strange = sum(s not in KNOWN_SENTENCES for s in sentences) - len(known)
    return {
        "length": 2.0 - abs(len(known) - request.steps),
        "tone": 1.5 * request.tone * (1.0 if friendly else -1.0),
        "named": 0.25 * (request.thing in named) - 0.25 * bool(named - {request.thing}),
        "wrong_kind": -0.25 * sum(KIND_OF_STEP[step] != KIND_OF[request.thing] for step in known),
        "filler": -0.5 * sum(s in FILLER for s in sentences),
        "rude": -1.0 * sum(s in RUDE for s in sentences),
        "noise": -0.5 * (strange + len(known) - len(set(known))),
        "unfinished": -1.0 * (not answer.rstrip().endswith((".", "!"))),
    }


def gold_reward(prompt: str, answer: str) -> float:
    """How good `answer` is for `prompt`: the ground truth of this world.

    length      2 - |steps - s|, where the prompt asks for s = 1, 2 or 3 steps
    tone        a wish for a friendly or plain answer: +1.5 if it is met, -1.5 if not; an answer is
                friendly when it begins with an opener
    named       +0.25 for naming the thing asked about, -0.25 for naming another one
    wrong_kind  -0.25 for each step that belongs to another kind of thing
    filler      -0.5 for each filler sentence
    rude        -1 for each rude sentence
    noise       -0.5 for each sentence that is not of this world, and for each repeated step
    unfinished  -1 for an answer that does not end with "." or "!"

    Args: the text of the question, without role markers; the text of the answer.
    Returns: the sum. The best answer has `best_gold(prompt)`.
    Raises: UserError when the prompt names no thing of this world.
    """
    return sum(factors(prompt, answer).values())


def gold_of_turns(turns: list[Turn], answer: str) -> float:
    """The gold reward of an answer to a prompt's turns."""
    return gold_reward(turns[-1].text, answer)


def gold(prompts: list[str], completions: list[str]) -> list[float]:
    """The gold reward as a reward function: {gold: {function: "rlhf.data.sandbox:gold"}}."""
    return [gold_reward(prompt, answer) for prompt, answer in zip(prompts, completions)]


def best_gold_of_turns(turns: list[Turn]) -> float:
    """The gold reward of the best answer to a prompt's turns."""
    return best_gold(turns[-1].text)


def best_gold(prompt: str) -> float:
    """The gold reward of the best answer: 2 for length, 0.25 for the name, 1.5 for a tone wish."""
    request = request_of(prompt)
    return 2.25 + 1.5 * abs(request.tone)
