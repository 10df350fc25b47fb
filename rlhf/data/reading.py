"""Read a split of a source: rows become records on disk; skipped rows are counted by reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf.base.errors import UserError
from rlhf.base.log import cut, printable
from rlhf.config.choices import Format, Template
from rlhf.config.schema import Data, Source
from rlhf.config.validation import check_used
from rlhf.data import formats
from rlhf.data.cache import Columns, cached_map, digest
from rlhf.data.files import SAVED, RawTable, kind_of_source, media_columns, open_source
from rlhf.data.formats import fields
from rlhf.data.formats.messages import without_padding_of_tools
from rlhf.data.formats.rows import Skip, check_text, parse_line, read_pairs, read_text
from rlhf.data.records import PAIR_COLUMNS, Pair, SourceReport, Turn, record_features
from rlhf.data.row_problems import UNREADABLE, skipped_in_words, usable_rows

if TYPE_CHECKING:
    import datasets

FIRST_ROWS = 1000  # are looked at for columns that no format reads
LONGEST_REASON = 400  # characters of what is wrong with a row; it may quote the row
KNOWN_COLUMNS = (
    "prompt, chosen, rejected; chosen, rejected; messages; instruction, output; prompt, response;"
    " prompt, responses, ranks or scores; prompt; text"
)


class SourceSplit(NamedTuple):
    """The records of one split of a source. Plain text has no hashes."""

    table: datasets.Dataset  # the columns of `records.Dataset`; or text
    report: SourceReport
    is_text: bool
    prompt_hash: np.ndarray  # uint64, one per row
    row_hash: np.ndarray  # uint64
    is_pair: np.ndarray  # bool
    has_answer: np.ndarray  # bool; False: a prompt for online RL only
    is_further: np.ndarray  # bool: a pair of ranked responses, but not the first of its row


def read_split(name: str, source: Source, split: str, cfg: Data) -> SourceSplit:
    """The records of a split of a source, without the rows that are skipped.

    Args: name: the source's key in `data.sources`.
    Raises: UserError that names the source, and the line or row.
    """
    import pyarrow.compute as pc

    raw = open_source(name, source, split, cfg.max_row_mb * 2**20)
    if not len(raw.table):
        raise UserError(f"data.sources.{name}: {source.path} ({split}) is empty")
    if source.rows is not None:
        first_rows = raw.table.select(range(min(source.rows, len(raw.table))))
        raw = raw._replace(table=first_rows)
    if media := media_columns(raw.table):
        raw = raw._replace(table=raw.table.remove_columns(media))
    first = _first_rows(name, source, raw)
    source = with_format(name, source, {column: None for row in first for column in row})
    table = _convert(name, source, raw, cfg)
    numbers = _row_numbers(table)
    rows = int(numbers[-1]) + 1
    report = SourceReport(source=name, split=split, rows=rows, skipped={})
    if len(table) > rows:
        report["further"] = len(table) - rows
    if kind_of_source(source.path) not in ("", "a file", SAVED):
        report["files"], report["not_read"] = [Path(f).name for f in raw.files], raw.not_read
    if raw.separators:
        report["separators"] = raw.separators
    if unread := [*fields.unread_columns(first, source, cfg.template), *media]:
        report["unread"] = unread
    problems = table.data.column("problem")
    readable = usable_rows(problems, numbers, report, raw, cfg.on_bad_row)
    if not len(readable):
        why = skipped_in_words(report)
        raise UserError(
            f"data.sources.{name}: all rows of {source.path} ({split}) are skipped: {why}"
        )
    report["content"] = _content(table, readable)  # a resumed run must find the same
    if source.format == Format.text:
        return _texts(table, readable, report)
    if source.system_prompt is not None:
        own = count_own_system_turns(table, readable, source.system_prompt)
        report |= {"own_system": own} if own else {}
    answers = pc.binary_join_element_wise(
        table.data.column("chosen"), table.data.column("calls"), ""
    )
    has_answer = pc.not_equal(answers, "")
    has_rejected = ~table.data.column("rejected").is_null().to_numpy()[readable]
    return SourceSplit(
        table.select_columns(list(record_features())).select(readable),
        report,
        is_text=False,
        prompt_hash=_column(table, "prompt_hash")[readable],
        row_hash=_column(table, "row_hash")[readable],
        is_pair=has_rejected & (not source.sft_only),
        has_answer=has_answer.to_numpy(zero_copy_only=False)[readable],
        is_further=_column(table, "further")[readable],
    )


def count_own_system_turns(table: datasets.Dataset, readable: np.ndarray, added: str) -> int:
    """Rows whose system turn is their own, not the one that is added."""
    own = 0
    for batch in table.select_columns(["prompt"]).select(readable).iter(1000):
        for prompt in batch["prompt"]:
            texts = [turn["text"] for turn in prompt if turn["role"] == "system"]
            own += bool(texts) and texts != [added]
    return own


def with_format(name: str, source: Source, first: dict[str, Any]) -> Source:
    """The source with its format, which is detected from or checked against its first row.

    Raises: UserError that names the columns.
    """
    columns = list(first)
    format = source.format or fields.detect_format([*columns, *source.columns])
    if format is None and fields.is_kto(columns):
        raise UserError(
            f"data.sources.{name}: {source.path} has prompt, completion, label (KTO): single"
            " answers that are good or bad, which no stage trains on; for SFT keep the good ones"
            " and remove the column label, or make pairs of them"
        )
    if format is None:
        is_csv = ".csv" in Path(source.path).suffixes
        of_csv = " (the first line of a .csv names them)" if is_csv else ""
        raise UserError(
            f"data.sources.{name}: {source.path} has the columns {', '.join(columns)}{of_csv}; give"
            f" format and columns. Known: {KNOWN_COLUMNS}"
        )
    source = dataclasses.replace(source, format=format)
    try:
        fields.check_columns(columns, source)
    except ValueError as error:
        raise UserError(f"data.sources.{name}: {source.path}: {error}") from None
    if unused := list(check_used(name, source)):
        raise UserError("\n".join(unused))
    return source


def _first_rows(name: str, source: Source, raw: RawTable) -> list[dict[str, Any]]:
    """Some rows, which show the columns and what is in them.

    Raises: UserError when none of the first lines is an object.
    """
    of_each_file = math.ceil(FIRST_ROWS / len(raw.starts))
    ends = [*raw.starts[1:], len(raw.table)]
    numbers = [
        row
        for start, end in zip(raw.starts, ends)
        for row in range(start, min(end, start + of_each_file, len(raw.table)))
    ]
    first = raw.table.select(numbers)
    if not raw.by_line:
        return list(first)
    rows, problem = [], ""
    for number, line in zip(numbers, first):
        try:
            rows.append(parse_line(line["text"]))
        except Skip:
            continue
        except ValueError as error:
            problem = problem or f"{raw.place(number)}: {error}"
    if rows:
        return rows
    problem = problem or f"{raw.place(0)} is empty"
    raise UserError(f"data.sources.{name}: no line is a JSON object {{...}}: {problem}")


def _convert(name: str, source: Source, raw: RawTable, cfg: Data) -> datasets.Dataset:
    """All rows as records with a column `problem`, which is "" where a row is fine; cached."""
    import datasets

    strings, hashes = datasets.Value("string"), datasets.Value("uint64")
    is_text = source.format == Format.text
    if is_text:
        features = {"text": strings}
    else:
        features = {**record_features(), "prompt_hash": hashes, "further": datasets.Value("bool")}
    features |= {"problem": strings, "row_hash": hashes}
    columns = sorted(source.columns.items())
    settings = (
        source.format,
        columns,
        source.min_score_ratio,
        source.system_prompt,
        raw.by_line,
        cfg.seed,
        cfg.template,
    )
    package = Path(formats.__file__).parent.glob("*.py")
    code = [path.read_text(encoding="utf-8") for path in [Path(__file__), *sorted(package)]]
    key = digest(raw.table._fingerprint, str(settings), *code)
    if is_text:
        convert = partial(read_texts, source=source, by_line=raw.by_line)
    else:
        convert = partial(
            read_rows, source=source, by_line=raw.by_line, seed=cfg.seed, style=cfg.template
        )
    features = datasets.Features(features)
    return cached_map(raw.table, convert, features, key, f"reading {name}", cfg.workers)


def _row_numbers(table: datasets.Dataset) -> np.ndarray:
    """The number of the row that each record was read from: a row may give several."""
    if "further" not in table.column_names:
        return np.arange(len(table))
    return np.cumsum(~_column(table, "further")) - 1


def _texts(table: datasets.Dataset, readable: np.ndarray, report: SourceReport) -> SourceSplit:
    """Plain text, each text once."""
    hashes = _column(table, "row_hash")[readable]
    distinct = readable[np.sort(np.unique(hashes, return_index=True)[1])]
    if len(distinct) < len(readable):
        report["skipped"]["duplicate text"] = len(readable) - len(distinct)
    report["texts"] = len(distinct)
    nothing = np.array([], dtype=np.uint64)
    none = nothing.astype(bool)
    texts = table.select_columns(["text"]).select(distinct)
    return SourceSplit(texts, report, True, nothing, nothing, none, none, none)


def _content(table: datasets.Dataset, readable: np.ndarray) -> str:
    """A hash of all rows that could be read, 16 hexadecimal digits."""
    content = hashlib.sha256(_column(table, "row_hash")[readable].tobytes())
    if "columns" in table.column_names:  # a reference that changes makes other rewards
        for batch in table.select_columns(["columns"]).iter(1000):
            content.update("\0".join(batch["columns"]).encode())
    return content.hexdigest()[:16]


def _column(table: datasets.Dataset, name: str) -> np.ndarray:
    return table.data.column(name).to_numpy(zero_copy_only=False)


# --- from a batch of raw rows to records; worker processes run this


def read_rows(
    batch: Columns, source: Source, by_line: bool, seed: int, style: Template
) -> dict[str, Any]:
    """A batch of raw rows as records; `problem` is "" where a row is fine.

    A row of ranked responses gives several records; all but the first are `further`.
    """
    names = (*PAIR_COLUMNS, "prompt_hash", "problem", "row_hash", "further")
    columns: Columns = {name: [] for name in names}
    configured = Turn("system", source.system_prompt or "")
    for row in _raw_rows(batch):
        pairs, prompt_hash, row_hashes, problem = [Pair([], "", None)], 0, [0], ""
        try:
            records = read_pairs(parsed(row, source, by_line), source, style)
            # case, spaces and the configured system prompt do not make another prompt
            prompt = "|".join(
                f"{turn.role}:{' '.join(turn.text.lower().split())}{turn.more}"
                for turn in records[0].prompt
                if turn != configured
            )
            prompt_hash = hash_text(f"{seed}|{prompt}")
            row_hashes = [hash_text(content_of(prompt, record)) for record in records]
            records[0].columns.encode()  # half of a character in another column, too, is refused
            pairs = records
        except Skip as reason:
            problem = str(reason)
        except UnicodeEncodeError as error:
            problem = UNREADABLE + half_a_pair(error)
        except ValueError as error:
            problem = UNREADABLE + printable(cut(str(error), LONGEST_REASON))
        for i, pair in enumerate(pairs):
            columns["prompt"].append([asdict(turn) for turn in pair.prompt])
            for name in PAIR_COLUMNS[1:]:
                columns[name].append(getattr(pair, name))
            columns["prompt_hash"].append(prompt_hash)
            columns["row_hash"].append(row_hashes[i] if not problem else 0)
            columns["problem"].append(problem)
            columns["further"].append(i > 0)
    return columns | {name: _uint64(columns[name]) for name in ("prompt_hash", "row_hash")}


def content_of(prompt: str, record: Pair) -> str:
    """What makes two records the same, as one string."""
    return json.dumps([prompt, record.chosen + record.calls, record.rejected], ensure_ascii=False)


def read_texts(batch: Columns, source: Source, by_line: bool) -> dict[str, Any]:
    """A batch of raw rows as plain texts; `problem` is "" where a row is fine."""
    columns: Columns = {"text": [], "problem": [], "row_hash": []}
    for row in _raw_rows(batch):
        text, row_hash, problem = "", 0, ""
        try:
            record = read_text(parsed(row, source, by_line), source)
            row_hash = hash_text(record)
            text = record
        except Skip as reason:
            problem = str(reason)
        except UnicodeEncodeError as error:
            problem = UNREADABLE + half_a_pair(error)
        except ValueError as error:
            problem = UNREADABLE + printable(cut(str(error), LONGEST_REASON))
        columns["text"].append(text)
        columns["problem"].append(problem)
        columns["row_hash"].append(row_hash)
    return columns | {"row_hash": _uint64(columns["row_hash"])}


def parsed(row: dict[str, Any], source: Source, by_line: bool) -> dict[str, Any]:
    """A raw row by its columns. Raises: Skip; ValueError where it cannot be read."""
    if by_line:
        return parse_line(row["text"])
    check_text(row)
    return without_padding_of_tools(row, source)


def half_a_pair(error: UnicodeEncodeError) -> str:
    """What is wrong with a text that is not valid Unicode, such as "\\ud83d" alone in JSON."""
    half = f"\\u{ord(error.object[error.start]):04x}"
    return f"a text has {half}, half of a surrogate pair, which is no character: remove it"


def _raw_rows(batch: Columns) -> list[dict[str, Any]]:
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


def _uint64(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def hash_text(text: str) -> int:
    """64 bits of SHA-256. Raises: UnicodeEncodeError for half of a surrogate pair."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
