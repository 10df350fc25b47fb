"""Turns of a list of messages, and of a dialogue in one string."""

from __future__ import annotations

import json
import re
from typing import TypeAlias

from rlhf.config.schema import Source
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
    "tool": "tool",  # what a tool returns
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "assistant",  # in ShareGPT's layout its text is the call
}
READ = {"role", "from", "content", "value"}  # keys of a message
# keys that only a model's own template reads (`Turn.more`); function_call becomes tool_calls
MORE = {"tool_calls", "function_call", "tool_call_id", "name", "reasoning_content"}
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
    """Turns of [{role, content}, ...] or [{from, value}, ...], with calls of tools.

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
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: unknown role {role}; known are {', '.join(ROLES)}")
        key = "content" if message.get("content") is not None or "value" not in message else "value"
        content = message.get(key)
        more = {key: message[key] for key in sorted(MORE) if message.get(key)}
        if role == "function_call":
            more["function_call"], content = content, ""
        if "function_call" in more:
            more["tool_calls"] = [{"type": "function", "function": more.pop("function_call")}]
        if "tool_calls" in more:
            more["tool_calls"] = _calls(more["tool_calls"], where)
            content = "" if content is None else content
        if content is None and key not in message:
            raise ValueError(f"{where} has no content")
        text, role = text_of(content, f"{where}.{key}"), ROLES[role]
        text = answer_text(text) if role == "assistant" else text.strip()
        turns.append(Turn(role, text, json.dumps(more, ensure_ascii=False) if more else ""))
    return turns


def _calls(calls: Json, where: str) -> Json:
    """Calls of tools as templates expect them: [{type, function: {name, arguments: {...}}}].

    The arguments, and in ShareGPT's layout the whole call, may be JSON in a string.
    """
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls is {kind_of(calls)}, not a list")
    read: list[Json] = []
    for call in calls:
        given = call.get("function", call) if isinstance(call, dict) else call
        function = _parsed(given)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a call of a tool needs the name of a function")
        arguments = _parsed(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}: the arguments of {function['name']} are no JSON object")
        function = function | {"arguments": arguments}
        others = call if isinstance(call, dict) and "function" in call else {"type": "function"}
        read.append(others | {"function": function})
    return read


def without_padding_of_tools(row: dict[str, Json], source: Source) -> dict[str, Json]:
    """A row of a table without the nulls in its tools and calls of tools.

    A column of a table has one type, so each tool, and each call, has the keys of all of them:
    those that are not its own are null.
    """

    def without_nulls(value: Json) -> Json:
        if isinstance(value, list):
            return [without_nulls(one) for one in value]
        if isinstance(value, dict):
            return {key: without_nulls(one) for key, one in value.items() if one is not None}
        return value

    def in_calls(value: Json) -> Json:
        if isinstance(value, list):
            return [in_calls(one) for one in value]
        if isinstance(value, dict):
            calls = ("tool_calls", "function_call")
            return {k: without_nulls(v) if k in calls else in_calls(v) for k, v in value.items()}
        return value

    tools = source.columns.get("tools", "tools")
    return {
        name: without_nulls(value) if name == tools else in_calls(value)
        for name, value in row.items()
    }


def _parsed(value: Json) -> Json:
    """The value of a string that is JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
    except RecursionError:
        raise ValueError("JSON in a string is nested too deeply") from None


def turn_of_tools(value: Json) -> Turn | None:
    """The definitions of tools as a turn of their own; None where there are none.

    Args: value: a list of objects, which may be JSON in a string.  Raises: ValueError.
    """
    tools = _parsed(value)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools is {kind_of(tools)}, not a list of objects")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"tools.{i} is {kind_of(tool)}, not an object")
    return Turn("tools", json.dumps(tools, ensure_ascii=False))


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
