"""The key reference, docs/keys.md: python -m rlhf.config.reference > docs/keys.md."""

from __future__ import annotations

import typing
from enum import Enum

from rlhf.config.keys import Key, schema

HEAD = """# Keys

Every key of the configuration with its type, its range and its meaning, made from the schema
(`rlhf/config/`) by `python -m rlhf.config.reference > docs/keys.md`. `python train.py --help KEY`
prints the same with the value of a command. Values are in `conf/`. A name in capitals is yours to
choose. Keys in *italics* change no result, so they are not part of a run's identity. One *score
unit* is what a reward model's score varies by: its standard deviation over held-out
demonstrations (`rl.normalize_score`). Scores of python functions keep the unit that the function
gives them.
"""


def type_name(annotation: object) -> str:
    """A type as users write values: "number or null", "one of fixed, adaptive, linear"."""
    if annotation is bool:
        return "true or false"
    if annotation is typing.Any:
        return "any value"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(member.name for member in annotation)}"
    if isinstance(annotation, type):
        plain = {"int": "whole number", "float": "number", "str": "text"}
        return plain.get(annotation.__name__, annotation.__name__)
    inner = typing.get_args(annotation)
    if type(None) in inner:
        return f"{type_name(next(a for a in inner if a is not type(None)))} or null"
    if typing.get_origin(annotation) is list:
        return f"list of {type_name(inner[0])}"
    return f"names with {type_name(inner[1])} each"


def row(key: Key) -> str:
    """One key as a row of a table."""
    name = key.name.replace("*", "NAME")
    shown = f"`{name}`" if key.hashed else f"*`{name}`*"
    limits = f"; {key.range}" if key.range else ""
    return f"| {shown} | {type_name(key.annotation)}{limits} | {key.meaning} |"


def reference() -> str:
    """The whole page."""
    lines = [HEAD]
    for top in (key for name, key in schema().items() if "." not in name):
        below = [key for name, key in schema().items() if name.startswith(f"{top.name}.")]
        leaves = [key for key in below if not key.is_node and not key.name.endswith("*")]
        if not leaves:
            continue
        lines += [f"## {top.name}", "", f"{top.meaning[0].upper()}{top.meaning[1:]}.", ""]
        lines += ["| key | value | meaning |", "|---|---|---|", *map(row, leaves), ""]
    single = [key for name, key in schema().items() if "." not in name and not key.is_node]
    lines += ["## Top level", "", "| key | value | meaning |", "|---|---|---|", *map(row, single)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
