"""The jobs of a sweep (-m): what they are, their folders below multirun/, how they ended, and the
comparison."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import secrets
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf import arguments, compose, run
from rlhf.base.errors import UserError
from rlhf.base.interrupts import interrupted, raise_at_interrupt
from rlhf.base.log import say
from rlhf.base.own_processes import end_with_parent
from rlhf.config.validation import check_config
from rlhf.reporting import tables
from rlhf.runs.checks import check_inputs
from rlhf.runs.finding import find_runs
from rlhf.runs.gpus import SWEEP_BEGAN, SWEEP_LOG
from rlhf.runs.identity import short_name

SWEEP_PROCESS = "RLHF_SWEEP_PROCESS"  # the process that started the sweep
SWEEP_SIZE = "RLHF_SWEEP_SIZE"  # number of jobs
SWEEP_KEYS = "RLHF_SWEEP_KEYS"  # what it sweeps over; these keys are first in the jobs' names
COPIED = ("config.yaml", "summary.json", "metrics.jsonl", "curves.png")
NOT_COMPARED = {"runtime": None, "overrides": None}  # of Hydra's node: what was typed, and where
REPORT_EVERY = 1.0  # s


# ---- what the jobs are


@dataclass
class Sweep:
    """What -m asks for."""

    overrides: list[str]  # as Hydra's sweeper reads them, those of option files too
    jobs: list[list[str]]  # the overrides of each
    swept: list[str]  # the keys whose values differ
    is_plain: bool  # nothing of Hydra is changed: its jobs can run one after another here

    @property
    def name(self) -> str:
        """Of the keys that it sweeps: "rl.kl.coef+seed"."""
        return short_name("", self.swept) or "one_job"


def read_sweep(overrides: Sequence[str], folders: Sequence[Path]) -> Sweep:
    """The jobs of a sweep, those of its option files too; they are Hydra's own, in its order.

    Raises: HydraException for values that only another sweeper knows, such as interval(0,1).
    """
    typed = [arguments.parse(arg) for arg in overrides]
    fixed = [arg for arg, one in zip(overrides, typed) if not one.is_sweep_override()]
    master = compose.compose_with_hydra(fixed, folders).hydra
    params = (master.sweeper.params or {}).items()
    in_files = [arguments.allow_user_names(f"{key}={value}") for key, value in params]
    every = arguments.one_for_each_key([*in_files, *overrides])
    jobs = arguments.jobs_of(list(map(arguments.parse, every)))
    every += ["hydra.sweeper.params=null"] if in_files else []  # they are among them
    usual = compose.compose_with_hydra([], folders).hydra
    ours = [[arg for arg in job if not is_hydras(arg)] for job in jobs]
    is_plain = how_jobs_run(master) == how_jobs_run(usual)
    return Sweep(every, ours, swept_keys(ours), is_plain)


def swept_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys that not all jobs have with the same value."""
    count = Counter(arg for job in jobs for arg in arguments.as_user_types(job))
    return sorted({arguments.group_of(arg) for arg, times in count.items() if times < len(jobs)})


def how_jobs_run(node: DictConfig) -> dict[str, Any]:
    """What of Hydra's own node decides how jobs run: launcher, sweeper, environment, ..."""
    plain: Any = OmegaConf.to_container(node)
    job = {key: plain["job"][key] for key in ("env_set", "env_copy", "chdir")}
    return plain | {"sweeper": plain["sweeper"] | {"params": None}, "job": job} | NOT_COMPARED


def is_hydras(arg: str) -> bool:
    """Whether an override is for Hydra itself: hydra/launcher=parallel, hydra.sweep.dir=..."""
    return arg.lstrip("+~").startswith(("hydra.", "hydra/"))


def check_jobs(jobs: Sequence[Sequence[str]], folders: Sequence[Path]) -> set[str]:
    """Check every job of a sweep before the first one starts; of many, say how far it is.

    Returns: their experiment_names.  Raises: UserError with all problems.
    """
    names, problems = set[str](), dict[str, None]()
    said = time.monotonic()
    for number, job in enumerate(jobs, 1):
        cfg = compose.typed_config(compose.compose_alone(job, folders))
        problems |= dict.fromkeys(check_config(cfg) + check_inputs(cfg))
        names.add(cfg.experiment_name)
        if time.monotonic() > said + REPORT_EVERY:
            said = time.monotonic()
            say(f"checked {number} of {len(jobs)} jobs")
    if problems:
        raise UserError("\n".join(problems))
    return names


# ---- running the jobs


