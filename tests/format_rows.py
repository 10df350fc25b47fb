"""Turns, rows and sources, which the tests of data formats share."""

from __future__ import annotations

from typing import Any

from rlhf.config.choices import Format, Template
from rlhf.config.schema import Source
from rlhf.data.formats.rows import read_pairs
from rlhf.data.records import Pair, Turn


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def source(format: str | None = None, **fields: Any) -> Source:
    return Source(path="x", format=Format[format] if format else None, **fields)


def read_row(row: dict[str, Any], source: Source, style: Template = Template.hh) -> Pair:
    """The pair of a row that gives one."""
    [pair] = read_pairs(row, source, style)
    return pair


def scored(a: Any, b: Any) -> dict[str, Any]:
    return {"prompt": "q", "answer_a": "first", "answer_b": "second", "score_a": a, "score_b": b}
