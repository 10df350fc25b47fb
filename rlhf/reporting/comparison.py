"""Compare runs: settings that differ, groups over seeds, confidence intervals, significance."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.runs.history import Run

# what a kind of run is judged by: metric, and whether more is better; the first one that all runs have
PRIMARY_METRIC = {
    "sft": [("eval/perplexity", False)],
    "rm": [("eval/accuracy", True)],
    "policy": [("eval/gold", True), ("eval/score", True), ("eval/accuracy", True)],
    "eval": [("eval/win_rate", True), ("eval/accuracy", True)],
}
# final metrics that are shown, where a run has them
REPORTED_METRICS = {
    "sft": ["eval/perplexity", "eval/gold", "eval/eos_rate"],
    "rm": ["eval/accuracy", "eval/accuracy_gold"],
    "policy": [
        "eval/score",
        "eval/gold",
        "eval/kl",
        "eval/length",
        "eval/eos_rate",
        "eval/accuracy",
    ],
    "eval": [
        "eval/win_rate",
        "eval/win_rate_low",
        "eval/win_rate_high",
        "eval/accuracy",
        "eval/ece",
    ],
}


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ, sorted."""
    keys = sorted({key for run in runs for key in run.settings})
    return [
        key
        for key in keys
        if len({json.dumps(run.settings.get(key)) for run in runs if run.settings}) > 1
    ]


def format_value(value: Any) -> str:
    """A setting as text."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def distinguishing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings that tell runs apart, sorted: those in which runs of the same stage differ, and those that all have, of whatever stage."""
    by_stage = [
        [run for run in runs if run.stage == stage]
        for stage in dict.fromkeys(run.stage for run in runs)
    ]
    known = [run for run in runs if run.settings]
    shared = {key for key in differing_settings(known) if all(key in run.settings for run in known)}
    return sorted(shared.union(*(differing_settings(some) for some in by_stage)))


def run_label(run: Run, keys: Sequence[str], algorithm: bool = False) -> str:
    """A run by what tells it apart; its own stage's settings without the stage's name. Args: algorithm: its stage does so, too."""
    parts = [run.stage] if algorithm else []
    parts += [
        f"{key.removeprefix(run.stage + '.')}={format_value(run.settings.get(key))}"
        for key in keys
        if key in run.settings
    ]
    return " ".join(parts) or run.name


def primary_metric(runs: Sequence[Run]) -> tuple[str, bool]:
    """The metric that these runs of one kind are compared by, and whether more is better."""
    candidates = PRIMARY_METRIC[runs[0].kind]
    known = [
        (name, more)
        for name, more in candidates
        if all(name in run.metrics for run in runs if run.metrics)
    ]
    return known[0] if known else candidates[-1]


@dataclass
class SeedGroup:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """The finished runs of one kind, grouped over seeds; the best one first."""
    keys = [key for key in distinguishing_settings(runs) if key not in ("seed", "data.seed")]
    several = len({run.stage for run in runs}) > 1
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "finished":
            unknown = not run.settings  # nobody's seeds
            name = (
                run.name if unknown else run_label(run, keys, several) if keys or several else "all"
            )
            groups.setdefault(name, []).append(run)
    metric, more = primary_metric(runs)
    found = [SeedGroup(name, some) for name, some in groups.items()]
    return sorted(
        found,
        key=lambda cell: (
            (-1 if more else 1)
            * statistics.fmean(cell.values(metric) or [-math.inf if more else math.inf])
        ),
    )


def confidence_half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, by Student's t; NaN for a single value."""
    from scipy import stats

    if len(values) < 2:
        return math.nan
    return (
        float(stats.t.ppf(0.975, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )


def format_mean(values: Sequence[float]) -> str:
    """Mean +- half the confidence interval, as text."""
    if not values:
        return ""
    half = confidence_half_width(values)
    return f"{statistics.fmean(values):.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def compare_best(found: Sequence[SeedGroup], metric: str) -> str:
    """Whether the best cell is better than the next one by more than its seeds differ (Welch's t-test, two-sided)."""
    from scipy import stats

    found = [cell for cell in found if cell.values(metric)]
    if len(found) < 2:
        return ""
    best, second = found[0].values(metric), found[1].values(metric)
    line = f"best by {metric}: {found[0].label} ({format_mean(best)}), then {found[1].label} ({format_mean(second)}): "
    if len(best) < 2 or len(second) < 2:
        return line + "one seed says nothing of chance; add seed=1,2,3"
    if len({*best, *second}) == 1:
        return line + "all the same"
    p = float(stats.ttest_ind(best, second, equal_var=False).pvalue)
    verdict = "significant" if p < 0.05 else "not significant"
    return (
        line
        + f"p = {p:.2g}, {verdict} at 5 % (Welch's t-test, {len(best)} and {len(second)} seeds, not corrected for choosing)"
    )
