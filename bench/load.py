"""Long and many runs: what reports, lists, a resume and sweeps take, beside their limits.

    python bench/load.py [--rows 1000000] [--runs 500] [--jobs 200] [--work DIR]

It writes run directories as train.py leaves them, and starts the commands of a user. Seconds are
CPU time of the process (user), so that other work on the machine does not count; wall-clock time
is beside them. The limits are for the default sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

METRICS = (
    "objective/scores",
    "reward/gold/mean",
    "objective/kl",
    "loss/policy_avg",
    "loss/value_avg",
    "tokens/response_mean",
    "policy/entropy_avg",
    "policy/clipfrac_avg",
    "val/explained_variance",
)
FINAL = {"eval/score": 0.5, "eval/score_before": 0.0, "eval/gold": 1.0, "eval/gold_before": 0.0}
FINAL |= {"eval/kl": 2.0, "eval/length": 20.0, "eval/eos_rate": 1.0}


@dataclass
class Load:
    """What one command took. A limit that is None does not hold for it."""

    what: str
    seconds: float  # CPU time
    most_seconds: float
    wall: float
    megabytes: float | None = None
    most_megabytes: float | None = None
    page: float | None = None  # megabytes
    most_page: float | None = None

    def cells(self) -> list[str]:
        """Its row of the table."""
        pairs = (
            (self.seconds, self.most_seconds, ".2f"),
            (self.megabytes, self.most_megabytes, ".0f"),
            (self.page, self.most_page, ".2f"),
        )
        of = [
            ""
            if value is None
            else f"{value:{form}}" + (f" (limit {most:g})" if most is not None else "")
            for value, most, form in pairs
        ]
        return [self.what, of[0], f"{self.wall:.1f}", *of[1:]]


# ---- run directories


def write_run(root: Path, rows: int, *overrides: str, stage: str = "ppo") -> Path:
    """A finished run with so many rows of metrics, in root/outputs."""
    from rlhf import compose
    from rlhf.config.loading import save_config
    from rlhf.runs.directory import config_for_stage, describe_environment, write_json
    from rlhf.runs.identity import run_dir_for, settings_to_record

    compose.register()
    typed = [f"stage={stage}", f"root={root}", *overrides]
    command = compose.make_command(compose.compose_again(typed), typed)
    run = run_dir_for(command, stage)
    run.mkdir(parents=True)
    save_config(config_for_stage(command.cfg, stage, {}), run / "config.yaml")
    write_json(run / "parents.json", {})
    write_json(run / "env.json", describe_environment())
    (run / "model").mkdir()
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows):
            # like measurements: many digits, and some noise
            values = {name: math.sin(i * (j + 1.37)) + i / rows for j, name in enumerate(METRICS)}
            file.write(json.dumps({"step": i + 1, "time": 1.7e9 + i / 2, **values}) + "\n")
    summary = {"id": run.name[-8:], "stage": stage, "status": "finished", "parents": {}}
    summary |= {"metrics": FINAL, "seconds": 60.0, "finished": "2026-01-02 04:05", "data": []}
    write_json(run / "summary.json", summary | {"settings": settings_to_record(command, stage)})
    return run


def copy_run(run: Path, number: int) -> None:
    """The run with another coefficient and seed, in a directory and with an id of its own."""
    other = run.with_name(f"ppo-tiny-tiny+seed-{number}-{number:08x}")
    shutil.copytree(run, other)
    summary = json.loads((other / "summary.json").read_text(encoding="utf-8"))
    summary["id"] = f"{number:08x}"
    summary["settings"] |= {"seed": number % 10, "rl.kl.coef": number // 10 / 1000}
    summary["metrics"] = FINAL | {"eval/gold": number * 37 % 101 / 50}
    (other / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


# ---- commands


def measure(*command: str, cwd: Path) -> tuple[float, float, float]:
    """CPU seconds, wall-clock seconds and the largest memory in MB of a command of python."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        # not ru_maxrss: that begins with the memory of the process that has started this one
        peak, ended = 0.0, 0
        while not ended:
            peak = max(peak, peak_memory(process.pid))
            time.sleep(0.01)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        errors.seek(0)
        assert os.waitstatus_to_exitcode(status) == 0, errors.read()
    return used.ru_utime, time.monotonic() - started, peak


