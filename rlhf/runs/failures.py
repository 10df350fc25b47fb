"""How a worker reports why it failed: RUN/error-rankN.txt, read by the parent. No torch here."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import NamedTuple

from rlhf.base.errors import UserError
from rlhf.base.log import first_line


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
    kind = UserError.__name__ if isinstance(error, UserError) else type(error).__name__
    text = f"rank {rank}: {kind}: {first_line(error)}\n\n{traceback.format_exc()}"
    with contextlib.suppress(OSError):  # another node may not have the run directory of node 0
        (run_dir / f"error-rank{rank}.txt").write_text(text, encoding="utf-8")


def read_failures(run_dir: Path) -> list[Failure]:
    """The failures that the workers of a run have written, the oldest first."""
    files = sorted(run_dir.glob("error-rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    failures = []
    for file in files:
        rank, kind, message = file.read_text(encoding="utf-8").splitlines()[0].split(": ", 2)
        failures.append(Failure(rank.removeprefix("rank "), kind, message))
    return failures
