"""How the rows of a data set become turns and answers: a handful of formats for all of them, no code per data set.

A format has named fields (`FIELDS`). A field is the column of its name, or the path that `columns` of the source gives:
dots lead inside, `question.full_text`, and numbers into lists, `positive_passages.0.text`.

A prompt is a bare question, a list of messages, or a dialogue in one string: "\\n\\nHuman: ...\\n\\nAssistant:" as in Anthropic's HH,
" Human: ... Assistant:" or "USER: ... ASSISTANT:". Only a string that begins with such a mark is a dialogue: role words in a
question stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from rlhf.config.choices import Format
from rlhf.config.schema import Source
from rlhf.data.records import Pair, Turn

FIELDS: dict[Format, tuple[list[str], list[str]]] = {  # required and optional ones
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
ALIASES = {  # other usual names of a column
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
    """A row that is left out on purpose. Its text is the reason, short and the same for all such rows, so it can be counted."""


def read_row(row: dict[str, Any], source: Source) -> Pair:
    """The prompt and answers of a row; `rejected` is None where it has one answer only.

    Raises: Skip for a row that is left out on purpose; ValueError, with the reason, for one that cannot be read.
    """
    match source.format or detect_format([*row, *source.columns]):
        case Format.prompt_chosen_rejected:
            prompt = _prompt(row, source)
            rejected = (
                None if field(row, source, "rejected") is None else _answer(row, source, "rejected")
            )
            pair = Pair(prompt, _answer(row, source, "chosen"), rejected)
        case Format.chosen_rejected:
            (prompt, chosen), (other, rejected) = (
                _whole_dialogue(row, source, name) for name in ("chosen", "rejected")
            )
            if chosen and rejected and prompt != other:
                raise ValueError("chosen and rejected differ before the last answer")
            pair = Pair(prompt, chosen, rejected)
        case Format.scored_answers:
            pair = _scored_answers(row, source)
        case Format.instruction:
            question, more = (
                _is_text(_required(row, source, "instruction"), "instruction").strip(),
                field(row, source, "input"),
            )
            if more is not None and _is_text(more, "input").strip():
                question += "\n\n" + more.strip()
            pair = Pair(
                _checked_prompt([Turn("user", question)]), _answer(row, source, "output"), None
            )
        case Format.messages:
            *prompt, last = _messages(_required(row, source, "messages"), "messages")
            if last.role != "assistant":
                raise ValueError(f"the last message is the {last.role}'s, not the assistant's")
            pair = Pair(_checked_prompt(prompt), last.text, None)
        case None:
            raise ValueError(
                f"no format fits the columns {', '.join(row)}: give format and columns"
            )
        case format:
            raise ValueError(f"format {format.name} has no questions and answers")
    if not pair.chosen or pair.rejected == "":
        raise Skip("empty answer")
    if pair.chosen == pair.rejected:
        raise Skip("the same answer twice")
    return pair


def read_text(row: dict[str, Any], source: Source) -> str:
    """The text of a row of plain text, as it is. Raises: Skip when it is empty; ValueError when it is no text."""
    text = field(row, source, "text")
    if text is None or not _is_text(text, "text").strip():
        raise Skip("empty text")
    return text


def detect_format(columns: Iterable[str]) -> Format | None:
    """The format that fits the names of the columns (and of mapped fields); None when none does."""
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
    # prompt, completion, label: whether each answer is a good one (KTO). To learn them all would be wrong
    if "prompt" in has and has & {*ALIASES["chosen"]} and "label" not in has:
        return Format.prompt_chosen_rejected
    return Format.text if "text" in has else None


def check_columns(columns: Collection[str], source: Source) -> None:
    """Whether a source with these columns has the fields of its format, which must be set.

    Raises: ValueError with one line that names what is missing and what there is.
    """
    assert source.format is not None
    required, optional = FIELDS[source.format]
    if unknown := [name for name in source.columns if name not in required + optional]:
        raise ValueError(
            f"format {source.format.name} has no field {', '.join(unknown)}, only {', '.join(required + optional)}"
        )
    paths = {name: _path(columns, source, name) for name in [*required, *source.columns]}
    if missing := [path for path in paths.values() if not _is_there(columns, path)]:
        raise ValueError(
            f"format {source.format.name} needs the columns {', '.join(missing)}; there are {', '.join(columns)}"
        )


def field(row: dict[str, Any], source: Source, name: str) -> Any:
    """The value of a field of the format, or None: for null and [], and where a key or a place of a list on the way is missing.

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


# ------------------------------------------------------------------------------------------------------- fields of certain types


def _required(row: dict[str, Any], source: Source, name: str) -> Any:
    value = field(row, source, name)
    if value is None:
        raise ValueError(
            f"{name} is empty"
            if _is_there(row, _path(row, source, name))
            else f"no field {_path(row, source, name)}"
        )
    return value


