"""Sources -> the data of all stages: read every source, split its rows among the stages, mix them.

Only a few numbers per row are in memory. The records are in the cache of the `datasets` library,
under a key of content, settings and the code that read them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rlhf.base.constants import SCORE_UNIT_ROWS
from rlhf.base.errors import UserError
from rlhf.config.schema import Data, Source
from rlhf.data.files import SAVED, kind_of_source
from rlhf.data.reading import SourceSplit, read_split
from rlhf.data.records import (
    PAIR_COLUMNS,
    Dataset,
    Demonstration,
    Pair,
    Prompt,
    RowCounts,
    SourceReport,
    Turn,
)
from rlhf.data.splits import FURTHER_PAIR, PARTS, Part, RowFacts, split_rows


def load_sources(cfg: Data) -> Dataset:
    """Read all sources of `data.sources`, split them into the stages' parts, and mix them.

    A hash of a prompt's text decides its part, so a prompt is in one part only, whatever the
    sources, their order and their versions. Where a source has an evaluation split of its own, that
    is used, and its prompts are not trained on. Duplicate rows count once. SFT learns the chosen
    answers.

    Raises: UserError that names the source and what is wrong with it.
    """
    import datasets

    read: list[SourceSplit] = []
    facts: list[RowFacts] = []
    for name, source in cfg.sources.items():
        splits = splits_of(name, source)
        for part, split, held_out in splits:
            one = read_split(name, part, split, cfg)
            read.append(one)
            if not one.is_text:
                facts.append(_facts(one, source, len(splits) > 1, held_out, table=len(facts)))
    if not facts:
        raise UserError(
            f"data={'+'.join(cfg.sources)}: plain text only; add a source with prompts and answers"
        )
    texts = [one.table for one in read if one.is_text]
    reports = [one.report for one in read if not one.is_text]
    rows = RowFacts(*(np.concatenate(arrays) for arrays in zip(*facts)))
    parts, skipped = split_rows(rows, cfg)
    _count_rows(reports, rows, parts, skipped)

    table = datasets.concatenate_datasets([one.table for one in read if not one.is_text])
    # sources mixed, and in the same order whatever the order of the sources
    held_out_rows = parts["eval"][np.argsort(rows.row_hash[parts["eval"]])]
    first_pairs = held_out_rows[~rows.is_further[held_out_rows]]  # with the best response
    most = max(cfg.eval_rows, SCORE_UNIT_ROWS)
    first_held_out = [pair_of(row) for row in table.select(first_pairs[:most])]
    evaluated = first_held_out[: cfg.eval_rows]
    held_out_pairs = held_out_rows[rows.is_pair[held_out_rows]][: cfg.eval_rows]
    names = [reports[number]["source"] for number in rows.table[held_out_pairs]]
    return Dataset(
        sft=table.select(parts["sft"]),
        rm=table.select(parts["rm"]),
        ppo=table.select(parts["ppo"]),
        eval_sft=demonstrations_of(evaluated),
        score_unit=demonstrations_of(first_held_out[:SCORE_UNIT_ROWS]),
        eval_rm=[
            dataclasses.replace(pair_of(row), source=name)
            for row, name in zip(table.select(held_out_pairs), names)
        ],
        eval_prompts=list(
            {
                str(pair.prompt): Prompt(pair.prompt, pair.columns, pair.is_messages)
                for pair in evaluated
            }.values()
        ),
        texts=datasets.concatenate_datasets(texts) if texts else None,
        report=[one.report for one in read],
        counts=counts_of(rows),
    )


def splits_of(name: str, source: Source) -> list[tuple[Source, str, bool]]:
    """The splits to read, and whether each is held out for evaluation.

    Files have one split only; their `eval_split` is another file, folder or pattern.

    Args: name: the source's key in `data.sources`.
    Raises: UserError for settings that files do not have.
    """
    train = (source, source.split, False)
    where, kind = f"data.sources.{name}", kind_of_source(source.path)
    is_files = kind not in ("", SAVED)
    if kind and source.config is not None:
        raise UserError(f"{where}.config={source.config}: {source.path} is {kind}; it has none")
    if is_files and source.split != "train":
        raise UserError(f"{where}.split={source.split}: {source.path} is {kind}; it has none")
    if source.eval_split is None:
        return [train]
    if not is_files:
        return [train, (source, source.eval_split, True)]
    if kind_of_source(source.eval_split) in ("", SAVED):
        raise UserError(
            f"{where}.eval_split={source.eval_split}: no such file; {source.path} is {kind}, so its"
            " eval_split is another file, folder or pattern to evaluate on"
        )
    return [train, (dataclasses.replace(source, path=source.eval_split), "eval", True)]


def counts_of(rows: RowFacts) -> RowCounts:
    """What the rows of all sources have."""
    return RowCounts(
        rows=len(rows.prompt_hash),
        prompts=len(np.unique(rows.prompt_hash)),
        answers=int(rows.has_answer.sum()),
        pairs=int(rows.is_pair.sum()),
    )


def demonstrations_of(pairs: list[Pair]) -> list[Demonstration]:
    """The chosen answers, where there are any."""
    return [
        Demonstration(pair.prompt, pair.chosen, pair.calls)
        for pair in pairs
        if pair.chosen or pair.calls
    ]


def pair_of(row: dict[str, Any]) -> Pair:
    """A row of a table as an object."""
    prompt = [Turn(**turn) for turn in row["prompt"]]
    return Pair(prompt, **{name: row[name] for name in PAIR_COLUMNS[1:]})


def _facts(
    one: SourceSplit, source: Source, has_eval_split: bool, held_out: bool, table: int
) -> RowFacts:
    rows = len(one.table)
    return RowFacts(
        one.prompt_hash,
        one.row_hash,
        one.is_pair,
        one.has_answer,
        one.is_further,
        sft_only=np.full(rows, source.sft_only),
        has_eval_split=np.full(rows, has_eval_split),
        held_out=np.full(rows, held_out),
        weight=np.full(rows, 1.0 if held_out else source.weight),
        table=np.full(rows, table),
    )


def _count_rows(
    reports: list[SourceReport],
    rows: RowFacts,
    parts: dict[Part, np.ndarray],
    skipped: dict[str, np.ndarray],
) -> None:
    """Fill in the reports, one per table: the rows of each part, skipped rows, and copies."""

    def by_table(index: np.ndarray) -> list[int]:
        return np.bincount(rows.table[index], minlength=len(reports)).tolist()

    for report, count in zip(reports, by_table(skipped.pop(FURTHER_PAIR))):
        if "further" in report:  # those that some stage gets
            report["further"] -= count
    for reason, index in skipped.items():
        for report, count in zip(reports, by_table(index)):
            if count:
                report["skipped"][reason] = count
    for part, index in parts.items():
        for report, count in zip(reports, by_table(index)):
            report[part] = count
    for report in reports:  # a row of weight 2 is in its part twice
        rows_used = sum(report[part] for part in PARTS) + sum(report["skipped"].values())
        report["copies"] = rows_used - report["rows"] - report.get("further", 0)
