"""Read a row: its prompt as turns, and its answers.

A prompt is a question, a list of messages, or a dialogue in one string:
"\\n\\nHuman: ...\\n\\nAssistant:" as in Anthropic's HH, " Human: ... Assistant:" or
"USER: ... ASSISTANT:". Only a string that begins with such a mark is a dialogue: a role word inside
a question is text.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

from rlhf.config.choices import Format, Template
from rlhf.config.schema import Source
from rlhf.data.formats.fields import (
    BEFORE,
    TOOLS_IN,
    Row,
    columns_read,
    detect_format,
    field,
    path_of,
    required,
)
from rlhf.data.formats.messages import (
    Json,
    kind_of,
    turn_of_tools,
    turns_of_dialogue,
    turns_of_messages,
)
from rlhf.data.formats.parts import (
    answer_of,
    checked_prompt,
    is_dialogue,
    last_answer,
    number,
    read_answer,
    read_prompt,
    string,
    turns_before,
)
from rlhf.data.records import Pair, Turn, uses_tools


class Skip(Exception):
    """A row that is skipped on purpose.

    Its text is the reason: short, and the same for all rows with this reason, so it can be counted.
    """


RAW = (Format.prompt_chosen_rejected, Format.prompts)  # formats that data.template=none reads


NOT_UTF8 = "\ufdd0"  # in place of a byte that is not UTF-8; Unicode gives it to no character
NOT_TEXT = (
    "not UTF-8: save the file as UTF-8; if it is Latin-1, convert it with iconv -f ISO-8859-1 -t "
    "UTF-8"
)
DEEPEST = 100  # objects and lists inside each other; far below what Python's recursion allows


def parse_line(line: str) -> Row:
    """A line of a .jsonl file. Raises: Skip if it is empty, ValueError unless it is an object."""
    if NOT_UTF8 in line:
        raise ValueError(NOT_TEXT)
    line = line.removeprefix("\ufeff")  # some editors put a byte order mark in front of a file
    if not line.strip():
        raise Skip("empty line")
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("a number has more than 4,300 digits") from None
        raise
    if line.count("{") + line.count("[") > DEEPEST and depth(row) > DEEPEST:
        raise ValueError("its JSON is nested too deeply")
    if not isinstance(row, dict):
        raise ValueError("JSON, but not an object {...}")
    return row


def depth(value: Json) -> int:
    """How many objects and lists are inside each other."""
    levels, inside = 0, [value]
    while inside := [one for one in inside if isinstance(one, dict | list)]:
        levels += 1
        inside = [
            child for one in inside for child in (one.values() if isinstance(one, dict) else one)
        ]
    return levels


def check_text(row: Row) -> None:
    """Raises: ValueError where a text of a row of a .csv file is not UTF-8."""
    if any(isinstance(text, str) and NOT_UTF8 in text for text in row.values()):
        raise ValueError(NOT_TEXT)


def first_repeated(names: list[str]) -> str | None:
    """The first name that is there a second time; None where each is there once."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _object(pairs: list[tuple[str, Json]]) -> Row:
    """An object of JSON. Raises: ValueError for a key that it has twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = first_repeated([key for key, _ in pairs])
        raise ValueError(f"the key {twice} is there twice")
    return values


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
        pairs = [_raw(row, source)]
    elif source.format == Format.ranked:
        pairs = _ranked_pairs(row, source)
    else:
        pairs = [_read(row, source)]
    columns, is_messages = _other_columns(row, source, style), _has_messages(row, source)
    pairs = [replace(pair, columns=columns, is_messages=is_messages) for pair in pairs]
    prompt = with_system_prompt(pairs[0].prompt, source)  # all pairs of a row have this prompt
    if style is TOOLS_IN:
        tools = turn_of_tools(field(row, source, "tools"))
        before = [tools] if tools else []
        return [replace(pair, prompt=before + prompt) for pair in pairs]
    if any(uses_tools([*p.prompt, Turn("assistant", p.chosen, p.calls)]) for p in pairs):
        raise ValueError("messages of or for tools need data.template=tokenizer")
    prompt = [Turn(turn.role, turn.text) for turn in prompt]
    return [replace(pair, prompt=prompt, calls="") for pair in pairs]


def with_system_prompt(prompt: list[Turn], source: Source) -> list[Turn]:
    """The prompt, with the source's system prompt in front where it has no system turn."""
    if source.system_prompt is None or any(turn.role == "system" for turn in prompt):
        return prompt
    return [Turn("system", source.system_prompt), *prompt]


def _has_messages(row: Row, source: Source) -> bool:
    """Whether the prompt is a list of messages in the row, and no text."""
    names = {Format.messages: "messages", Format.chosen_rejected: "chosen"}
    name = names.get(source.format or Format.prompts, "prompt")
    return source.format != Format.instruction and isinstance(field(row, source, name), list)


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
            pair = Pair(read_prompt(row, source), "", None)
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
    prompt = read_prompt(row, source)
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
    if text is None or not string(text, "text").strip():
        raise Skip("empty text")
    return string(text, "text")