def _is_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not a text")
    return value


def _number(row: dict[str, Any], source: Source, name: str) -> float:
    value = _required(row, source, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {_kind(value)}, not a number")
    return value


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return (
        "empty"
        if value is None
        else "nan"
        if value != value
        else kinds.get(type(value), f"a {type(value).__name__}")
    )


# ------------------------------------------------------------------------------------------------------------ prompts and answers


def _prompt(row: dict[str, Any], source: Source) -> list[Turn]:
    value = _required(row, source, "prompt")
    if isinstance(value, list):
        return _checked_prompt(_messages(value, "prompt"))
    text = _is_text(value, "prompt")
    turns = _dialogue(text)
    return _checked_prompt([Turn("user", text.strip())] if turns is None else turns)


def _checked_prompt(turns: list[Turn]) -> list[Turn]:
    if not any(turn.role == "user" and turn.text for turn in turns):
        raise ValueError("the prompt has no user's turn")
    if turns[-1].role != "user":
        raise ValueError(f"the prompt ends with the {turns[-1].role}'s turn, not with the user's")
    return turns


def _answer(row: dict[str, Any], source: Source, name: str) -> str:
    """An answer, stripped; "" where it is null, or messages end with the user. Raises: ValueError where it is no text, or not there."""
    value = field(row, source, name)
    if value is None and _is_there(row, _path(row, source, name)):
        return ""
    if value is None:
        raise ValueError(f"no field {_path(row, source, name)}")
    if isinstance(value, list):
        last = _messages(value, name)[-1]
        return last.text if last.role == "assistant" else ""
    # yitingxie/rlhf-reward-datasets begins its answers with "Assistant:", the Vicuna sets end theirs with "</s>"
    return _is_text(value, name).strip().removeprefix("Assistant:").removesuffix("</s>").strip()


def _whole_dialogue(row: dict[str, Any], source: Source, name: str) -> tuple[list[Turn], str]:
    """Prompt and last answer; the answer of a dialogue that ends with the user is empty."""
    value = _required(row, source, name)
    turns = _messages(value, name) if isinstance(value, list) else _dialogue(_is_text(value, name))
    if turns is None:
        raise ValueError(f"{name} is no dialogue: it does not begin with Human: or USER:")
    answer = turns.pop().text if turns and turns[-1].role == "assistant" else ""
    return _checked_prompt(turns), answer


def _scored_answers(row: dict[str, Any], source: Source) -> Pair:
    """The answer with the higher score is the chosen one. Marks of citations, "[1]" and "[2, 3]", are taken out of an answer that
    comes with quotes: they point to these, and the model that learns from the answer does not see them."""
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
            raise Skip("scores too near")
    return Pair(prompt, *((answers["a"], answers["b"]) if a > b else (answers["b"], answers["a"])))


def _messages(value: Any, name: str) -> list[Turn]:
    """Turns of [{role, content}, ...] or [{from, value}, ...]. Raises: ValueError naming the message that is none."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_kind(value)}, not a list of messages")
    turns = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{name}.{i} is {_kind(message)}, not a message")
        role, text = (
            message.get(key, message.get(other))
            for key, other in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{name}.{i}: unknown role {role}; known are {', '.join(ROLES)}")
        turns.append(Turn(ROLES[role], _is_text(text, f"{name}.{i}").strip()))
    return turns


def _dialogue(text: str) -> list[Turn] | None:
    """Turns of a string that begins with the mark of a role, None for others. An empty turn of the assistant at the end is left
    out: there the answer goes.

    A mark within counts where a turn of this dialogue begins: after a blank line if the assistant's turns do, else after a line
    break if they do, else after any space (or Vicuna's "</s>"), and in these two only where the roles take turns. So HH's "Human:"
    amid a sentence is text.
    """
    stripped = text.strip()
    marks = next((marks for marks in MARKS if stripped.startswith(marks)), None)
    if marks is None:
        return None
    blank = r"\n\n"
    separators = [blank] if text.startswith("\n\nHuman:") else [blank, r"\n", r"(?:\s|</s>)"]
    between = next((s for s in separators if re.search(s + marks[1], stripped)), blank)
    whole = "\n\n" + stripped
    starts: list[re.Match[str]] = []
    for start in re.finditer(rf"{between}({'|'.join(marks)})", whole):
        if between == blank or not starts or start[1] != starts[-1][1]:
            starts.append(start)
    ends = [start.start() for start in starts[1:]] + [len(whole)]
    turns = [
        Turn(
            "user" if start[1] == marks[0] else "assistant",
            whole[start.end() : end].strip().removesuffix("</s>").strip(),
        )
        for start, end in zip(starts, ends)
    ]
    return turns[:-1] if turns[-1] == Turn("assistant", "") else turns
