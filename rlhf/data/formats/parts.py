"""The parts of a row: its prompt as turns, and an answer as text."""

from __future__ import annotations

import math

from rlhf.config.schema import Source
from rlhf.data.formats.fields import (
    FIELDS,
    Row,
    field,
    is_there,
    path_of,
    required,
)
from rlhf.data.formats.messages import (
    Json,
    answer_text,
    kind_of,
    turns_of_dialogue,
    turns_of_messages,
)
from rlhf.data.records import Turn, uses_tools

# --- values and their types


def string(value: Json, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {kind_of(value)}, not a string")
    return value


def number(value: Json, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {kind_of(value)}, not a number")
    if not is_finite(value):
        raise ValueError(f"{name} is too large for a number")
    return value


def is_finite(value: float) -> bool:
    """Whether a number is one for floating point: 10**400, which JSON may have, is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


# --- prompts


def read_prompt(row: Row, source: Source) -> list[Turn]:
    value = required(row, source, "prompt")
    if isinstance(value, list):
        turns = turns_of_messages(value, "prompt")
    else:
        text = string(value, "prompt")
        dialogue = turns_of_dialogue(text)
        turns = [Turn("user", text.strip())] if dialogue is None else dialogue
    return checked_prompt(turns_before(row, source, turns) + turns)


def turns_before(row: Row, source: Source, turns: list[Turn]) -> list[Turn]:
    """The turns of the fields `system` and `history`, which come before the others.

    Raises: ValueError where they contradict the others.
    """
    before: list[Turn] = []
    system = field(row, source, "system")
    if system is not None and (text := string(system, "system").strip()):
        if not any(turn.role == "system" for turn in turns):
            before.append(Turn("system", text))
        elif Turn("system", text) not in turns:
            raise ValueError("system is not the system's turn of the conversation")
    assert source.format
    has_history = "history" in FIELDS[source.format][1]
    history = field(row, source, "history") if has_history else None
    if history is None:
        return before
    if not isinstance(history, list):
        raise ValueError(f"history is {kind_of(history)}, not a list of [question, answer]")
    if all(isinstance(entry, dict) for entry in history):
        return before + turns_of_messages(history, "history")
    for i, entry in enumerate(history):
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"history.{i} is not [question, answer]")
        question, answer = (string(text, f"history.{i}") for text in entry)
        before += [Turn("user", question.strip()), Turn("assistant", answer_text(answer))]
    return before


def checked_prompt(turns: list[Turn]) -> list[Turn]:
    if not any(turn.role == "user" and turn.text for turn in turns):
        raise ValueError("the prompt has no user's turn")
    if sum(turn.role == "system" for turn in turns[:2]) == 2:
        raise ValueError("the prompt begins with two system turns")
    if turns[-1].role not in ("user", "tool"):
        raise ValueError(f"the prompt ends with the {turns[-1].role}'s turn, not with the user's")
    return turns


# --- answers


def read_answer(row: Row, source: Source, name: str, prompt: list[Turn]) -> str:
    """An answer as `answer_text` cleans it; "" where it is null, or ends with the user.

    In a dialogue in one string the white space at its beginning only separates the answer from the
    mark of the role, and goes too.

    Raises: ValueError where it is missing or no text, and where it is a conversation that does not
        begin with the prompt.
    """
    value = field(row, source, name)
    if value is None:
        path = path_of(row, source, name)
        if is_there(row, path):
            return ""
        raise ValueError(f"no field {path}")
    return answer_of(value, name, prompt, is_dialogue(row, source))


def answer_of(value: Json, name: str, prompt: list[Turn], in_dialogue: bool) -> str:
    """As `read_answer`, of its value. Args: in_dialogue: the prompt is a dialogue in one string."""
    dialogue = turns_of_dialogue(value) if isinstance(value, str) else None
    # a whole conversation; "Assistant: yes" is an answer
    is_whole = dialogue and dialogue[0].role == "user" and in_dialogue
    if isinstance(value, list) or is_whole:
        turns = turns_of_messages(value, name) if isinstance(value, list) else dialogue or []
        answer = last_answer(turns, name)
        if answer and turns and turns != prompt and turns != _without_system(prompt):
            raise ValueError(f"the turns of {name} before its last answer are not the prompt")
        return answer
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return str(number(value, name))  # of a task whose answers are numbers
    # answers of yitingxie/rlhf-reward-datasets begin with "Assistant:", those of the Vicuna sets
    # end with "</s>"
    text = answer_text(string(value, name).rstrip().removesuffix("</s>"))
    if text.lstrip().startswith("Assistant:"):
        return text.lstrip().removeprefix("Assistant:").lstrip()
    return text.lstrip() if in_dialogue else text


def last_answer(turns: list[Turn], name: str) -> str:
    """Take the answer at the end of a conversation; "" where it ends with the user.

    Raises: ValueError where it is the call of a tool, or a tool's.
    """
    if uses_tools(turns[-1:]):
        raise ValueError(f"{name} ends with a tool or the call of one; only `messages` may")
    if not turns or turns[-1].role != "assistant":
        return ""
    return turns.pop().text


def _without_system(turns: list[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.role != "system"]


def is_dialogue(row: Row, source: Source) -> bool:
    """Whether the prompt is a dialogue in one string."""
    prompt = field(row, source, "prompt")
    return isinstance(prompt, str) and turns_of_dialogue(prompt) is not None