def peak_memory(process: int) -> float:
    """The most memory that a process has had so far, in MB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    found = [line for line in lines if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


def report_of_long_run(work: Path, rows: int) -> list[Load]:
    """Report and pictures of a run with so many rows, and what they cost when it resumes."""
    root = work / "long"
    run = write_run(root, rows)
    page = root / "report.html"
    cpu, wall, memory = measure("-m", "rlhf.report", cwd=root)
    size = page.stat().st_size / 1e6
    what = f"report of a run with {rows:,} rows"
    found = [Load(what, cpu, 5, wall, memory, 500, size, 5)]
    cpu, wall, memory = measure(str(Path(__file__).resolve()), "--pictures", str(run), cwd=root)
    found.append(Load(f"curves.png and frontier.png of {rows:,} rows", cpu, 5, wall, memory, 500))
    few, *_ = measure(str(Path(__file__).resolve()), "--resume", str(root / "none"), cwd=root)
    cpu, wall, _ = measure(str(Path(__file__).resolve()), "--resume", str(run), cwd=root)
    found.append(Load(f"resume after {rows:,} rows: more than without", cpu - few, 5, wall))
    return found


def pictures(run: Path) -> None:
    """Draw what a run draws at its end."""
    from rlhf.reporting.curves import plot_run

    plot_run(run, "ppo", FINAL)


def resume(run: Path) -> None:
    """What a run does with its metrics.jsonl when it resumes: the time of a step for the plan, and
    the tracker."""
    from rlhf import compose
    from rlhf.runs.timing import newest_times
    from rlhf.training.tracker import Tracker

    compose.register()
    run.mkdir(exist_ok=True)
    log = run / "metrics.jsonl"
    log.touch()
    newest_times(log)
    cfg = compose.typed_config(compose.compose_alone(["stage=ppo", "wandb.mode=disabled"], []))
    tracker = Tracker(cfg, run, 10, [])
    tracker.load_state_dict(tracker.state_dict())
    tracker.close({})


def many_runs(work: Path, runs: int) -> list[Load]:
    """Report and list of so many runs."""
    root = work / "many"
    first = write_run(root, 12)
    for number in range(1, runs):
        copy_run(first, number)
    cpu, wall, memory = measure("-m", "rlhf.report", cwd=root)
    size = (root / "report.html").stat().st_size / 1e6
    found = [Load(f"report of {runs} runs", cpu, 3, wall, memory, None, size)]
    cpu, wall, memory = measure("-m", "rlhf.report", "--list", cwd=root)
    return [*found, Load(f"--list of {runs} runs", cpu, 1, wall, memory)]


def sweep(work: Path, jobs: int) -> list[Load]:
    """The start of a sweep, and what each job of a repeated one takes."""
    root = work / "sweep"
    root.mkdir()
    train = str(ROOT / "train.py")
    seeds = f"seed=range(0,{jobs})"
    cpu, wall = first_job(train, "-m", seeds, "plan=true", cwd=root)
    found = [Load(f"sweep of {jobs} jobs: until the first one starts", cpu, 5, wall)]
    write_run(root, 12, stage="sft")
    one, *_ = measure(train, "-m", "stage=sft", "wandb.notes=n", cwd=root)
    notes = ",".join(f"n{i}" for i in range(jobs))
    cpu, wall, memory = measure(train, "-m", "stage=sft", f"wandb.notes={notes}", cwd=root)
    each = (cpu - one) / (jobs - 1)
    return [*found, Load("each finished job of a repeated sweep", each, 0.2, wall / jobs, memory)]


def first_job(*command: str, cwd: Path) -> tuple[float, float]:
    """CPU and wall-clock seconds until a sweep starts its first job."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    with process:
        for line in process.stderr:
            if line.startswith("--- job 1 of"):
                break
        fields = (
            Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
        process.kill()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK"), time.monotonic() - started


def print_table(loads: list[Load]) -> None:
    """A row per command, as Markdown."""
    print("| what | CPU seconds | seconds | peak MB | page, MB |\n|---|---|---:|---|---|")
    for load in loads:
        print(f"| {' | '.join(load.cells())} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--work", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("--pictures", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pictures or args.resume:
        pictures(args.pictures) if args.pictures else resume(args.resume)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        loads = report_of_long_run(work, args.rows)
        loads += many_runs(work, args.runs) + sweep(work, args.jobs)
    print_table(loads)


if __name__ == "__main__":
    main()
