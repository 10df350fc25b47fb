"""Rows of the sources that a stage is trained on, estimated before the data are read."""

from __future__ import annotations

import contextlib
import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config.choices import Format, Template
from rlhf.config.schema import Data, Source
from rlhf.data.files import find_files
from rlhf.data.formats.fields import detect_format
from rlhf.data.formats.rows import Skip, parse_line, read_pairs

# preference pairs of data sets on the hub, from their cards
HUB_ROWS = {
    "Dahoas/rm-static": 76256,
    "Dahoas/full-hh-rlhf": 112052,
    "Anthropic/hh-rlhf": 160800,
}
SAMPLE = 100  # first lines of each file, which show what its rows have


class Rows(NamedTuple):
    """What the rows of a source have, before they are split among the stages."""

    answered: float  # rows with an answer: demonstrations and prompts
    answers: float  # all answers of the conversations
    pairs: float  # of ranked responses several per row
    prompts: float  # rows without an answer


def estimate_rows(data: Data, share: str, every_answer: bool = False) -> int | None:
    """About how many rows of all sources a share of the data gets: "sft", "rm" or "ppo".

    Rows that are skipped are not known, and the hash of the prompts divides them by chance.

    Args: every_answer: of "sft" count every answer of a conversation.
    Returns: None where a source is neither a known data set nor made of local .jsonl files.
    """
    counts = [rows_of_source(source, data.template) for source in data.sources.values()]
    parts = [part / sum(data.shares) for part in data.shares]
    total = 0.0
    for source, rows in zip(data.sources.values(), counts):
        if rows is None:
            return None
        if every_answer:
            rows = rows._replace(answered=rows.answers)
        trained = 1.0 if source.eval_split else 1 - data.eval_share
        total += trained * rows_of_share(source, rows, share, parts)
    return int(total)


def rows_of_share(source: Source, rows: Rows, share: str, parts: list[float]) -> float:
    """Rows of a source in a share, as rlhf/data/splits.py divides them. Args: parts: sum to 1."""
    has_pairs = bool(rows.pairs) and not source.sft_only
    if share == "rm":
        return rows.pairs * parts[1] * source.weight if has_pairs else 0.0
    if share == "ppo":
        count = 0.0 if source.sft_only else rows.answered * parts[2] + rows.prompts
        return count * min(source.weight, 1)
    part = parts[0] if has_pairs else parts[0] + parts[1]
    return rows.answered * (1.0 if source.sft_only else part) * source.weight


def rows_of_source(source: Source, style: Template = Template.hh) -> Rows | None:
    """What the rows of a source have; None where that is not known before they are read.

    Args: style: data.template.
    """
    if source.path in HUB_ROWS:
        count = limited(HUB_ROWS[source.path], source)
        return Rows(count, count, count, 0)
    try:
        files = find_files(source.path).files
        if any(file.suffix != ".jsonl" for file in files):
            return None
        lines = limited(sum(count_lines(file) for file in files), source)
        first = [row for file in files for row in first_rows(file)]
    except (ValueError, OSError):  # the stage says what is wrong
        return None
    columns = dict.fromkeys(column for row in first for column in row)
    format = source.format or detect_format([*columns, *source.columns])
    if format == Format.text:
        return Rows(0, 0, 0, 0)
    if format is None or not first:
        return None
    return scaled(dataclasses.replace(source, format=format), style, first, lines)


def scaled(source: Source, style: Template, first: list[dict[str, Any]], lines: int) -> Rows | None:
    """What all lines have, if they are like the first ones; None if none of those can be read."""
    answered = answers = pairs = prompts = 0
    for row in first:
        try:
            records = read_pairs(row, source, style)
        except (Skip, ValueError):
            continue
        has_answer = bool(records[0].chosen or records[0].calls)
        answered += has_answer
        answers += has_answer + sum(turn.role == "assistant" for turn in records[0].prompt)
        prompts += not has_answer
        pairs += sum(record.rejected is not None for record in records)
    each = lines / len(first)
    if not answered and not prompts:
        return None
    return Rows(answered * each, answers * each, pairs * each, prompts * each)


def first_rows(file: Path) -> list[dict[str, Any]]:
    """The first lines of a file that are objects. Raises: ValueError where it is not UTF-8."""
    rows = []
    with open(file, encoding="utf-8") as lines:
        for line in islice(lines, SAMPLE):
            with contextlib.suppress(Skip, ValueError):
                rows.append(parse_line(line))
    return rows


def count_lines(file: Path) -> int:
    with open(file, "rb") as lines:
        return sum(1 for _ in lines)


def limited(count: int, source: Source) -> int:
    """At most `rows` of the source."""
    return count if source.rows is None else min(count, source.rows)
