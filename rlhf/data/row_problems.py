"""What became of the rows of a source: which can be used, and why the others cannot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf.base.errors import UserError
from rlhf.base.log import plural
from rlhf.config.choices import BadRow
from rlhf.data.files import RawTable
from rlhf.data.records import SourceReport

if TYPE_CHECKING:
    import pyarrow as pa

UNREADABLE = "unreadable: "  # begins the problem of a row that cannot be read
MOST_KINDS = 10  # of unreadable rows that are named, the most frequent ones


def usable_rows(
    problems: pa.ChunkedArray,
    numbers: np.ndarray,
    report: SourceReport,
    raw: RawTable,
    on_bad_row: BadRow,
) -> np.ndarray:
    """The numbers of the records without a problem; the report gets the other ones.

    Args:
        problems: of each record; "" where it is fine.
        numbers: the row that each record was read from.
    Raises: UserError where no row of a file can be read, or one cannot and `on_bad_row` refuses
        that.
    """
    import pyarrow.compute as pc

    skipped = report["skipped"]
    unreadable = pc.starts_with(problems, UNREADABLE)  # with a message of its own each
    counts = pc.value_counts(problems.filter(pc.invert(unreadable))).to_pylist()
    skipped |= {count["values"]: count["counts"] for count in counts if count["values"]}
    examples = {
        reason: raw.place(int(numbers[pc.index(problems, reason).as_py()])) for reason in skipped
    }
    if pc.any(unreadable).as_py():
        bad = numbers[unreadable.to_numpy(zero_copy_only=False)]
        texts = [text.removeprefix(UNREADABLE) for text in problems.filter(unreadable).to_pylist()]
        if on_bad_row == BadRow.refuse:
            raise UserError(f"{of_source(report)}: {raw.place(int(bad[0]))}: {texts[0]}")
        refuse_unreadable_files(bad, texts, numbers, report, raw)
        examples |= report_unreadable(bad, texts, report, raw)
    if examples:
        report["examples"] = examples
    return np.flatnonzero(pc.equal(problems, "").to_numpy(zero_copy_only=False))


def skipped_in_words(report: SourceReport) -> str:
    """The reasons why rows are skipped, with their counts and the first row of each."""
    examples = report.get("examples", {})
    return ", ".join(
        f"{count:,} {reason}"
        + (f" (the first is {examples[reason]})" if reason in examples else "")
        for reason, count in report["skipped"].items()
    )


def of_source(report: SourceReport) -> str:
    return f"data.sources.{report['source']}"


def refuse_unreadable_files(
    bad: np.ndarray,
    texts: Sequence[str],
    numbers: np.ndarray,
    report: SourceReport,
    raw: RawTable,
) -> None:
    """Refuse a file of which no row can be read.

    Args: bad, texts: the unreadable rows and what is wrong with them.  numbers: all rows.
    """
    file_of_row = np.searchsorted(raw.starts, numbers, side="right") - 1
    file_of_bad = np.searchsorted(raw.starts, bad, side="right") - 1
    rows_of_file = np.bincount(file_of_row)
    all_bad = rows_of_file == np.bincount(file_of_bad, minlength=len(rows_of_file))
    hopeless = np.flatnonzero(all_bad[file_of_bad])
    if not hopeless.size:
        return
    first, kinds = hopeless[0], Counter(map(kind_of, texts))
    of_it = " of it" if len(raw.files) > 1 else ""
    raise UserError(
        f"{of_source(report)}: {raw.place(int(bad[first]))}: {texts[first]} (and no other row"
        f"{of_it} can be read" + (f": {kinds_of_rows(kinds)})" if len(kinds) > 1 else ")")
    )


def report_unreadable(
    bad: np.ndarray, texts: Sequence[str], report: SourceReport, raw: RawTable
) -> dict[str, str]:
    """Add the unreadable rows to the report. Args: as `refuse_unreadable_files`.

    Returns: the first row of each kind that the report names, with what is wrong with it.
    """
    kinds = list(map(kind_of, texts))
    counts = Counter(kinds)
    report["skipped"]["unreadable"] = len(bad)
    report["first_unreadable"] = f"{of_source(report)}: {raw.place(int(bad[0]))}: {texts[0]}"
    report["unreadable"] = dict(counts.most_common(MOST_KINDS))
    if len(counts) > MOST_KINDS:
        report["more_kinds"] = len(counts) - MOST_KINDS
    firsts = {kind: kinds.index(kind) for kind in report["unreadable"]}
    return {kind: f"{raw.place(int(bad[i]))}: {texts[i]}" for kind, i in firsts.items()}


def kind_of(text: str) -> str:
    """What is wrong with a row, without its numbers: rows of a kind are counted together."""
    return re.sub(r"\d+", "N", text)


def kinds_of_rows(kinds: Counter[str]) -> str:
    """The most frequent reasons why rows are unreadable, with their counts, in words."""
    counted = [f"{plural(count, 'row')} {kind}" for kind, count in kinds.most_common(MOST_KINDS)]
    return "; ".join(counted)
