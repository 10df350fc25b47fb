"""Runs read from the disk, to be compared: status, settings, metrics. No torch here."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.base.errors import UserError
from rlhf.base.files import special_kind
from rlhf.base.log import first_line, valid_text
from rlhf.config.keys import find_key
from rlhf.config.loading import load_config
from rlhf.runs.command import Command
from rlhf.runs.directory import find_checkpoints, read_summary
from rlhf.runs.failures import read_failures
from rlhf.runs.identity import settings_to_record
from rlhf.runs.locks import is_locked
from rlhf.runs.metrics import Metrics, read_metrics
from rlhf.runs.newest import Newest
from rlhf.runs.run_files import AGAIN, PARENTS, SUMMARY, read_file
from rlhf.runs.stage_views import view_of

HASHED_NAME = re.compile(r"-[0-9a-f]{8}$")  # as train.py names a run directory
# metrics that are drawn against each other, besides those of a stage's panels
OF_FRONTIER = ("objective/kl", "objective/scores", "reward/gold/mean", "eval/*")

# what reading a damaged config.yaml raises
UNREADABLE = (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException)


class Description(NamedTuple):
    """What the files of a run say of it."""

    stage: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    parents: dict[str, str]
    id: str


# a page that follows runs reads them every few seconds
DESCRIPTIONS: Newest[Description] = Newest()
ROWS: Newest[Metrics] = Newest()


@dataclass
class Run:
    """One run, read from its directory."""

    path: Path
    stage: str  # "" where it is unknown: a job without a run, an unreadable run
    status: str  # finished, running, stopped, failed: why, unreadable: file and fix
    # all that decides its result, by dotted key; empty where it is unknown
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # final ones
    parents: dict[str, str] = field(default_factory=dict)
    id: str = ""
    sweeps: list[str] = field(default_factory=list)  # folders below multirun/ that it is a job of
    earlier_version: bool = False  # its keys are not those of today; `settings` then is empty
    copies: list[Path] = field(default_factory=list)  # directories with the same id; not counted

    @functools.cached_property
    def rows(self) -> Metrics:
        """The metrics of each step, as far as a report shows them; read when they are asked for."""
        return read_shown(self.path / "metrics.jsonl", self.stage)

    @property
    def damage(self) -> list[str]:
        """What is skipped of the run, a line each."""
        return self.named_copies + self.rows.damage

    @property
    def named_copies(self) -> list[str]:
        """A line for each copy of the run's directory."""
        same = f"is a copy of {self.name} (summary.json has the same id): counted once"
        return [f"{copy}: {same}" for copy in self.copies]

    @property
    def status_text(self) -> str:
        """The status, and that a run was made by an earlier version."""
        return self.status + (", made by an earlier version" if self.earlier_version else "")

    @property
    def is_unreadable(self) -> bool:
        """Whether it is so damaged that only its directory is known."""
        return self.status.startswith("unreadable:")

    @property
    def kind(self) -> str:
        """Kind of the runs that it is compared with; "" for a job without a run."""
        return view_of(self.stage).kind if self.stage else ""

    @property
    def name(self) -> str:
        """Its directory's name, as text: a page cannot have what is not UTF-8."""
        is_attempt = self.path.parent.name == "attempts"
        return valid_text("/".join(self.path.parts[-3:]) if is_attempt else self.path.name)

    @property
    def short_name(self) -> str:
        """Stage and hash of the name: ppo-1d89f312; the name where it has no hash."""
        name, *attempt = self.name.split("/", 1)
        found = HASHED_NAME.search(name)
        short = self.stage + found.group() if found and self.stage else name
        return "/".join([short, *attempt])


def read_run(path: Path) -> Run:
    """Read a run directory. One that is damaged has the status `unreadable`, with file and fix."""
    try:
        return read_sound_run(path)
    except UserError as error:
        return Run(path, "", f"unreadable: {error}")
    except OSError as error:
        return Run(path, "", f"unreadable: {error.filename or path}: {first_line(error)}")


def read_sound_run(path: Path) -> Run:
    """Read a run directory. Raises: UserError and OSError that name the file that is damaged."""
    for file in path.iterdir():
        if kind := special_kind(file):  # reading it would wait, or never end
            raise UserError(f"{file}: this is {kind}, not a file: remove it")
    files = [path / name for name in (SUMMARY, "config.yaml", PARENTS)]
    known = DESCRIPTIONS.get(path, files, lambda: describe_run(path))
    return Run(
        path,
        known.stage,
        run_status(path),
        dict(known.settings),
        known.metrics,
        known.parents,
        known.id,
        earlier_version=not known.settings,
    )