def _raw(row: Row, source: Source) -> Pair:
    """Prompt and answers as they are, white space too, for data.template=none. Raises: Skip."""
    assert source.format
    if source.format not in RAW:
        known = " or ".join(format.name for format in RAW)
        raise ValueError(
            f"data.template=none reads format {known}, not {source.format.name}: its texts have "
            "roles, so choose another data.template"
        )
    for name in BEFORE:
        if field(row, source, name):
            raise ValueError(f"data.template=none has no roles, so nowhere to write {name}")
    text = required(row, source, "prompt")
    if isinstance(text, list):
        raise ValueError("prompt is a list, not a string: data.template=none has no roles")
    prompt = [Turn("user", string(text, "prompt"))]
    if not prompt[0].text.strip():
        raise ValueError("prompt is empty")
    if source.format == Format.prompts:
        return Pair(prompt, "", None)
    rejected = field(row, source, "rejected")
    chosen = string(required(row, source, "chosen"), "chosen")
    rejected = None if rejected is None else string(rejected, "rejected")
    return _checked_answers(Pair(prompt, chosen, rejected))


def _other_columns(row: Row, source: Source, style: Template) -> str:
    """The columns that are no part of the conversation, as JSON, for reward functions.

    The only answer of a row is one of them: it may be the reference that a function compares with.
    So is an object that the prompt or this answer is a part of.
    """
    read = columns_read(row, source, style)
    partly = ["prompt"]
    if field(row, source, "rejected") is None:
        answers = ("chosen", "output")
        read -= {path_of(row, source, name) for name in answers}
        partly += answers
    paths = [path_of(row, source, name) for name in partly]
    read -= {path.split(".")[0] for path in paths if path not in row}
    columns = {name: value for name, value in row.items() if name not in read}
    return json.dumps(columns, default=str, ensure_ascii=False) if columns else ""


# --- one function for each format


def _prompt_chosen_rejected(row: Row, source: Source) -> Pair:
    prompt = read_prompt(row, source)
    rejected = None
    if field(row, source, "rejected") is not None:
        rejected = read_answer(row, source, "rejected", prompt)
    return Pair(prompt, read_answer(row, source, "chosen", prompt), rejected)


def _chosen_rejected(row: Row, source: Source) -> Pair:
    prompt, chosen = _dialogue_and_answer(row, source, "chosen")
    other_prompt, rejected = _dialogue_and_answer(row, source, "rejected")
    if chosen and rejected and prompt != other_prompt:
        raise ValueError("chosen and rejected differ before the last answer")
    return Pair(prompt, chosen, rejected)


def _instruction(row: Row, source: Source) -> Pair:
    more = field(row, source, "input")
    parts = [string(required(row, source, "instruction"), "instruction").strip()]
    parts.append("" if more is None else string(more, "input").strip())
    question = "\n\n".join(part for part in parts if part)
    turns = [Turn("user", question)]
    prompt = checked_prompt(turns_before(row, source, turns) + turns)
    return Pair(prompt, read_answer(row, source, "output", prompt), None)


def _conversation(row: Row, source: Source) -> Pair:
    """A conversation; it has no answer where it ends with the user."""
    turns = turns_of_messages(required(row, source, "messages"), "messages")
    turns = turns_before(row, source, turns) + turns
    if turns[-1].role in ("user", "tool"):
        return Pair(checked_prompt(turns), "", None)
    *prompt, last = turns
    if last.role != "assistant":
        raise ValueError(f"the last message is the {last.role}'s, not the assistant's")
    if not last.text and not uses_tools([last]):
        raise Skip("empty answer")
    return Pair(checked_prompt(prompt), last.text, None, calls=last.more)


def _dialogue_and_answer(row: Row, source: Source, name: str) -> tuple[list[Turn], str]:
    """Prompt and last answer; "" for a dialogue that ends with the user."""
    value = required(row, source, name)
    if isinstance(value, list):
        turns = turns_of_messages(value, name)
    else:
        dialogue = turns_of_dialogue(string(value, name))
        if dialogue is None:
            raise ValueError(f"{name} is not a dialogue: it does not begin with Human: or USER:")
        turns = dialogue
    answer = last_answer(turns, name)
    return checked_prompt(turns_before(row, source, turns) + turns), answer


def _scored_answers(row: Row, source: Source) -> Pair:
    """The answer with the higher score is the chosen one.

    Citation marks, "[1]" and "[2, 3]", are removed from an answer that comes with quotes: they
    point to the quotes, which the model does not see.
    """
    prompt = read_prompt(row, source)
    answers = {}
    for side in "ab":
        answer = read_answer(row, source, f"answer_{side}", prompt)
        if field(row, source, f"quotes_{side}") is not None:
            answer = re.sub(r"\s*\[\d+(?:, ?\d+)*\]", "", answer).rstrip()
        answers[side] = answer
    a, b = (number(required(row, source, key), key) for key in ("score_a", "score_b"))
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
    in_dialogue = is_dialogue(row, source)
    texts = []
    for i, value in enumerate(values):
        whole: Json = [value] if isinstance(value, dict) else value  # a message {role, content}
        texts.append(
            "" if whole in (None, []) else answer_of(whole, f"responses.{i}", prompt, in_dialogue)
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
    return [number(value, f"{name}.{i}") for i, value in enumerate(values)]
