"""Runs read back from the disk, to be compared: status, settings, metrics, and what they say over seeds. No torch here."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.loading import load_config
from rlhf.config.stage_graph import is_aligned
from rlhf.runs.command import Command
from rlhf.runs.directory import find_checkpoints, is_locked, read_summary
from rlhf.runs.identity import run_identity


def kind_of(stage: str) -> str:
    """What a run is compared with: runs of the same kind. All policies that start from SFT are one
    kind, whatever algorithm trained them."""
    return "policy" if is_aligned(stage) else stage


@dataclass
class Run:
    """One run as it lies on the disk."""

    path: Path
    stage: str
    status: str  # finished, running, stopped, failed: why
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # all that decides its result, by dotted key
    metrics: dict[str, float] = field(default_factory=dict)  # final ones
    rows: list[dict[str, float]] = field(default_factory=list)  # of each step
    parents: dict[str, str] = field(default_factory=dict)
    id: str = ""

    @property
    def kind(self) -> str:
        """That of the runs it is compared with; "" for a job without a run."""
        return kind_of(self.stage) if self.stage else ""

    @property
    def name(self) -> str:
        return (
            self.path.name
            if self.path.parent.name != "attempts"
            else "/".join(self.path.parts[-3:])
        )


def read_run(path: Path) -> Run:
    """A run of a run directory. Raises: FileNotFoundError when there is none."""
    summary = read_summary(path) or {}
    stage = summary.get("stage") or OmegaConf.load(path / "config.yaml").stage.name
    settings: dict[str, Any] = summary.get("settings", {})
    if not settings:
        with contextlib.suppress(ValueError, KeyError, OmegaConfBaseException):  # other keys
            cfg = load_config(path / "config.yaml")
            settings = run_identity(Command(cfg, cfg, []), stage)
    rows = read_lines(path / "metrics.jsonl")
    parents = path / "parents.json"
    given = summary.get("parents") or (json.loads(parents.read_text()) if parents.exists() else {})
    return Run(
        path,
        stage,
        run_status(path),
        settings,
        summary.get("metrics", {}),
        rows,
        given,
        summary.get("id", ""),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last one that is not whole yet is left out."""
    rows = []
    for line in (
        path.read_text().split("\n") if path.exists() else ()
    ):  # not splitlines: answers hold other line ends
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def run_status(path: Path) -> str:
    """Whether a run is finished, running (another process holds it), failed, or stopped, and where."""
    if read_summary(path):
        return "finished"
    if is_locked(path):
        return "running"
    messages = sorted(path.glob("error-rank*.txt"), key=lambda file: file.stat().st_mtime_ns)
    if messages:
        return f"failed: {messages[0].read_text().splitlines()[0].split(': ', 1)[-1]}"
    whole, _ = find_checkpoints(path)
    return f"stopped, goes on after step {whole[0][1]['step']}" if whole else "stopped"


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that are meant: run directories, sweeps (multirun/NAME) or their jobs, or folders with outputs/.

    Raises: FileNotFoundError naming a path where there is none."""
    found: dict[Path, Run] = {}
    for path in paths:
        outputs = path / "outputs" if (path / "outputs").is_dir() else path
        jobs = sorted(file.parent for file in path.glob("*/overrides.txt"))
        if (path / "overrides.txt").exists():
            some = runs_of_jobs([path])
        elif jobs:
            some = runs_of_jobs(jobs)
        elif (path / "config.yaml").exists():
            some = [read_run(path.resolve())]
        elif outputs.name == "outputs":
            homes = sorted(
                (p for p in outputs.iterdir() if is_run(p)),
                key=lambda p: (p / "config.yaml").stat().st_mtime,
            )
            some = [read_run(home.resolve()) for home in homes]
        else:
            some = []
        if not some:
            raise FileNotFoundError(
                f"{path}: no run there; give a run (outputs/...), a sweep (multirun/...) or the folder with outputs/"
            )
        for run in some:
            found.setdefault(run.path, run)
    return list(found.values())


def runs_of_jobs(jobs: Sequence[Path]) -> list[Run]:
    """The runs of a sweep's jobs. Where several lead to one run, because they differ only in where they ran, each job's own copies of
    it; a job without a run has failed."""
    homes = [(job / "run").resolve() for job in jobs]
    found = []
    for job, home in zip(jobs, homes):
        if not (job / "run").exists():
            why = job / "error.txt"
            found.append(
                Run(job, "", f"failed: {why.read_text().strip() if why.exists() else 'no run'}")
            )
        elif homes.count(home) == 1:
            found.append(read_run(home))
        else:
            run = read_run(job)
            chosen = (
                arg.partition("=") for arg in (job / "overrides.txt").read_text().splitlines()
            )
            run.settings |= {key: value for key, _, value in chosen if key.startswith("deploy")}
            found.append(run)
    return found


def is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and re.match(r"\w+-", path.name) is not None


def parent_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs that the given ones stand on, by id, looked for where they lie."""
    wanted = {id for run in runs for id in run.parents.values()}
    folders = {run.path.parent for run in runs if run.stage}
    near = [
        read_run(path)
        for folder in folders
        for path in folder.iterdir()
        if is_run(path) and read_summary(path)
    ]
    return {run.id: run for run in near if run.id in wanted}
