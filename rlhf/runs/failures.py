"""How a worker reports why it failed: RUN/error-rankN.txt, read by the parent. No torch here."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import NamedTuple

from rlhf.base.errors import UserError, machine_problem
from rlhf.base.log import first_line, say

UNKNOWN = "the cause is not in its error file (was the disk full?); see train.log"


class WorkerError(RuntimeError):
    """A worker failed by a bug, or was killed. The message names rank, cause and log."""


class Failure(NamedTuple):
    """Why a worker failed. `kind` is the type of the exception: UserError, or that of a bug."""

    rank: str
    kind: str
    message: str  # one line

    @property
    def is_user_error(self) -> bool:
        return self.kind == UserError.__name__

    @property
    def cause(self) -> str:
        """A user's error as it is; the type of a bug's exception stands before its message."""
        return self.message if self.is_user_error else f"{self.kind}: {self.message}"


def write_failure(run_dir: Path, rank: str, error: Exception) -> None:
    """Write `rank N: Type: message` and the traceback. Call it where `error` is handled."""
    problem = machine_problem(error)
    kind = UserError if problem or isinstance(error, UserError) else type(error)
    failure = Failure(rank, kind.__name__, problem or first_line(error))
    text = f"rank {rank}: {failure.kind}: {failure.message}\n\n{traceback.format_exc()}"
    try:
        (run_dir / f"error-rank{rank}.txt").write_text(text, encoding="utf-8")
    except OSError:  # the disk is full, or another node has no run directory of node 0
        say(f"rank {rank}: {failure.cause}")
        with contextlib.suppress(OSError):  # the full disk has left an empty one
            (run_dir / f"error-rank{rank}.txt").unlink()


def take_stacks(run_dir: Path, minutes: float | None) -> None:
    """Make failures of workers that hung, and add the stacks that they have left to train.log.

    Args: minutes: deploy.watchdog_minutes.
    """
    for file in run_dir.glob("stacks-rank*.txt"):
        rank = file.stem.removeprefix("stacks-rank")
        if stacks := file.read_text(encoding="utf-8", errors="replace"):
            line = f"rank {rank}: Stalled: no progress for {minutes} minutes"
            line += " (deploy.watchdog_minutes: raise it if the work takes that long)"
            (run_dir / f"error-rank{rank}.txt").write_text(f"{line}\n\n{stacks}", encoding="utf-8")
            with open(run_dir / "train.log", "a", encoding="utf-8") as log_file:
                log_file.write(f"{line}\n{stacks}")
        file.unlink(missing_ok=True)


def read_failures(run_dir: Path) -> list[Failure]:
    """The failures that the workers of a run have written, the oldest first."""
    files = sorted(run_dir.glob("error-rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    failures = []
    for file in files:
        parts = first_text_line(file).split(": ", 2)
        rank, kind, message = parts if len(parts) == 3 else ("rank ?", UserError.__name__, UNKNOWN)
        failures.append(Failure(rank.removeprefix("rank "), kind, message))
    return failures


def first_text_line(file: Path) -> str:
    """The first line of a file; "" where it is empty or cannot be read."""
    try:
        return (file.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0]
    except OSError:
        return ""
