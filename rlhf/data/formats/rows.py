"""Read a row: its prompt as turns, and its answers.

A prompt is a question, a list of messages, or a dialogue in one string:
"\\n\\nHuman: ...\\n\\nAssistant:" as in Anthropic's HH, " Human: ... Assistant:" or
"USER: ... ASSISTANT:". Only a string that begins with such a mark is a dialogue: a role word inside
a question is text.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

from rlhf.config.choices import Format, Template
from rlhf.config.schema import Source
from rlhf.data.formats.fields import (
    BEFORE,
    FIELDS,
    TOOLS_IN,
    Row,
    columns_read,
    detect_format,
    field,
    is_there,
    path_of,
    required,
)
from rlhf.data.formats.messages import (
    Json,
    answer_text,
    kind_of,
    turn_of_tools,
    turns_of_dialogue,
    turns_of_messages,
)
from rlhf.data.records import Pair, Turn, uses_tools


class Skip(Exception):
    """A row that is skipped on purpose.

    Its text is the reason: short, and the same for all rows with this reason, so it can be counted.
    """


RAW = (Format.prompt_chosen_rejected, Format.prompts)  # formats that data.template=none reads


def read_row(row: Row, source: Source, style: Template = Template.hh) -> Pair:
    """The first of `read_pairs`."""
    return read_pairs(row, source, style)[0]


def read_pairs(row: Row, source: Source, style: Template = Template.hh) -> list[Pair]:
    """The prompt and answers of a row, with its other columns.

    One pair; of ranked responses each with each worse one, the best as chosen in the first pair.
    `rejected` is None where a row has one answer only; `chosen` is "" where it has none, or where
    it only calls a tool.

    Args: style: data.template. With `none` texts are kept as they are; only a model's own template
        reads what is about tools.
    Raises: Skip for a row that is skipped on purpose; ValueError with the reason for an unreadable
        one.
    """
    source = replace(source, format=source.format or detect_format([*row, *source.columns]))
    if style is Template.none:
        pairs = [_checked_answers(_raw(row, source))]
    elif source.format == Format.ranked:
        pairs = _ranked_pairs(row, source)
    else:
        pairs = [_read(row, source)]
    columns = _other_columns(row, source, style)
    if style is TOOLS_IN:
        tools = turn_of_tools(field(row, source, "tools"))
        before = [tools] if tools else []
        return [replace(pair, prompt=before + pair.prompt, columns=columns) for pair in pairs]
    if any(uses_tools([*p.prompt, Turn("assistant", p.chosen, p.calls)]) for p in pairs):
        raise ValueError("messages of or for tools need data.template=tokenizer")
    prompt = [Turn(turn.role, turn.text) for turn in pairs[0].prompt]
    return [replace(pair, prompt=prompt, calls="", columns=columns) for pair in pairs]


def _read(row: Row, source: Source) -> Pair:
    match source.format:
        case Format.prompt_chosen_rejected:
            pair = _prompt_chosen_rejected(row, source)
        case Format.chosen_rejected:
            pair = _chosen_rejected(row, source)
        case Format.scored_answers:
            pair = _scored_answers(row, source)
        case Format.instruction:
            pair = _instruction(row, source)
        case Format.messages:
            pair = _conversation(row, source)
        case Format.prompts:
            pair = Pair(_prompt(row, source), "", None)
        case None:
            columns = ", ".join(row)
            raise ValueError(f"no format fits the columns {columns}: give format and columns")
        case format:
            raise ValueError(f"format {format.name} has no prompts and answers")
    if source.format in (Format.prompts, Format.messages) and not pair.chosen:
        return pair  # a conversation may end with the user, or with the call of a tool
    return _checked_answers(pair)


def _checked_answers(pair: Pair) -> Pair:
    """Raises: Skip."""
    if not pair.chosen.strip() or (pair.rejected is not None and not pair.rejected.strip()):
        raise Skip("empty answer")
    if pair.rejected is not None and pair.chosen.strip() == pair.rejected.strip():
        raise Skip("chosen equals rejected")
    return pair


def _ranked_pairs(row: Row, source: Source) -> list[Pair]:
    prompt = _prompt(row, source)
    best_first = sorted(_ranked_responses(row, source, prompt), key=lambda response: response[0])
    if len(best_first) < 2:
        raise Skip("fewer than two responses")
    pairs = [
        Pair(prompt, better, worse)
        for (place, better), (other, worse) in itertools.combinations(best_first, 2)
        if place < other and better.strip() != worse.strip()
    ]
    if not pairs:
        raise Skip("tie")
    return pairs


def read_text(row: Row, source: Source) -> str:
    """The text of a row of plain text. Raises: Skip if it is empty; ValueError if not a string."""
    text = field(row, source, "text")
    if text is None or not _string(text, "text").strip():
        raise Skip("empty text")
    return _string(text, "text")


def _raw(row: Row, source: Source) -> Pair:
    """Prompt and answers as they are, white space too, for data.template=none."""
    assert source.format
    if source.format not in RAW:
        known = " or ".join(format.name for format in RAW)
        raise ValueError(f"data.template=none reads format {known}, not {source.format.name}")
    for name in BEFORE:
        if field(row, source, name):
            raise ValueError(f"data.template=none has no roles, so nowhere to write {name}")
    text = required(row, source, "prompt")
    if isinstance(text, list):
        raise ValueError("prompt is a list, not a string: data.template=none has no roles")
    prompt = [Turn("user", _string(text, "prompt"))]
    if source.format == Format.prompts:
        return Pair(prompt, "", None)
    rejected = field(row, source, "rejected")
    chosen = _string(required(row, source, "chosen"), "chosen")
    return Pair(prompt, chosen, None if rejected is None else _string(rejected, "rejected"))


def _other_columns(row: Row, source: Source, style: Template) -> str:
    """The columns that are no part of the conversation, as JSON, for reward functions.

    The only answer of a row is one of them: it may be the reference that a function compares with.
    """
    read = columns_read(row, source, style)
    if field(row, source, "rejected") is None:
        read -= {path_of(row, source, name) for name in ("chosen", "output")}
    columns = {name: value for name, value in row.items() if name not in read}
    return json.dumps(columns, default=str) if columns else ""


# --- values and their types


def _string(value: Json, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {kind_of(value)}, not a string")
    return value


def _number(value: Json, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {kind_of(value)}, not a number")
    return value


# --- prompts


def _prompt(row: Row, source: Source) -> list[Turn]:
    value = required(row, source, "prompt")
    if isinstance(value, list):
        turns = turns_of_messages(value, "prompt")
    else:
        text = _string(value, "prompt")
        dialogue = turns_of_dialogue(text)
        turns = [Turn("user", text.strip())] if dialogue is None else dialogue
    return _checked_prompt(_before(row, source, turns) + turns)


def _before(row: Row, source: Source, turns: list[Turn]) -> list[Turn]:
    """The turns of the fields `system` and `history`, which come before the others.

    Raises: ValueError where they contradict the others.
    """
    before: list[Turn] = []
    system = field(row, source, "system")
    if system is not None and (text := _string(system, "system").strip()):
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
        question, answer = (_string(text, f"history.{i}") for text in entry)
        before += [Turn("user", question.strip()), Turn("assistant", answer_text(answer))]
    return before


def _checked_prompt(turns: list[Turn]) -> list[Turn]:
    if not any(turn.role == "user" and turn.text for turn in turns):
        raise ValueError("the prompt has no user's turn")
    if sum(turn.role == "system" for turn in turns[:2]) == 2:
        raise ValueError("the prompt begins with two system turns")
    if turns[-1].role not in ("user", "tool"):
        raise ValueError(f"the prompt ends with the {turns[-1].role}'s turn, not with the user's")
    return turns


# --- answers


def _answer(row: Row, source: Source, name: str, prompt: list[Turn]) -> str:
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
    return _answer_of(value, name, prompt, _is_dialogue(row, source))


def _answer_of(value: Json, name: str, prompt: list[Turn], in_dialogue: bool) -> str:
    """As `_answer`, of its value. Args: in_dialogue: the prompt is a dialogue in one string."""
    dialogue = turns_of_dialogue(value) if isinstance(value, str) else None
    # a whole conversation; "Assistant: yes" is an answer
    is_whole = dialogue and dialogue[0].role == "user" and in_dialogue
    if isinstance(value, list) or is_whole:
        turns = turns_of_messages(value, name) if isinstance(value, list) else dialogue or []
        answer = _last_answer(turns, name)
        if answer and turns and turns != prompt and turns != _without_system(prompt):
            raise ValueError(f"the turns of {name} before its last answer are not the prompt")
        return answer
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)  # of a task whose answers are numbers
    # answers of yitingxie/rlhf-reward-datasets begin with "Assistant:", those of the Vicuna sets
    # end with "</s>"
    text = answer_text(_string(value, name).rstrip().removesuffix("</s>"))
    if text.lstrip().startswith("Assistant:"):
        return text.lstrip().removeprefix("Assistant:").lstrip()
    return text.lstrip() if in_dialogue else text


def _last_answer(turns: list[Turn], name: str) -> str:
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


def _is_dialogue(row: Row, source: Source) -> bool:
    """Whether the prompt is a dialogue in one string."""
    prompt = field(row, source, "prompt")
    return isinstance(prompt, str) and turns_of_dialogue(prompt) is not None


def _prompt_chosen_rejected(row: Row, source: Source) -> Pair:
    prompt = _prompt(row, source)
    rejected = None
    if field(row, source, "rejected") is not None:
        rejected = _answer(row, source, "rejected", prompt)
    return Pair(prompt, _answer(row, source, "chosen", prompt), rejected)


def _chosen_rejected(row: Row, source: Source) -> Pair:
    prompt, chosen = _dialogue_and_answer(row, source, "chosen")
    other_prompt, rejected = _dialogue_and_answer(row, source, "rejected")
    if chosen and rejected and prompt != other_prompt:
        raise ValueError("chosen and rejected differ before the last answer")
    return Pair(prompt, chosen, rejected)


def _instruction(row: Row, source: Source) -> Pair:
    more = field(row, source, "input")
    parts = [_string(required(row, source, "instruction"), "instruction").strip()]
    parts.append("" if more is None else _string(more, "input").strip())
    question = "\n\n".join(part for part in parts if part)
    turns = [Turn("user", question)]
    prompt = _checked_prompt(_before(row, source, turns) + turns)
    return Pair(prompt, _answer(row, source, "output", prompt), None)


def _conversation(row: Row, source: Source) -> Pair:
    """A conversation; it has no answer where it ends with the user."""
    turns = turns_of_messages(required(row, source, "messages"), "messages")
    turns = _before(row, source, turns) + turns
    if turns[-1].role in ("user", "tool"):
        return Pair(_checked_prompt(turns), "", None)
    *prompt, last = turns
    if last.role != "assistant":
        raise ValueError(f"the last message is the {last.role}'s, not the assistant's")
    if not last.text and not uses_tools([last]):
        raise Skip("empty answer")
    return Pair(_checked_prompt(prompt), last.text, None, calls=last.more)


def _dialogue_and_answer(row: Row, source: Source, name: str) -> tuple[list[Turn], str]:
    """Prompt and last answer; "" for a dialogue that ends with the user."""
    value = required(row, source, name)
    if isinstance(value, list):
        turns = turns_of_messages(value, name)
    else:
        dialogue = turns_of_dialogue(_string(value, name))
        if dialogue is None:
            raise ValueError(f"{name} is not a dialogue: it does not begin with Human: or USER:")
        turns = dialogue
    answer = _last_answer(turns, name)
    return _checked_prompt(_before(row, source, turns) + turns), answer


def _scored_answers(row: Row, source: Source) -> Pair:
    """The answer with the higher score is the chosen one.

    Citation marks, "[1]" and "[2, 3]", are removed from an answer that comes with quotes: they
    point to the quotes, which the model does not see.
    """
    prompt = _prompt(row, source)
    answers = {}
    for side in "ab":
        answer = _answer(row, source, f"answer_{side}", prompt)
        if field(row, source, f"quotes_{side}") is not None:
            answer = re.sub(r"\s*\[\d+(?:, ?\d+)*\]", "", answer).rstrip()
        answers[side] = answer
    a, b = (_number(required(row, source, key), key) for key in ("score_a", "score_b"))
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


def _ranked_responses(row: Row, source: Source, prompt: list[Turn]) -> list[tuple[float, str]]:
    """Place (the lower, the better) and text of each response; empty ones are left out.

    Raises: ValueError where numbers are missing, or ranks and scores contradict each other.
    """
    values = required(row, source, "responses")
    if not isinstance(values, list):
        raise ValueError(f"responses is {kind_of(values)}, not a list")
    in_dialogue = _is_dialogue(row, source)
    texts = []
    for i, value in enumerate(values):
        whole: Json = [value] if isinstance(value, dict) else value  # a message {role, content}
        texts.append(
            "" if whole in (None, []) else _answer_of(whole, f"responses.{i}", prompt, in_dialogue)
        )
    ranks = _numbers(row, source, "ranks", len(texts))
    scores = _numbers(row, source, "scores", len(texts))
    places = ranks or [-score for score in scores]
    if not places:
        raise ValueError("ranks and scores are empty")
    for (rank, score), (other_rank, other_score) in itertools.combinations(zip(ranks, scores), 2):
        if (rank - other_rank) * (score - other_score) > 0:
            raise ValueError("ranks (1 is the best) and scores contradict each other")
    return [(place, text) for place, text in zip(places, texts) if text.strip()]


def _numbers(row: Row, source: Source, name: str, count: int) -> list[float]:
    """A list of `count` numbers, or [] where the field is missing or empty."""
    values = field(row, source, name)
    if values is None:
        return []
    if not isinstance(values, list) or len(values) != count:
        length = len(values) if isinstance(values, list) else kind_of(values)
        raise ValueError(f"{name}: {length} for {count} responses")
    return [_number(value, f"{name}.{i}") for i, value in enumerate(values)]