def describe_run(path: Path) -> Description:
    """What the files of a run say of it. Raises: UserError that names the file that is damaged."""
    summary: Any = read_summary(path) or {}
    stage = summary.get("stage") or stage_of(path / "config.yaml")
    return Description(
        stage,
        known_settings(path, summary, stage),
        summary.get("metrics", {}),
        summary.get("parents") or read_file(path, PARENTS) or {},
        summary.get("id", ""),
    )


def stage_of(file: Path) -> str:
    """The stage that a config.yaml names. Raises: UserError where it cannot be read."""
    try:
        stage = OmegaConf.select(OmegaConf.load(file), "stage.name")
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}): {AGAIN}") from None
    if not isinstance(stage, str):
        raise UserError(f"{file}: cannot be read (it has no stage.name): {AGAIN}")
    return stage


def known_settings(path: Path, summary: dict[str, Any], stage: str) -> dict[str, Any]:
    """The settings of a run; empty for one that was made by an earlier version with other keys."""
    settings: dict[str, Any] = summary.get("settings", {})
    if settings:
        return settings if all(is_known_setting(key, stage) for key in settings) else {}
    with contextlib.suppress(UserError, KeyError, *UNREADABLE):
        cfg = load_config(path / "config.yaml")
        return settings_to_record(Command(cfg, cfg, []), stage)
    return {}


def is_known_setting(key: str, stage: str) -> bool:
    """Whether this version has a key of a run's settings. In those of eval, the keys of an
    algorithm that it is trained from stand below the algorithm's name: ppo.lr for rl.lr."""
    if find_key(key):
        return True
    return stage == "eval" and find_key(f"rl.{key.partition('.')[2]}") is not None


