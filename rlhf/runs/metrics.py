"""The metrics of a run, read from its metrics.jsonl: a column per metric. No torch here.

A file of 1,000,000 lines is read in blocks, so that memory holds columns of numbers and no objects.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 23  # bytes read at once
LONG = 1 << 20  # bytes from which it pays to import pyarrow
MAX_QUOTED = 40  # characters of a wrong value in a message


class Column(NamedTuple):
    """The values of one metric, and the numbers of the rows that have it, from 0."""

    rows: NDArray[np.int32]
    values: NDArray[np.float64]


class Points(NamedTuple):
    """Points of a curve."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass
class Metrics:
    """The rows of a metrics.jsonl by column."""

    count: int = 0  # of rows
    columns: dict[str, Column] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)  # what is skipped, a line each

    def __len__(self) -> int:
        return self.count

    def curve(self, metric: str) -> Points:
        """A metric over the steps, in the order of the rows; NaN and infinite values too."""
        return self.pairs("step", metric)

    def pairs(self, x: str, y: str) -> Points:
        """Two metrics in the rows that have both."""
        if x not in self.columns or y not in self.columns:
            return Points(np.empty(0), np.empty(0))
        one, other = self.columns[x], self.columns[y]
        if np.array_equal(one.rows, other.rows):
            return Points(one.values, other.values)
        _, i, j = np.intersect1d(one.rows, other.rows, assume_unique=True, return_indices=True)
        return Points(one.values[i], other.values[j])


def read_metrics(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> Metrics:
    """Read a metrics.jsonl; no rows where there is no file.

    A damaged row, and a value that is no number, are skipped and named in `damage`. The last line
    counts only when it is complete: the run may be writing it.

    Args: wanted: whether the column of a name is kept; "step" always is.
    Raises: OSError when the file cannot be read.
    """
    parts: dict[str, list[Column]] = {}
    reader = LineReader()
    count = 0
    for block in blocks(file):
        columns, rows = read_long_block(block) or reader.read(block)
        for name, (at, values) in columns.items():
            if name == "step" or wanted(name):
                parts.setdefault(name, []).append(Column(at + np.int32(count), values))
        count += rows
    # one column after the other, so that not all are in memory twice
    joined = {name: Column(*map(np.concatenate, zip(*parts.pop(name)))) for name in [*parts]}
    return Metrics(count, joined, reader.damage(file))


def count_rows(file: Path) -> int:
    """The number of complete lines of a file that begin as a row does; 0 where there is none, or it
    cannot be read."""
    try:
        return sum(block.startswith(b"{") + block.count(b"\n{") for block in blocks(file))
    except OSError:
        return 0


def blocks(file: Path) -> Iterator[bytes]:
    """The complete lines of a file, in blocks."""
    if not file.exists():
        return
    rest = b""
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            block = rest + block
            end = block.rfind(b"\n") + 1
            rest = block[end:]
            if end:
                yield block[:end]


def read_long_block(block: bytes) -> tuple[dict[str, Column], int] | None:
    """The columns of a long block, and its number of rows; None where it is short, or has anything
    but rows of numbers."""
    if len(block) < LONG:
        return None
    import pyarrow as pa
    import pyarrow.json

    try:
        options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block))
        table = pyarrow.json.read_json(io.BytesIO(block), read_options=options)
        columns = {}
        for name in table.column_names:
            column = table[name].combine_chunks()
            is_there = column.is_valid().to_numpy(zero_copy_only=False)
            if column.type not in (pa.int64(), pa.float64()):
                return None
            values = column.drop_null().cast(pa.float64(), safe=False)
            columns[name] = Column(np.flatnonzero(is_there).astype(np.int32), values.to_numpy())
    except pa.ArrowException:
        return None
    return (columns, table.num_rows) if table.num_rows == block.count(b"\n") else None


class LineReader:
    """Reads blocks line by line, and remembers what it has skipped."""

    def __init__(self) -> None:
        self.bad_rows, self.bad_values = 0, 0
        self.first_row, self.first_value = "", ""

    def read(self, block: bytes) -> tuple[dict[str, Column], int]:
        """The columns of a block, and its number of rows."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        count = 0
        for line in block.splitlines():
            row = self.row_of(line)
            if row is None:
                continue
            for name, value in row.items():
                if (number := self.number_of(name, value)) is not None:
                    rows, values = found.setdefault(name, ([], []))
                    rows.append(count)
                    values.append(number)
            count += 1
        columns = {
            name: Column(np.array(rows, np.int32), np.array(values))
            for name, (rows, values) in found.items()
        }
        return columns, count

    def row_of(self, line: bytes) -> dict[str, Any] | None:
        """A line as a row; None where it is none."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return row
        self.bad_rows += 1
        self.first_row = self.first_row or quoted(line.decode(errors="replace"))
        return None

    def number_of(self, name: str, value: Any) -> float | None:
        """A value as a number; None where it is none. null stands for no value."""
        if isinstance(value, (int, float)):
            try:
                return float(value)
            except OverflowError:  # 10**400
                pass
        if value is not None:
            self.bad_values += 1
            self.first_value = self.first_value or f"{name}={quoted(value)}"
        return None

    def damage(self, file: Path) -> list[str]:
        """What was skipped."""
        lines = []
        if self.bad_rows:
            what = f"lines that are no JSON objects: {self.bad_rows} (the first: {self.first_row})"
            lines.append(f"{file}: {what}; the curves lack them, the run does not need them")
        if self.bad_values:
            what = f"values that are no numbers: {self.bad_values} (the first: {self.first_value})"
            lines.append(f"{file}: {what}; the curves lack them, the run does not need them")
        return lines


def quoted(value: Any) -> str:
    """The beginning of a wrong value."""
    text = value if isinstance(value, str) else f"{value!r:.{2 * MAX_QUOTED}}"
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


# ---- fewer points


def thin(points: Points, most: int) -> Points:
    """At most `most` points that look the same: of each piece of a long curve the smallest and the
    largest value, in their order. NaN and infinite values are left out of a curve that is thinned.
    """
    if len(points.y) <= most:
        return points
    x, y = (axis[np.isfinite(points.y)] for axis in points)
    edges = np.linspace(0, len(y), max(1, most // 2) + 1).astype(int)
    edges = np.unique(edges)
    kept = [
        start + index
        for start, end in zip(edges, edges[1:])
        for index in sorted({int(y[start:end].argmin()), int(y[start:end].argmax())})
    ]
    return Points(x[kept], y[kept])
