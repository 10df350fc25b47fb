"""Which columns a format has, and which format fits a data set's columns.

A format has named fields (`FIELDS`). A field is the column of that name, or the path in `columns`
of the source: dots lead into objects, `question.full_text`, numbers into lists,
`positive_passages.0.text`, and `*` to all entries of a list: `completions.*.response`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rlhf.config.choices import Format, Template
from rlhf.config.schema import Source
from rlhf.data.formats.messages import MORE, READ, Json, kind_of

Row = dict[str, Json]
TOOLS_IN = Template.tokenizer  # the one style that can write what is about tools

# optional fields of prompts: what comes before the question. Tools are for a model's own template.
BEFORE = ["system", "history", "tools"]
FIELDS: dict[Format, tuple[list[str], list[str]]] = {  # required and optional fields
    Format.sandbox: ([], []),
    Format.arithmetic: ([], []),
    Format.prompt_chosen_rejected: (["prompt", "chosen"], ["rejected", *BEFORE]),
    Format.chosen_rejected: (["chosen", "rejected"], ["system", "tools"]),
    Format.scored_answers: (
        ["prompt", "answer_a", "answer_b", "score_a", "score_b"],
        ["quotes_a", "quotes_b", *BEFORE],
    ),
    Format.ranked: (["prompt", "responses"], ["ranks", "scores", *BEFORE]),  # one of the two
    Format.instruction: (["instruction", "output"], ["input", *BEFORE]),
    Format.messages: (["messages"], ["system", "tools"]),
    Format.prompts: (["prompt"], BEFORE),
    Format.text: (["text"], []),
}
ALIASES = {  # other common names of a column
    "prompt": ["question"],
    "chosen": ["response", "completion", "answer", "output"],
    "messages": ["conversations"],
}


def detect_format(columns: Iterable[str]) -> Format | None:
    """The format that fits the names of the columns and of mapped fields; None if none does."""
    has = set(columns)
    if has >= {"prompt", "answer_a", "answer_b", "score_a", "score_b"}:
        return Format.scored_answers
    if has >= {"prompt", "chosen"}:
        return Format.prompt_chosen_rejected
    if has >= {"chosen", "rejected"}:
        return Format.chosen_rejected
    if has & {"prompt", "question"} and "responses" in has and has & {"ranks", "scores"}:
        return Format.ranked
    if has & {"messages", "conversations"}:
        return Format.messages
    if has >= {"instruction", "output"}:
        return Format.instruction
    if is_kto(has):
        return None
    if has & {"prompt", "question"}:
        answers = has & {*ALIASES["chosen"]}
        return Format.prompt_chosen_rejected if answers else _prompts_only(has)
    return Format.text if "text" in has else None


def _prompts_only(columns: set[str]) -> Format | None:
    """`question` alone may have its answers in columns of unknown names."""
    return Format.prompts if "prompt" in columns else None


def is_kto(columns: Collection[str]) -> bool:
    """Whether a label says which answers are good: training on all of them would be wrong."""
    return {"prompt", "completion", "label"} <= set(columns)


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
    paths = [path_of(columns, source, field) for field in fields]
    if missing := [path for path in paths if not is_there(columns, path)]:
        raise ValueError(
            f"format {name} needs the columns {', '.join(missing)}; there are {', '.join(columns)}"
        )
    orders = [path_of(columns, source, field) for field in ("ranks", "scores")]
    if source.format == Format.ranked and not any(is_there(columns, path) for path in orders):
        raise ValueError(
            f"format {name} needs a column ranks or scores; there are {', '.join(columns)}"
        )


def columns_read(row: Row, source: Source, style: Template) -> set[str]:
    """The columns of a row that its format reads, and the paths into them."""
    assert source.format is not None
    required, optional = FIELDS[source.format]
    fields = [name for name in required + optional if name != "tools" or style is TOOLS_IN]
    paths = {path_of(row, source, name) for name in fields}
    return paths | {path.split(".")[0] for path in paths}


def unread_columns(rows: Iterable[Row], source: Source, style: Template = Template.hh) -> list[str]:
    """Columns, and parts of messages, that these rows have and that their format does not read.

    Parts of messages are named messages[].NAME. Empty ones do not count.

    Args: style: data.template; only a model's own template reads what is about tools.
    """
    unread: dict[str, None] = {}
    has_tools = style is TOOLS_IN
    for row in rows:
        read = columns_read(row, source, style)
        for column, value in row.items():
            if value in (None, "", []):
                continue
            if column not in read:
                unread[column] = None
            elif isinstance(value, list):
                # of a pair's answers only the text is read
                known = READ | MORE if has_tools and column not in ("chosen", "rejected") else READ
                messages = [part for part in value if isinstance(part, dict) and part.keys() & READ]
                parts = {key for message in messages for key in message if message[key]}
                unread |= dict.fromkeys(f"{column}[].{key}" for key in sorted(parts - known))
    return list(unread)


def field(row: Row, source: Source, name: str) -> Json:
    """The value of a field of the format.

    None also for [], and where the path meets a missing key or the end of a list.

    Raises: ValueError where the path leads into something that is neither an object nor a list.
    """
    path = path_of(row, source, name)
    # a column may have dots in its name
    value = row[path] if path in row else _follow(row, path.split("."), path)
    return None if value == [] else value


def _follow(value: Json, keys: list[str], path: str) -> Json:
    """Where the keys of a path lead. Raises: ValueError that names the path."""
    for i, key in enumerate(keys):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key == "*":
            return [_follow(entry, keys[i + 1 :], path) for entry in value]
        elif isinstance(value, list) and key.isdecimal():
            value = value[int(key)] if int(key) < len(value) else None
        elif value is not None:
            raise ValueError(f"{path}: {kind_of(value)} has no {key}")
    return value


def required(row: Row, source: Source, name: str) -> Json:
    """The value of a field. Raises: ValueError where it is missing or empty."""
    value = field(row, source, name)
    if value is None:
        path = path_of(row, source, name)
        raise ValueError(f"{name} is empty" if is_there(row, path) else f"no field {path}")
    return value


def path_of(columns: Collection[str], source: Source, name: str) -> str:
    """Where a field is: the path given in `columns` of the source, or the first of its names.

    "" for `system` or `history` where another field has the column of that name.
    """
    if name in source.columns:
        return source.columns[name]
    if name in BEFORE and name in source.columns.values():
        return ""
    return next((column for column in (name, *ALIASES.get(name, ())) if column in columns), name)


def is_there(columns: Collection[str], path: str) -> bool:
    """Whether a path begins with one of the columns."""
    return path in columns or path.split(".")[0] in columns
