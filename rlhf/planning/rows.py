"""Rows of the sources that a stage is trained on, estimated before the data are read."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config.choices import Format, Template
from rlhf.config.schema import Data, Source
from rlhf.data.files import find_files, suffix_of
from rlhf.data.formats.fields import detect_format
from rlhf.data.formats.rows import Skip, parse_line, read_pairs
from rlhf.data.text_files import (
    BROKEN,
    check_sizes,
    holds_lines,
    open_compressed,
    separator_of,
)

# preference pairs of data sets on the hub, from their cards
HUB_ROWS = {
    "Dahoas/rm-static": 76256,
    "Dahoas/full-hh-rlhf": 112052,
    "Anthropic/hh-rlhf": 160800,
}
SAMPLE = 100  # first rows of each file, which show what all have


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
    Returns: None where a source is neither a known data set nor made of local files.
    """
    most_row = data.max_row_mb * 2**20
    counts = [rows_of_source(one, data.template, most_row) for one in data.sources.values()]
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


def rows_of_source(
    source: Source, style: Template = Template.hh, most_row: int = 2**24
) -> Rows | None:
    """What the rows of a source have; None where that is not known before they are read.

    Args: style: data.template.  most_row: bytes of a row in a file of text.
    """
    if source.path in HUB_ROWS:
        count = limited(HUB_ROWS[source.path], source)
        return Rows(count, count, count, 0)
    try:
        files = find_files(source.path).files
        for file in files:
            check_sizes(file, most_row)
        samples = [known_sample(file, source) for file in files]
    except (ValueError, RecursionError, csv.Error, *BROKEN):  # the stage says what is wrong
        return None
    count = limited(sum(sample.rows for sample in samples), source)
    first = [row for sample in samples for row in sample.first]
    columns = dict.fromkeys(column for row in first for column in row)
    format = source.format or detect_format([*columns, *source.columns])
    if format == Format.text:
        return Rows(0, 0, 0, 0)
    if format is None or not first:
        return None
    return scaled(dataclasses.replace(source, format=format), style, first, count)


def scaled(source: Source, style: Template, first: list[dict[str, Any]], count: int) -> Rows | None:
    """What all rows have, if they are like the first ones; None if none of those can be read."""
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
    each = count / len(first)
    if not answered and not prompts:
        return None
    return Rows(answered * each, answers * each, pairs * each, prompts * each)


class FileSample(NamedTuple):
    """The number of rows of a file, and the first ones."""

    rows: int
    first: list[dict[str, Any]]


_samples: dict[tuple[object, ...], FileSample] = {}  # a plan tries many changes on the same files


def known_sample(file: Path, source: Source) -> FileSample:
    """`sample_file`, read once as long as the file does not change."""
    state = file.stat()
    key = (file.resolve(), state.st_size, state.st_mtime_ns, repr(source))
    if key not in _samples:
        _samples[key] = sample_file(file, source)
    return _samples[key]


def sample_file(file: Path, source: Source) -> FileSample:
    """The rows of a file as rlhf/data/files.py reads them, without the `datasets` library.

    Raises: ValueError, RecursionError, csv.Error or BROKEN where it cannot be read.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        return sample_parquet(file)
    if suffix == ".csv":
        return sample_csv(file, source)
    if suffix == ".json" and not holds_lines(file):
        with open_compressed(file) as content:
            rows = json.load(content)
        if not isinstance(rows, list):
            raise ValueError("not a list of rows")
        return FileSample(len(rows), [row for row in rows[:SAMPLE] if isinstance(row, dict)])
    return sample_lines(file)


def sample_lines(file: Path) -> FileSample:
    """Of a file with an object in each line."""
    first = []
    with open_compressed(file) as lines:
        for line in islice(lines, SAMPLE):
            with contextlib.suppress(Skip, ValueError):
                first.append(parse_line(line.decode()))
        lines.seek(0)
        return FileSample(sum(1 for _ in lines), first)


def sample_csv(file: Path, source: Source) -> FileSample:
    """Of a .csv file, whose fields may have line ends; an empty one is null, scores are numbers."""
    csv.field_size_limit(2**31 - 1)
    scores = [source.columns.get(name, name) for name in ("score_a", "score_b")]
    with open_compressed(file) as content:
        text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=separator_of(file))
        first = [
            {
                name: float(text) if text and name in scores else text or None
                for name, text in row.items()
            }
            for row in islice(reader, SAMPLE)
        ]
        return FileSample(len(first) + sum(1 for _ in reader), first)


def sample_parquet(file: Path) -> FileSample:
    """Of a .parquet file: the number of rows is in its footer."""
    import pyarrow.parquet  # takes a third of a second, for these files only

    with open_compressed(file) as content, pyarrow.parquet.ParquetFile(content) as table:
        batches = table.iter_batches(batch_size=SAMPLE)
        first: list[dict[str, Any]] = next((batch.to_pylist() for batch in batches), [])
        return FileSample(table.metadata.num_rows, first)


def limited(count: int, source: Source) -> int:
    """At most `rows` of the source."""
    return count if source.rows is None else min(count, source.rows)
