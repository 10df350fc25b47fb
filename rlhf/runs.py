"""Runs read back from the disk, to be compared: status, settings, metrics, and what they say over seeds. No torch here."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import config, layout
from rlhf.config import ALIGNMENT, Stage

# what is compared with each other: runs of one stage, and all policies that stand on SFT, whatever algorithm made them
KINDS = {stage.name: "policy" if stage in ALIGNMENT else stage.name for stage in Stage if stage != Stage.inspect}
# what a kind of run is judged by: metric, and whether more is better; the first one that all runs have
JUDGED = {
    "sft": [("eval/perplexity", False)],
    "rm": [("eval/accuracy", True)],
    "policy": [("eval/gold", True), ("eval/score", True), ("eval/accuracy", True)],
    "eval": [("eval/win_rate", True), ("eval/accuracy", True)],
}
# final metrics that are shown, where a run has them
SHOWN = {
    "sft": ["eval/perplexity", "eval/gold", "eval/eos_rate"],
    "rm": ["eval/accuracy", "eval/accuracy_gold"],
    "policy": ["eval/score", "eval/gold", "eval/kl", "eval/length", "eval/eos_rate", "eval/accuracy"],
    "eval": ["eval/win_rate", "eval/win_rate_low", "eval/win_rate_high", "eval/accuracy", "eval/ece"],
}


@dataclass
class Run:
    """One run as it lies on the disk."""

    path: Path
    stage: str
    status: str  # finished, running, stopped, failed: why
    settings: dict[str, Any] = field(default_factory=dict)  # all that decides its result, by dotted key
    metrics: dict[str, float] = field(default_factory=dict)  # final ones
    rows: list[dict[str, float]] = field(default_factory=list)  # of each step
    parents: dict[str, str] = field(default_factory=dict)
    id: str = ""

    @property
    def kind(self) -> str:
        """That of the runs it is compared with; "" for a job without a run."""
        return KINDS.get(self.stage, "")

    @property
    def name(self) -> str:
        return self.path.name if self.path.parent.name != "attempts" else "/".join(self.path.parts[-3:])


def read_run(path: Path) -> Run:
    """A run of a run directory. Raises: FileNotFoundError when there is none."""
    summary = layout.read_summary(path) or {}
    stage = summary.get("stage") or OmegaConf.load(path / "config.yaml").stage.name
    settings: dict[str, Any] = summary.get("settings", {})
    if not settings:
        with contextlib.suppress(ValueError, KeyError, OmegaConfBaseException):  # of a version with other keys
            settings = layout.identity(config.load(path / "config.yaml"), Stage[stage])
    rows = read_lines(path / "metrics.jsonl")
    parents = path / "parents.json"
    given = summary.get("parents") or (json.loads(parents.read_text()) if parents.exists() else {})
    return Run(path, stage, status_of(path), settings, summary.get("metrics", {}), rows, given, summary.get("id", ""))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last one that is not whole yet is left out."""
    rows = []
    for line in path.read_text().split("\n") if path.exists() else ():  # not splitlines: answers hold other line ends
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def status_of(path: Path) -> str:
    """Whether a run is finished, running (another process holds it), failed, or stopped, and where."""
    if layout.read_summary(path):
        return "finished"
    if layout.is_owned(path):
        return "running"
    messages = sorted(path.glob("error-rank*.txt"), key=lambda file: file.stat().st_mtime_ns)
    if messages:
        return f"failed: {messages[0].read_text().splitlines()[0].split(': ', 1)[-1]}"
    whole, _ = layout.checkpoints(path)
    return f"stopped, goes on after step {whole[0][1]['step']}" if whole else "stopped"


def find(paths: Sequence[Path]) -> list[Run]:
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
            homes = sorted((p for p in outputs.iterdir() if is_run(p)), key=lambda p: (p / "config.yaml").stat().st_mtime)
            some = [read_run(home.resolve()) for home in homes]
        else:
            some = []
        if not some:
            raise FileNotFoundError(f"{path}: no run there; give a run (outputs/...), a sweep (multirun/...) or the folder with outputs/")
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
            found.append(Run(job, "", f"failed: {why.read_text().strip() if why.exists() else 'no run'}"))
        elif homes.count(home) == 1:
            found.append(read_run(home))
        else:
            run = read_run(job)
            chosen = (arg.partition("=") for arg in (job / "overrides.txt").read_text().splitlines())
            run.settings |= {key: value for key, _, value in chosen if key.startswith("deploy")}
            found.append(run)
    return found


