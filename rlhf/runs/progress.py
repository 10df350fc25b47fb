"""How far a run is, and how long it will take. No torch here."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from typing import NamedTuple

from rlhf.base.errors import UserError
from rlhf.runs.history import Run
from rlhf.runs.metrics import count_rows
from rlhf.runs.newest import Newest
from rlhf.runs.run_files import PROGRESS, read_file
from rlhf.runs.timing import newest_times

COUNTS: Newest[int] = Newest()
RECENT = 50  # steps whose mean time counts; evaluations and checkpoints between them count too


class Progress(NamedTuple):
    """Steps (online RL: rollouts) of a run."""

    done: int
    total: int | None  # None: the run has not begun, or is of an earlier version
    seconds_left: float | None  # None where it is not running, or not known yet

    def __str__(self) -> str:
        """12/40."""
        return f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")

    @property
    def time_left(self) -> str:
        """`3 min`; "" where it is unknown."""
        return "" if self.seconds_left is None else duration(self.seconds_left)


def progress_of(run: Run) -> Progress:
    """How far a run is. The time left is that of its last steps, for those that are missing; their
    median, as the run may have been stopped between two of them."""
    file = run.path / "metrics.jsonl"
    done = COUNTS.get(file, [file], lambda: count_rows(file))
    planned = None
    with contextlib.suppress(UserError, OSError):  # damaged: the page says nothing of it
        planned = read_file(run.path, PROGRESS)
    total = int(planned["steps"]) if planned else None
    if total and done > total:  # damaged lines, or steps that are there twice
        done = min(len(run.rows), total)
    if run.status != "running" or not total:
        return Progress(done, total, None)
    with contextlib.suppress(OSError):  # the run has just been deleted
        times = newest_times(file)[-RECENT:]
        if len(times) > 1:
            step = statistics.median(b - a for a, b in itertools.pairwise(times))
            return Progress(done, total, max(0.0, step) * max(0, total - done))
    return Progress(done, total, None)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
