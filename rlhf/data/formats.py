"""Formats: how the rows of a data set become turns and answers. No code per data set.

A format has named fields (`FIELDS`). A field is the column of that name, or the path in `columns`
of the source: dots lead into objects, `question.full_text`, numbers into lists,
`positive_passages.0.text`.

A prompt is a question, a list of messages, or a dialogue in one string:
"\\n\\nHuman: ...\\n\\nAssistant:" as in Anthropic's HH, " Human: ... Assistant:" or
"USER: ... ASSISTANT:". Only a string that begins with such a mark is a dialogue: a role word inside
a question is text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TypeAlias

from rlhf.config.choices import Format
from rlhf.config.schema import Source
from rlhf.data.records import Pair, Turn

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
Row = dict[str, Json]

FIELDS: dict[Format, tuple[list[str], list[str]]] = {  # required and optional fields
    Format.sandbox: ([], []),
    Format.prompt_chosen_rejected: (["prompt", "chosen"], ["rejected"]),
    Format.chosen_rejected: (["chosen", "rejected"], []),
    Format.scored_answers: (
        ["prompt", "answer_a", "answer_b", "score_a", "score_b"],
        ["quotes_a", "quotes_b"],
    ),
    Format.instruction: (["instruction", "output"], ["input"]),
    Format.messages: (["messages"], []),
    Format.text: (["text"], []),
}
ALIASES = {  # other common names of a column
    "chosen": ["response", "completion", "answer", "output"],
    "messages": ["conversations"],
}
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
MARKS = [("Human:", "Assistant:"), ("USER:", "ASSISTANT:")]


class Skip(Exception):
    """A row that is skipped on purpose.

    Its text is the reason: short, and the same for all rows with this reason, so it can be counted.
    """


def read_row(row: Row, source: Source) -> Pair:
    """The prompt and answers of a row; `rejected` is None where it has one answer only.

    Raises: Skip for a row that is skipped on purpose; ValueError with the reason for an unreadable
        one.
    """
    match source.format or detect_format([*row, *source.columns]):
        case Format.prompt_chosen_rejected:
            pair = _prompt_chosen_rejected(row, source)
        case Format.chosen_rejected:
            pair = _chosen_rejected(row, source)
        case Format.scored_answers:
            pair = _scored_answers(row, source)
        case Format.instruction:
            pair = _instruction(row, source)
        case Format.messages:
            *prompt, last = _messages(_required(row, source, "messages"), "messages")
            if last.role != "assistant":
                raise ValueError(f"the last message is the {last.role}'s, not the assistant's")
            pair = Pair(_checked_prompt(prompt), last.text, None)
        case None:
            columns = ", ".join(row)
            raise ValueError(f"no format fits the columns {columns}: give format and columns")
        case format:
            raise ValueError(f"format {format.name} has no prompts and answers")
    if not pair.chosen or pair.rejected == "":
        raise Skip("empty answer")
    if pair.chosen == pair.rejected:
        raise Skip("chosen equals rejected")
    return pair


def read_text(row: Row, source: Source) -> str:
    """The text of a row of plain text. Raises: Skip if it is empty; ValueError if not a string."""
    text = field(row, source, "text")
    if text is None or not _string(text, "text").strip():
        raise Skip("empty text")
    return _string(text, "text")


def detect_format(columns: Iterable[str]) -> Format | None:
    """The format that fits the names of the columns and of mapped fields; None if none does."""
    has = set(columns)
    if has >= {"prompt", "answer_a", "answer_b", "score_a", "score_b"}:
        return Format.scored_answers
    if has >= {"prompt", "chosen"}:
        return Format.prompt_chosen_rejected
    if has >= {"chosen", "rejected"}:
        return Format.chosen_rejected
    if has & {"messages", "conversations"}:
        return Format.messages
    if has >= {"instruction", "output"}:
        return Format.instruction
    # prompt, completion, label is KTO: the label says whether the answer is good. Training on all
    # answers would be wrong
    if "prompt" in has and has & {*ALIASES["chosen"]} and "label" not in has:
        return Format.prompt_chosen_rejected
    return Format.text if "text" in has else None


def check_columns(columns: Collection[str], source: Source) -> None:
    """Check that a source with these columns has the fields of its format, which must be set.

    Raises: ValueError with one line that names the missing and the existing columns.
    """
    assert source.format is not None
    name = source.format.name
    required, optional = FIELDS[source.format]
    if unknown := [field for field in source.columns if field not in required + optional]:
        known = ", ".join(required + optional)
        raise ValueError(f"format {name} has no field {', '.join(unknown)}, only {known}")
    fields = dict.fromkeys([*required, *source.columns])  # each once
    paths = [_path(columns, source, field) for field in fields]
    if missing := [path for path in paths if not _is_there(columns, path)]:
        raise ValueError(
            f"format {name} needs the columns {', '.join(missing)}; there are {', '.join(columns)}"
        )


def field(row: Row, source: Source, name: str) -> Json:
    """The value of a field of the format.

    None also for [], and where the path meets a missing key or the end of a list.

    Raises: ValueError where the path leads into something that is neither an object nor a list.
    """
    path = _path(row, source, name)
    if path in row:  # a column may have dots in its name
        value = row[path]
    else:
        value = row
        for key in path.split("."):
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and key.isdigit():
                value = value[int(key)] if int(key) < len(value) else None
            elif value is not None:
                raise ValueError(f"{path}: {_kind(value)} has no {key}")
    return None if value == [] else value


def _path(columns: Collection[str], source: Source, name: str) -> str:
    if name in source.columns:
        return source.columns[name]
    return next((column for column in (name, *ALIASES.get(name, ())) if column in columns), name)


def _is_there(columns: Collection[str], path: str) -> bool:
    return path in columns or path.split(".")[0] in columns


# --- values and their types


def _required(row: Row, source: Source, name: str) -> Json:
    value = field(row, source, name)
    if value is None:
        path = _path(row, source, name)
        raise ValueError(f"{name} is empty" if _is_there(row, path) else f"no field {path}")
    return value


def _string(value: Json, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not a string")
    return value


def _number(row: Row, source: Source, name: str) -> float:
    value = _required(row, source, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {_kind(value)}, not a number")
    return value


def _kind(value: Json) -> str:
    """What a value is, for messages."""
    if value is None:
        return "empty"
    if value != value:
        return "nan"
    kinds: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


# --- prompts and answers


def _prompt(row: Row, source: Source) -> list[Turn]:
    value = _required(row, source, "prompt")
    if isinstance(value, list):
        return _checked_prompt(_messages(value, "prompt"))
    text = _string(value, "prompt")
    turns = _dialogue(text)
    return _checked_prompt([Turn("user", text.strip())] if turns is None else turns)


def _checked_prompt(turns: list[Turn]) -> list[Turn]:
    if not any(turn.role == "user" and turn.text for turn in turns):
        raise ValueError("the prompt has no user's turn")
    if turns[-1].role != "user":
        raise ValueError(f"the prompt ends with the {turns[-1].role}'s turn, not with the user's")
    return turns


def _answer(row: Row, source: Source, name: str) -> str:
    """An answer, stripped; "" where it is null, or where its messages end with the user.

    Raises: ValueError where it is missing or not a string.
    """
    value = field(row, source, name)
    if value is None:
        path = _path(row, source, name)
        if _is_there(row, path):
            return ""
        raise ValueError(f"no field {path}")
    if isinstance(value, list):
        last = _messages(value, name)[-1]
        return last.text if last.role == "assistant" else ""
    # answers of yitingxie/rlhf-reward-datasets begin with "Assistant:", those of the Vicuna sets
    # end with "</s>"
    return _string(value, name).strip().removeprefix("Assistant:").removesuffix("</s>").strip()


def _prompt_chosen_rejected(row: Row, source: Source) -> Pair:
    prompt = _prompt(row, source)
    rejected = None
    if field(row, source, "rejected") is not None:
        rejected = _answer(row, source, "rejected")
    return Pair(prompt, _answer(row, source, "chosen"), rejected)


def _chosen_rejected(row: Row, source: Source) -> Pair:
    prompt, chosen = _dialogue_and_answer(row, source, "chosen")
    other_prompt, rejected = _dialogue_and_answer(row, source, "rejected")
    if chosen and rejected and prompt != other_prompt:
        raise ValueError("chosen and rejected differ before the last answer")
    return Pair(prompt, chosen, rejected)


def _instruction(row: Row, source: Source) -> Pair:
    question = _string(_required(row, source, "instruction"), "instruction").strip()
    more = field(row, source, "input")
    if more is not None and _string(more, "input").strip():
        question += "\n\n" + _string(more, "input").strip()
    prompt = _checked_prompt([Turn("user", question)])
    return Pair(prompt, _answer(row, source, "output"), None)


def _dialogue_and_answer(row: Row, source: Source, name: str) -> tuple[list[Turn], str]:
    """Prompt and last answer; "" for a dialogue that ends with the user."""
    value = _required(row, source, name)
    turns = _messages(value, name) if isinstance(value, list) else _dialogue(_string(value, name))
    if turns is None:
        raise ValueError(f"{name} is not a dialogue: it does not begin with Human: or USER:")
    answer = turns.pop().text if turns and turns[-1].role == "assistant" else ""
    return _checked_prompt(turns), answer


def _scored_answers(row: Row, source: Source) -> Pair:
    """The answer with the higher score is the chosen one.

    Citation marks, "[1]" and "[2, 3]", are removed from an answer that comes with quotes: they
    point to the quotes, which the model does not see.
    """
    answers = {}
    for side in "ab":
        answer = _answer(row, source, f"answer_{side}")
        if field(row, source, f"quotes_{side}") is not None:
            answer = re.sub(r"\s*\[\d+(?:, ?\d+)*\]", "", answer).strip()
        answers[side] = answer
    a, b = _number(row, source, "score_a"), _number(row, source, "score_b")
    prompt = _prompt(row, source)
    if a == b:
        raise Skip("tie")
    if source.min_score_ratio > 1:
        if min(a, b) < 0:
            raise ValueError(
                f"scores {a:g} and {b:g}: min_score_ratio needs scores that are not negative"
            )
        if max(a, b) < source.min_score_ratio * min(a, b):
            raise Skip("scores too close")
    chosen, rejected = ("a", "b") if a > b else ("b", "a")
    return Pair(prompt, answers[chosen], answers[rejected])


def _messages(value: Json, name: str) -> list[Turn]:
    """Turns of [{role, content}, ...] or [{from, value}, ...].

    Raises: ValueError that names the message that is not one.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_kind(value)}, not a list of messages")
    turns = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{name}.{i} is {_kind(message)}, not a message")
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{name}.{i}: unknown role {role}; known are {', '.join(ROLES)}")
        turns.append(Turn(ROLES[role], _string(text, f"{name}.{i}").strip()))
    return turns