def is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and path.name.split("-")[0] in KINDS


def upstream(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs that the given ones stand on, by id, looked for where they lie."""
    wanted = {id for run in runs for id in run.parents.values()}
    folders = {run.path.parent for run in runs if run.stage}
    near = [read_run(path) for folder in folders for path in folder.iterdir() if is_run(path) and layout.read_summary(path)]
    return {run.id: run for run in near if run.id in wanted}


# ------------------------------------------------------------------------------------------------------------------- comparison


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ, sorted."""
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if len({json.dumps(run.settings.get(key)) for run in runs if run.settings}) > 1]


def shown(value: Any) -> str:
    """A setting as text."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings_apart(runs: Sequence[Run]) -> list[str]:
    """Settings that tell runs apart, sorted: those in which runs of the same stage differ, and those that all have, of whatever stage."""
    by_stage = [[run for run in runs if run.stage == stage] for stage in dict.fromkeys(run.stage for run in runs)]
    known = [run for run in runs if run.settings]
    shared = {key for key in differing(known) if all(key in run.settings for run in known)}
    return sorted(shared.union(*(differing(some) for some in by_stage)))


def label(run: Run, keys: Sequence[str], algorithm: bool = False) -> str:
    """A run by what tells it apart; its own stage's settings without the stage's name. Args: algorithm: its stage does so, too."""
    parts = [run.stage] if algorithm else []
    parts += [f"{key.removeprefix(run.stage + '.')}={shown(run.settings.get(key))}" for key in keys if key in run.settings]
    return " ".join(parts) or run.name


def judged_by(runs: Sequence[Run]) -> tuple[str, bool]:
    """The metric that these runs of one kind are compared by, and whether more is better."""
    candidates = JUDGED[runs[0].kind]
    known = [(name, more) for name, more in candidates if all(name in run.metrics for run in runs if run.metrics)]
    return known[0] if known else candidates[-1]


@dataclass
class Cell:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


def cells(runs: Sequence[Run]) -> list[Cell]:
    """The finished runs of one kind, grouped over seeds; the best one first."""
    keys = [key for key in settings_apart(runs) if key not in ("seed", "data.seed")]
    several = len({run.stage for run in runs}) > 1
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "finished":
            unknown = not run.settings  # nobody's seeds
            name = run.name if unknown else label(run, keys, several) if keys or several else "all"
            groups.setdefault(name, []).append(run)
    metric, more = judged_by(runs)
    found = [Cell(name, some) for name, some in groups.items()]
    return sorted(found, key=lambda cell: (-1 if more else 1) * statistics.fmean(cell.values(metric) or [-math.inf if more else math.inf]))


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, by Student's t; NaN for a single value."""
    from scipy import stats

    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def mean_text(values: Sequence[float]) -> str:
    """Mean +- half the confidence interval, as text."""
    if not values:
        return ""
    half = interval(values)
    return f"{statistics.fmean(values):.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def verdict(found: Sequence[Cell], metric: str) -> str:
    """Whether the best cell is better than the next one by more than its seeds differ (Welch's t-test, two-sided)."""
    from scipy import stats

    found = [cell for cell in found if cell.values(metric)]
    if len(found) < 2:
        return ""
    best, second = found[0].values(metric), found[1].values(metric)
    line = f"best by {metric}: {found[0].label} ({mean_text(best)}), then {found[1].label} ({mean_text(second)}): "
    if len(best) < 2 or len(second) < 2:
        return line + "one seed says nothing of chance; add seed=1,2,3"
    if len({*best, *second}) == 1:
        return line + "all the same"
    p = float(stats.ttest_ind(best, second, equal_var=False).pvalue)
    verdict = "significant" if p < 0.05 else "not significant"
    return line + f"p = {p:.2g}, {verdict} at 5 % (Welch's t-test, {len(best)} and {len(second)} seeds, not corrected for choosing)"
