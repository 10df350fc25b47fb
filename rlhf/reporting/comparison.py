"""Compare runs: settings that differ, groups over seeds, confidence intervals, significance."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.runs.history import Run
from rlhf.runs.stage_views import PrimaryMetric, view_of


@dataclass
class SeedGroup:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        """The final metric of each run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


@dataclass
class Comparison:
    """Runs of one kind, ready to be shown side by side."""

    stages: list[str]
    runs: list[Run]  # sorted by label
    labels: list[str]  # of each run; no two are alike
    settings: list[str]  # keys that distinguish the runs
    groups: list[SeedGroup]  # of the finished runs; the best one first
    metrics: list[str]  # final ones that at least one run has
    primary: PrimaryMetric

    @property
    def has_seeds(self) -> bool:
        """Whether a setting was run with several seeds."""
        return any(len(group.runs) > 1 for group in self.groups)


def compare_runs(runs: Sequence[Run], kind: str) -> Comparison | None:
    """The runs of one kind (StageView.kind), or None where there are none."""
    runs = [run for run in runs if run.kind == kind]
    if not runs:
        return None
    stages = list(dict.fromkeys(run.stage for run in runs))
    keys = distinguishing_settings(runs)
    labelled = sorted(
        ((run_label(run, keys, len(stages) > 1), run) for run in runs), key=lambda pair: pair[0]
    )
    return Comparison(
        stages,
        [run for _, run in labelled],
        number_duplicates([label for label, _ in labelled]),
        keys,
        seed_groups([run for _, run in labelled]),
        [name for name in view_of(stages[0]).metrics if any(name in run.metrics for run in runs)],
        primary_metric(runs),
    )


# ---- settings and labels


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ, sorted."""
    keys = sorted({key for run in runs for key in run.settings})
    return [
        key
        for key in keys
        if len({json.dumps(run.settings.get(key)) for run in runs if run.settings}) > 1
    ]


def distinguishing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings that tell runs apart, sorted.

    Those in which runs of the same stage differ, and those that all runs have, of any stage.
    The rl.* values of different presets do not count: the preset's name stands for them.
    """
    by_stage = [
        [run for run in runs if run.stage == stage]
        for stage in dict.fromkeys(run.stage for run in runs)
    ]
    known = [run for run in runs if run.settings]
    shared = {
        key
        for key in differing_settings(known)
        if all(key in run.settings for run in known) and not key.startswith("rl.")
    }
    return sorted(shared.union(*(differing_settings(some) for some in by_stage)))


def format_value(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_label(run: Run, keys: Sequence[str], with_stage: bool = False) -> str:
    """A short name of a run: the settings `keys` that it has; its directory where they are unknown.

    The settings of its own stage are written without their node: kl.coef=0.05.
    Args: with_stage: begin with the stage's name.
    """
    if not run.settings:
        return run.name
    parts = [run.stage] if with_stage else []
    parts += [
        f"{key.removeprefix(run.stage + '.').removeprefix('rl.')}={format_value(run.settings[key])}"
        for key in keys
        if key in run.settings
    ]
    return " ".join(parts) or run.name


def number_duplicates(names: list[str]) -> list[str]:
    """The names; the second of equal ones gets " (2)", and so on."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


# ---- groups over seeds


def primary_metric(runs: Sequence[Run]) -> PrimaryMetric:
    """The metric by which runs of one kind are compared: the first one that all of them have."""
    candidates = view_of(runs[0].stage).primary
    return next(
        (
            metric
            for metric in candidates
            if all(metric.name in run.metrics for run in runs if run.metrics)
        ),
        candidates[-1],
    )


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """The finished runs of one kind, grouped over seeds; the best group first.

    A run whose settings are unknown is a group of its own.
    """
    keys = [key for key in distinguishing_settings(runs) if key not in ("seed", "data.seed")]
    with_stage = len({run.stage for run in runs}) > 1
    members: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "finished":
            has_label = keys or with_stage or not run.settings
            label = run_label(run, keys, with_stage) if has_label else "all"
            members.setdefault(label, []).append(run)
    metric, higher_is_better = primary_metric(runs)
    sign = -1 if higher_is_better else 1

    def rank(group: SeedGroup) -> float:
        values = group.values(metric)
        return sign * statistics.fmean(values) if values else math.inf

    return sorted((SeedGroup(label, some) for label, some in members.items()), key=rank)


def confidence_half_width(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of a mean, by Student's t; NaN for one value."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def format_mean(values: Sequence[float]) -> str:
    """Mean +- half the confidence interval, as text; "" without a value."""
    if not values:
        return ""
    half = confidence_half_width(values)
    return f"{statistics.fmean(values):.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def compare_best(groups: Sequence[SeedGroup], metric: str) -> str:
    """A line: is the best group significantly better than the second best? "" for fewer than two.

    Welch's t-test over seeds, two-sided. Args: groups: the best one first.
    """
    from scipy import stats

    groups = [group for group in groups if group.values(metric)]
    if len(groups) < 2:
        return ""
    best, second = groups[0].values(metric), groups[1].values(metric)
    line = f"best by {metric}: {groups[0].label} ({format_mean(best)}), "
    line += f"then {groups[1].label} ({format_mean(second)}): "
    if len(best) < 2 or len(second) < 2:
        return line + "one seed: significance cannot be tested; add seed=1,2,3"
    if len({*best, *second}) == 1:
        return line + "all values are equal"
    p = float(stats.ttest_ind(best, second, equal_var=False).pvalue)
    verdict = "significant" if p < 0.05 else "not significant"
    seeds = f"{len(best)} and {len(second)} seeds"
    test = f"Welch's t-test, {seeds}, not corrected for choosing the best"
    return line + f"p = {p:.2g}, {verdict} at 5 % ({test})"
