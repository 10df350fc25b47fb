"""Settings and data sets of the tests of sources, and what holds for every prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_files import Record
from helpers import composed

from rlhf.config.choices import BadRow
from rlhf.config.schema import Data, Source
from rlhf.data.records import Dataset, Prompt


def config(on_bad_row: BadRow = BadRow.skip, workers: int | None = None, **of_sources: Any) -> Data:
    """Settings with sources by name: a path, or a Source."""
    data = composed().data
    data.sandbox, data.eval_share, data.eval_rows, data.on_bad_row, data.workers = (
        None,
        0.1,
        10_000,
        on_bad_row,
        workers,
    )
    data.sources = {
        name: s if isinstance(s, Source) else Source(path=str(s)) for name, s in of_sources.items()
    }
    return data


def saved(path: Path, **splits: list[Record]) -> Path:
    """A directory of save_to_disk with splits."""
    import datasets

    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(records) for name, records in splits.items()}
    ).save_to_disk(str(path))
    return path


def questions_of(table: Any) -> list[str]:
    """The questions of a table, or of a list of prompts, in one spelling."""
    prompts = (
        r.turns if isinstance(r, Prompt) else r["prompt"] if isinstance(r, dict) else r.prompt
        for r in table
    )
    return [
        turn["text"].lower() if isinstance(turn, dict) else turn.text.lower()
        for *_, turn in prompts
    ]


def parts(data: Dataset) -> dict[str, set[str]]:
    return {
        "sft": set(questions_of(data.sft)),
        "rm": set(questions_of(data.rm)),
        "ppo": set(questions_of(data.ppo)),
        "eval": set(questions_of(data.eval_sft)),
    }


def assert_apart(data: Dataset) -> None:
    found = list(parts(data).values())
    assert sum(map(len, found)) == len(set().union(*found))
    assert set(questions_of(data.eval_rm)) | set(questions_of(data.eval_prompts)) <= set(
        questions_of(data.eval_sft)
    )


def assert_counts_add_up(data: Dataset) -> None:
    sizes = {"sft": len(data.sft), "rm": len(data.rm), "ppo": len(data.ppo)}
    for part, size in sizes.items():
        assert sum(report[part] for report in data.report if part in report) == size
    for report in data.report:
        into = sum(report[part] for part in ("sft", "rm", "ppo", "eval", "texts") if part in report)
        made = report["rows"] + report.get("further", 0) + report.get("copies", 0)
        assert made == into + sum(report["skipped"].values()), report