def read_shown(file: Path, stage: str) -> Metrics:
    """The metrics of each step that the curves of a stage show. What is damaged is in `damage`."""
    view = view_of(stage)
    names = [name for panel in view.panels for name in panel.metrics]
    shown = re.compile("|".join(map(fnmatch.translate, [*names, *OF_FRONTIER])))
    try:
        return ROWS.get(
            file, [file], lambda: read_metrics(file, lambda name: shown.match(name) is not None)
        )
    except OSError as error:
        return Metrics(damage=[f"{file}: cannot be read ({error.strerror}): it has no curves"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of texts, such as samples.jsonl; none where there is no file, a
    half-written or damaged row is skipped."""
    if not path.exists():
        return []
    rows = []
    # not splitlines: texts may contain other line ends
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def run_status(path: Path) -> str:
    """finished, running (another process holds its lock), failed: why, or stopped: where."""
    if (path / SUMMARY).exists():
        return "finished"
    if is_locked(path):
        return "running"
    for failure in read_failures(path):
        return f"failed: {failure.cause}"
    intact, _ = find_checkpoints(path)
    return f"stopped, resumes after step {intact[0][1]['step']}" if intact else "stopped"


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at the given paths, each one once.

    Args: paths: run directories, sweeps (multirun/NAME), their jobs, folders of sweeps (multirun),
        or folders with outputs/, multirun/ or both.
    Raises: UserError that names a path without runs.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        try:
            runs_here = runs_at(path)
        except OSError as error:
            where = error.filename or path
            raise UserError(f"{where}: cannot be read ({error.strerror})") from None
        if not runs_here:
            raise UserError(
                f"{path}: no run there; give a run (outputs/...), a sweep (multirun/...) or the "
                "folder with outputs/"
            )
        for run in runs_here:
            known = runs.setdefault(run.path, run)
            known.sweeps += [sweep for sweep in run.sweeps if sweep not in known.sweeps]
    return without_copies(list(runs.values()))


def without_copies(runs: Sequence[Run]) -> list[Run]:
    """The runs without copies of their directories, which would count as further seeds: of those
    with the same id the one is kept whose name is that of the run, which no copy in the same folder
    has; else the first."""
    kept: dict[str, Run] = {}
    copies = set()
    for run in sorted(runs, key=lambda run: not HASHED_NAME.search(run.path.name)):
        if run.id and not is_job(run.path) and kept.setdefault(run.id, run) is not run:
            kept[run.id].copies.append(run.path)
            copies.add(run.path)
    return [run for run in runs if run.path not in copies]


def is_job(path: Path) -> bool:
    """Whether a directory is a sweep's job, which has copies of its run's files."""
    return (path / "overrides.txt").exists()


def runs_at(path: Path) -> list[Run]:
    """The runs at one path of `find_runs`."""
    if (path / "overrides.txt").exists():
        return runs_of_jobs([path])
    jobs = sorted(file.parent for file in path.glob("*/overrides.txt"))
    if jobs:
        return runs_of_jobs(jobs)
    if (path / "config.yaml").exists():
        return [read_run(path.resolve())]
    if (path / "outputs").is_dir() or (path / "multirun").is_dir():
        return runs_of_folder(path)
    if path.name == "outputs":
        return runs_of_outputs(path)
    return [run for sweep in folders_of_sweeps(path) for run in runs_at(sweep)]


def folders_of_sweeps(path: Path) -> list[Path]:
    """The sweeps in a folder like multirun/."""
    return sorted({file.parents[1] for file in path.glob("*/*/overrides.txt")})


def runs_of_outputs(outputs: Path) -> list[Run]:
    """All runs in outputs/, the oldest first."""
    directories = [directory for directory in outputs.iterdir() if is_run(directory)]
    directories.sort(key=written)
    return [read_run(directory.resolve()) for directory in directories]


def runs_of_folder(path: Path) -> list[Run]:
    """All runs in a folder's outputs/, each with the sweeps in multirun/ that it is a job of, and
    the jobs of sweeps that failed before they had a run."""
    outputs = path / "outputs"
    runs = {run.path: run for run in (runs_of_outputs(outputs) if outputs.is_dir() else [])}
    has_outputs = bool(runs)
    for sweep in folders_of_sweeps(path / "multirun"):
        sweep_name = valid_text(sweep.name)
        for job in sorted(file.parent for file in sweep.glob("*/overrides.txt")):
            run = runs.get((job / "run").resolve())
            if run and sweep_name not in run.sweeps:
                run.sweeps.append(sweep_name)
            elif not run and (not has_outputs or (job / "error.txt").exists()):
                runs |= {one.path: one for one in runs_of_jobs([job])}
    return list(runs.values())


def runs_of_jobs(jobs: Sequence[Path]) -> list[Run]:
    """The runs of a sweep's jobs.

    Where several jobs lead to one run, because they differ only in where they ran (deploy), each
    job's own copy of it; of jobs that do not differ in that the last one. A job without a run has
    failed.
    """
    of_run = {(directory_of(job), *where_it_ran(job)): job for job in jobs}
    jobs = list(of_run.values())
    directories = [directory_of(job) for job in jobs]
    count = Counter(directories)
    runs = []
    for job, directory in zip(jobs, directories):
        if directory == job and (job / SUMMARY).exists():  # copied without its run
            run = read_run(job)
        elif directory == job:
            error = job / "error.txt"
            cause = (
                error.read_text(errors="replace", encoding="utf-8").strip()
                if error.exists()
                else "no run"
            )
            run = Run(job, "", f"failed: {cause}")
        elif count[directory] == 1:
            run = read_run(directory)
        else:
            run = read_run(job)
            pairs = (override.partition("=") for override in where_it_ran(job))
            run.settings |= {key: value for key, _, value in pairs}
        run.sweeps.append(valid_text(job.resolve().parent.name))
        runs.append(run)
    return runs


def directory_of(job: Path) -> Path:
    """The run of a job; the job itself where it has none."""
    run = job / "run"
    return run.resolve() if run.exists() else job


def where_it_ran(job: Path) -> list[str]:
    """The overrides of a job that are no part of its run: deploy=single_gpu, deploy.threads=1."""
    try:
        text = (job / "overrides.txt").read_text(errors="replace", encoding="utf-8")
    except OSError:  # it has just been deleted
        return []
    return sorted(override for override in text.splitlines() if override.startswith("deploy"))


def is_run(path: Path) -> bool:
    """Whether a path is a run directory, also where that cannot be looked at; stage=inspect makes
    none."""
    try:
        return (path / "config.yaml").exists() and not path.name.startswith("inspect-")
    except OSError:
        return True


def written(directory: Path) -> float:
    """When a run was started, as far as it can be known."""
    try:
        return (directory / "config.yaml").stat().st_mtime
    except OSError:
        return 0.0


def parent_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """The parent runs of the given ones, by id, as far as they are in the same folders."""
    known = {run.id: run for run in runs}
    ids = {id for run in runs for id in run.parents.values()}
    folders = {run.path.parent for run in runs if run.stage} if ids - {*known} else set()
    paths = {run.path for run in runs}
    others = [
        read_run(path)
        for folder in folders
        for path in folder.iterdir()
        if path not in paths and is_run(path) and id_of(path) in ids
    ]
    return {run.id: run for run in [*others, *runs] if run.id in ids}


def id_of(path: Path) -> str | None:
    """The id of a finished run; None where it has no summary that can be read."""
    try:
        summary = read_summary(path)
        return summary["id"] if summary else None
    except UserError:
        return None
