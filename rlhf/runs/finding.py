"""The runs in folders: outputs/, sweeps and their jobs, copies, parent runs. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.log import valid_text
from rlhf.runs.directory import read_summary
from rlhf.runs.history import HASHED_NAME, Run, read_run
from rlhf.runs.run_files import SUMMARY


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