def _dialogue(text: str) -> list[Turn] | None:
    """Turns of a string that begins with the mark of a role; None for other strings.

    An empty assistant turn at the end is dropped: the answer goes there.

    A later mark counts where a turn of this dialogue begins: after a blank line if the assistant's
    turns do, else after a line break if they do, else after any space (or Vicuna's "</s>"). In the
    last two cases it counts only where the roles alternate. So "Human:" inside a sentence of HH is
    text.
    """
    stripped = text.strip()
    marks = next((marks for marks in MARKS if stripped.startswith(marks)), None)
    if marks is None:
        return None
    blank = r"\n\n"
    separators = [blank] if text.startswith("\n\nHuman:") else [blank, r"\n", r"(?:\s|</s>)"]
    between = next((s for s in separators if re.search(s + marks[1], stripped)), blank)
    dialogue = "\n\n" + stripped
    starts: list[re.Match[str]] = []
    for start in re.finditer(rf"{between}({'|'.join(marks)})", dialogue):
        if between == blank or not starts or start[1] != starts[-1][1]:
            starts.append(start)
    ends = [start.start() for start in starts[1:]] + [len(dialogue)]
    turns = [
        Turn(
            "user" if start[1] == marks[0] else "assistant",
            dialogue[start.end() : end].strip().removesuffix("</s>").strip(),
        )
        for start, end in zip(starts, ends)
    ]
    return turns[:-1] if turns[-1] == Turn("assistant", "") else turns
