"""The models that can be chosen: finished runs below folders, by name. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.locations import is_directory
from rlhf.base.log import valid_text
from rlhf.config.stage_graph import is_policy
from rlhf.runs.directory import read_summary
from rlhf.runs.run_files import SUMMARY

Choice = tuple[str, str]  # what is shown, and the path


def choices(roots: Sequence[Path]) -> tuple[list[Choice], list[Choice]]:
    """Finished policies and reward models below folders, the newest first. A path that is not
    UTF-8 cannot be chosen in a page.

    Args: roots: folders with outputs/ and multirun/.
    """
    policies, rewards = [], []
    for run, stage in finished_runs(roots):
        if str(run) != valid_text(str(run)):
            continue
        if is_policy(stage):
            policies.append((run.name, str(run)))
        elif stage == "rm":
            rewards.append((run.name, str(run)))
    return policies, rewards


def finished_runs(roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Directory and stage of the finished runs with a model, the newest first."""
    times: dict[Path, int] = {}
    for root in roots:
        for pattern in ("outputs/*", "multirun/*/*/run"):
            for path in root.glob(pattern):
                with contextlib.suppress(OSError):  # not finished, or deleted just now
                    times[path.resolve()] = (path / SUMMARY).stat().st_mtime_ns
    for run in sorted(times, key=lambda run: -times[run]):
        with contextlib.suppress(OSError, UserError):  # one broken run does not hide the others
            summary: Any = read_summary(run) or {}
            if summary.get("status") == "finished" and (run / "model").is_dir():
                yield run, str(summary.get("stage", ""))


def run_of(path: str) -> Path | None:
    """The run directory that a model's path is in; None for other directories and hub ids."""
    if not is_directory(path):
        return None
    here = Path(path).expanduser().resolve()
    # RUN, RUN/model, and RUN/model/adapter of an adapter beside a model
    return next((one for one in (here, *here.parents[:2]) if (one / "config.yaml").exists()), None)


def name_of(path: str) -> str:
    """A run's name, or the path or hub id as it is."""
    run = run_of(path)
    return run.name if run else path


def config_of(path: str) -> Path:
    """The configuration of the run that a policy is from. Raises: UserError where it is no run."""
    run = run_of(path)
    if run is None:
        raise UserError(
            f"{path} is no run, so no data belong to it: choose a run, or type a prompt"
        )
    return run / "config.yaml"
