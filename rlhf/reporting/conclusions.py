"""What a comparison answers, in sentences: which is the best, by how much, is it significant."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

from rlhf.config.stage_graph import is_stage_name
from rlhf.reporting.comparison import (
    Comparison,
    SeedGroup,
    differing_settings,
    format_mean,
    informative_settings,
    partition,
    t_quantile,
)
from rlhf.runs.history import Run
from rlhf.runs.stage_views import PrimaryMetric

HELD_OUT = ("data.eval_share", "data.eval_rows")  # every metric is of the held-out rows
# settings of the policies that others are compared with; one of online RL has its own, too
OPPONENTS = {
    "base": ("actor.path",),
    "sft": ("actor.", "sft."),
    "dpo": ("actor.", "sft.", "dpo."),
}


def conclusions(comparison: Comparison) -> list[str]:
    """Which setting is the best, by how much, whether that is significant, and what limits it.

    Settings whose metric does not mean the same (PrimaryMetric.defined_by) are not ranked against
    each other. Returns: sentences; none where no run is finished.
    """
    metric = comparison.primary
    measured = [group for group in comparison.groups if group.is_measured(metric.name)]
    if not measured:
        return []
    if len(measured) == 1:
        lines = [describe_one(measured[0], metric)]
    else:
        ranked = partition(measured, lambda group: meaning(group.runs[0], metric))
        lines = [compare_best(some, metric) for some in ranked if len(some) > 1]
        if len(ranked) > 1:
            lines.append(why_not_ranked(measured, metric))
    others = [g for g in comparison.groups if g.finished and not g.is_measured(metric.name)]
    for reason, labels in {
        f"they have no {metric.label}": [g.label for g in others if not g.values(metric.name)],
        f"their {metric.label} is not finite": [g.label for g in others if g.values(metric.name)],
    }.items():
        if labels:
            lines.append(f"Not compared, as {reason}: {', '.join(labels)}.")
    return lines + ([metric.caution] if metric.caution else [])


def meaning(run: Run, metric: PrimaryMetric) -> str:
    """The settings that decide what a run's metric means, as text."""
    if not run.settings:
        return str(run.path)
    return json.dumps({key: run.settings[key] for key in sorted(decisive_settings(run, metric))})


def decisive_settings(run: Run, metric: PrimaryMetric) -> set[str]:
    """The keys of a run's settings that decide what its metric means."""
    has_rm = any(key.startswith("rm.") for key in run.settings)  # else reward.lora is the critic's
    prefixes = (*HELD_OUT, *metric.defined_by)
    if has_rm and "rm." in metric.defined_by:
        prefixes += ("data.shares", "data.max_")  # what the reward model is trained on
    opponent = str(run.settings.get("eval.against"))
    if "eval.against" in metric.defined_by and (opponent == "base" or is_stage_name(opponent)):
        prefixes += OPPONENTS.get(opponent, ("actor.", "sft.", f"{opponent}."))
    return {
        key
        for key in run.settings
        if key.startswith(prefixes) and (has_rm or not key.startswith("reward.lora."))
    }


def why_not_ranked(groups: Sequence[SeedGroup], metric: PrimaryMetric) -> str:
    """A sentence: why not all groups are ranked against each other."""
    runs = [group.runs[0] for group in groups]
    if any(not run.settings for run in runs):
        return "Runs of an earlier version are not ranked: their settings are unknown."
    decisive = set().union(*(decisive_settings(run, metric) for run in runs))
    keys = [key for key in differing_settings(runs) if key in decisive]
    different = ", ".join(informative_settings(runs, keys))
    return (
        f"Runs with different {different} are not ranked against each other: their "
        f"{metric.label} does not mean the same."
    )


def describe_one(group: SeedGroup, metric: PrimaryMetric) -> str:
    """A sentence on a setting that has no other one to be compared with."""
    return f"Only one setting, so nothing to compare: {metric.label} {describe(group, metric)}."


def describe(group: SeedGroup, metric: PrimaryMetric) -> str:
    """A group's mean, over how many seeds, and its value before training."""
    values, before = group.values(metric.name), group.values(f"{metric.name}_before")
    notes = [f"mean over {len(values)} seeds"] if len(values) > 1 else []
    notes += [f"{statistics.fmean(before):.3f} before training"] if before else []
    return format_mean(values) + (f" ({', '.join(notes)})" if notes else "")


def compare_best(groups: Sequence[SeedGroup], metric: PrimaryMetric) -> str:
    """Sentences: the best group, its difference to the second best, and whether it is significant.

    Welch's t-test over seeds, two-sided. Args: groups: two or more, the best one first.
    """
    (best, second), name = groups[:2], metric.name
    ours, theirs = best.values(name), second.values(name)
    difference = abs(statistics.fmean(ours) - statistics.fmean(theirs))
    than = f"{difference:.3f} {'higher' if metric.higher_is_better else 'lower'} than"
    than = than if difference else "equal to"
    interval, verdict = significance(ours, theirs, len(groups))
    return (
        f"Best of {len(groups)} settings by {metric.label}: {best.label} with "
        f"{describe(best, metric)}, {than} {second.label}{interval}. "
        f"{verdict}{kl_note(best, second)}"
    )


def significance(ours: Sequence[float], theirs: Sequence[float], groups: int) -> tuple[str, str]:
    """The interval of a difference in brackets, and a sentence on its significance.

    Args: groups: the number of groups that the best one was chosen from.
    """
    if len(ours) < 2 or len(theirs) < 2:
        return "", "Significance cannot be tested with one seed: repeat with -m seed=1,2,3."
    if len({*ours}) == len({*theirs}) == 1:
        return "", "Significance cannot be tested: the seeds have equal values."
    low, high, p = welch(ours, theirs)
    if statistics.fmean(ours) < statistics.fmean(theirs):
        low, high = -high, -low
    verdict = "Significant at 5 %" if p < 0.05 else "Not significant at 5 %"
    chosen = f", not corrected for choosing the best of {groups}" if groups > 2 else ""
    test = f"Welch's t-test over {len(ours)} and {len(theirs)} seeds{chosen}"
    return (
        f" (95 % confidence interval of the difference: {low:.3f} to {high:.3f})",
        f"{verdict}: p = {p:.2g} ({test}).",
    )


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Welch's t-test, two-sided. Args: a, b: at least two values each, not all equal.

    Returns: the 95 % confidence interval of mean(a) - mean(b), and p.
    """
    from scipy import special

    errors = [statistics.variance(some) / len(some) for some in (a, b)]  # of the means, squared
    error = math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b)))
    difference = statistics.fmean(a) - statistics.fmean(b)
    half = t_quantile(freedom) * error
    p = 2 * float(special.stdtr(freedom, -abs(difference) / error))
    return difference - half, difference + half, p


def kl_note(best: SeedGroup, second: SeedGroup) -> str:
    """A sentence where the KL of two groups of policies differs much, else ""."""
    ours, theirs = best.values("eval/kl"), second.values("eval/kl")
    if not ours or not theirs:
        return ""
    kl, other = statistics.fmean(ours), statistics.fmean(theirs)
    if max(kl, other) < 1.5 * max(min(kl, other), 0.0) + 0.5:
        return ""
    note = f" The KL differs: {kl:.2f} nats per response, not {other:.2f}"
    return note + (", so compare them at equal KL (reward against KL)." if kl > other else ".")
