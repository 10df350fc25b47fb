"""How a command that was interrupted is continued: its last line. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.base.interrupts import interrupted
from rlhf.runs.command import Command
from rlhf.runs.directory import find_checkpoints
from rlhf.runs.identity import run_dir_for
from rlhf.runs.run_files import SUMMARY


@contextlib.contextmanager
def say_how_to_continue(command: Command, stage: str, started: float) -> Iterator[None]:
    """Give an interrupted stage the line that says where the same command continues.

    Args: started: when the command was, in s of time.time().
    Raises: KeyboardInterrupt with that line, also where a library answered Ctrl-C with an error of
        its own.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as stop:
        if not isinstance(stop, KeyboardInterrupt) and not interrupted():
            raise
        raise KeyboardInterrupt(how_to_continue(command, stage, started)) from None


def how_to_continue(command: Command, stage: str, started: float) -> str:
    """The line of a command that was interrupted in a stage. Args: as `say_how_to_continue`."""
    runs, fresh = command.cfg.stage.runs, command.cfg.fresh
    directory = run_dir_for(command, stage)
    later = runs[runs.index(stage) + 1 :]
    # with fresh=true a run of before may stand where this command has not come to yet
    old = [one for one in later if fresh and (run_dir_for(command, one) / SUMMARY).exists()]
    if fresh and stage != "inspect" and not is_written_since(directory / "config.yaml", started):
        if stage == runs[0]:
            return f"Interrupted before {stage} began: the same command starts it."
        return f"Interrupted before {stage} began: {fresh_overrides([stage, *old])}."
    again = "the same command" + (" without fresh=true" if fresh else "")
    intact, _ = find_checkpoints(directory)
    if stage != "inspect" and (directory / SUMMARY).exists():
        then = f"{again} {'prints its results' if stage == runs[-1] else 'continues'}"
        return f"Interrupted after {stage} was finished: {fresh_overrides(old) if old else then}."
    if intact:
        line = f"Interrupted: {again} resumes {stage} after step {intact[0][1]['step']}"
    else:
        where = "" if stage in ("inspect", "eval") else " before the first checkpoint"
        line = f"Interrupted{where}: {again} starts {stage} again"
    return f"{line}; then {fresh_overrides(old)}." if old else f"{line}."


def is_written_since(path: Path, started: float) -> bool:
    """Whether a file has been written since then, in s of time.time()."""
    # file systems round times, to 2 s at most
    return path.exists() and path.stat().st_mtime > started - 2


def fresh_overrides(stages: Sequence[str]) -> str:
    """What to add to a command whose runs of before stand there still."""
    return "add " + ", then ".join(f"stage={one} fresh=true" for one in stages)