def run_jobs(jobs: Sequence[Sequence[str]]) -> None:
    """Run the jobs one after another in this process, as Hydra's own launcher does, which composes
    each job three times.

    Raises: what stopped the first of those that failed, after the last one.
    """
    errors = []
    for number, job in enumerate(jobs, 1):
        try:
            run_job(compose.compose_again(job), list(job), number)
        except Exception as error:
            errors.append(error)
            if interrupted():
                break
    if errors:
        raise errors[0]


def begin(overrides: Sequence[str], jobs: Sweep, folders: Sequence[Path]) -> None:
    """Prepare for the jobs, which may be processes of their own, on other machines too.

    They write how they ended to a file that the environment names. With a launcher that runs jobs
    side by side, the first Ctrl-C is left to the jobs, which hear it as well and save (joblib would
    kill them).
    """
    raise_at_interrupt()
    root = compose.typed_config(compose.compose_alone(jobs.jobs[0], folders)).root
    log = Path(root).expanduser().resolve() / "multirun" / f".sweep-{secrets.token_hex(4)}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    atexit.register(log.unlink, missing_ok=True)
    os.environ |= {
        SWEEP_LOG: str(log),
        SWEEP_PROCESS: str(os.getpid()),
        SWEEP_SIZE: str(len(jobs.jobs)),
        SWEEP_KEYS: " ".join(jobs.swept),
        SWEEP_BEGAN: str(time.time()),
    }
    if any(arg.startswith("hydra/launcher=") for arg in overrides):

        def leave_to_the_jobs(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, leave_to_the_jobs)


def ended_jobs() -> list[dict[str, str]]:
    """How the jobs of this sweep have ended so far, in the order of their ends."""
    log = os.environ.get(SWEEP_LOG)
    return (
        [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
        if log
        else []
    )


def run_job(composed: DictConfig, overrides: list[str], number: int) -> None:
    """One job of a sweep. Raises: what stopped it, after it is recorded."""
    typed = arguments.as_user_types(overrides)
    job = shlex.join(typed)
    say(f"\n--- job {number} of {os.environ[SWEEP_SIZE]}: {job}")
    if os.environ[SWEEP_PROCESS] != str(os.getpid()):  # side by side: save when the sweep is gone
        end_with_parent()
    folder = Path(composed.root).expanduser() / "multirun" / composed.experiment_name
    try:
        runs = run.run_command(compose.make_command(composed, overrides))
    except Exception as error:
        line = (str(error).splitlines() or [repr(error)])[0]
        say(f"error: {line}")
        if not composed.plan:  # it has trained nothing
            collect_job(folder, typed, None, line)
        record_end(job, folder, line)
        raise
    if runs:
        collect_job(folder, typed, runs[-1])
        record_end(job, folder)


def record_end(job: str, folder: Path, error: str = "") -> None:
    with open(os.environ[SWEEP_LOG], "a", encoding="utf-8") as log:
        log.write(json.dumps({"job": job, "folder": str(folder.resolve()), "error": error}) + "\n")


def collect_job(folder: Path, overrides: list[str], done: Path | None, error: str = "") -> None:
    """A job's own folder below that of its sweep: copies of what its last stage wrote and a link to
    the run, or why it failed."""
    named = [arg for arg in overrides if not arg.startswith("experiment_name=")]
    swept = os.environ.get(SWEEP_KEYS, "").split()
    named.sort(key=lambda arg: (arguments.group_of(arg) not in swept, arg))
    name = short_name("", [arg.lstrip("+").replace("=", "-") for arg in named]) or "default"
    name += "-" + hashlib.sha256(" ".join(sorted(overrides)).encode()).hexdigest()[:8]
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.txt").write_text("\n".join(overrides) + "\n", encoding="utf-8")
    (folder / "error.txt").unlink(missing_ok=True)
    if done is None:
        (folder / "error.txt").write_text(error + "\n", encoding="utf-8")
        return
    for file in COPIED:
        if (done / file).exists():
            shutil.copyfile(done / file, folder / file)
    link = folder / "run"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(done.resolve(), folder.resolve()))


def report() -> list[str]:
    """Compare the runs of the sweep, and name the jobs that failed. Returns: those."""
    jobs = ended_jobs()
    for folder in sorted({Path(job["folder"]) for job in jobs}):
        try:
            runs = find_runs([folder])
            from rlhf.reporting.report_page import write_page

            page = write_page(runs, folder / "report.html", f"Sweep {folder.name}")
            tables.print_comparison(runs, page)
        except Exception as error:  # the runs themselves are done
            line = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {line}"
            say(f"error: no report of {folder}: {reason}")
    failed = [job for job in jobs if job["error"]]
    for job in failed:
        say(f"failed: {job['job']}: {job['error']}")
    return [job["job"] for job in failed]
