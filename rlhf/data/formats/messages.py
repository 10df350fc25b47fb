"""Turns of a list of messages, and of a dialogue in one string."""

from __future__ import annotations

import re
from typing import TypeAlias

from rlhf.data.records import Turn

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
TOOLS = ("tool", "function", "observation", "ipython")  # roles of what a tool returns
CALLS = ("tool_calls", "function_call")  # keys of a message that calls one
NO_TOOLS = "conversations with tools are not read"
READ = {"role", "from", "content", "value"}  # keys of a message
MARKS = [("Human:", "Assistant:"), ("USER:", "ASSISTANT:")]


def kind_of(value: Json) -> str:
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


def turns_of_messages(value: Json, name: str) -> list[Turn]:
    """Turns of [{role, content}, ...] or [{from, value}, ...].

    Texts are stripped; those of the assistant keep the indentation of their first line.

    Raises: ValueError that names the message that is not one.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} is {kind_of(value)}, not a list of messages")
    turns = []
    for i, message in enumerate(value):
        where = f"{name}.{i}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {kind_of(message)}, not a message")
        role = message.get("from") if message.get("role") is None else message["role"]
        if role in TOOLS or any(message.get(key) for key in CALLS):
            raise ValueError(f"{where} is of or for a tool: {NO_TOOLS}")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: unknown role {role}; known are {', '.join(ROLES)}")
        content = message.get("content")
        text = text_of(message.get("value") if content is None else content, where)
        role = ROLES[role]
        turns.append(Turn(role, answer_text(text) if role == "assistant" else text.strip()))
    return turns


def answer_text(text: str) -> str:
    """An answer without blank lines at its beginning and white space at its end.

    The indentation of its first line stays: code may begin with it.
    """
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def text_of(content: Json, where: str) -> str:
    """The text of a message: a string, or a list of parts {type: text, text: ...}.

    Raises: ValueError for other parts (images, ...), and for what is no text.
    """
    if isinstance(content, list) and content:
        return "".join(_text_of_part(part, f"{where}.{i}") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{where} is {kind_of(content)}, not a string")
    return content


def _text_of_part(part: Json, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        raise ValueError(f"{where} is {kind}, not a part of type text")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where} is a part without text")
    return text


def turns_of_dialogue(text: str) -> list[Turn] | None:
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
