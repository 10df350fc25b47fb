"""Compare runs: settings that differ, groups over seeds, confidence intervals, significance."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf.runs.history import Run
from rlhf.runs.stage_views import PrimaryMetric, view_of

Item = TypeVar("Item")

SEEDS = ("seed", "data.seed")  # runs that differ in these only are one setting
IN_LABEL = 4  # settings that a label names, besides seeds
LONGEST_VALUE = 32  # characters of a setting in a label


@dataclass
class SeedGroup:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        """The final metric of each finished run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def is_measured(self, metric: str) -> bool:
        """Whether there are values of a metric, all finite: a perplexity may be infinite."""
        values = self.values(metric)
        return bool(values) and all(map(math.isfinite, values))

    @property
    def finished(self) -> int:
        """The number of finished runs."""
        return sum(run.status == "finished" for run in self.runs)


@dataclass
class Comparison:
    """Runs of one kind on the same data, ready to be shown side by side."""

    data: str  # short names of the sources; "" where they are unknown
    stages: list[str]
    runs: list[Run]  # sorted by label
    labels: list[str]  # of each run; no two are alike
    settings: list[str]  # keys that distinguish the runs
    in_label: list[str]  # those of them that labels name
    groups: list[SeedGroup]  # the best one first
    metrics: list[str]  # final ones that at least one run has
    primary: PrimaryMetric

    @property
    def title(self) -> str:
        return ", ".join(self.stages) + (f" on {self.data}" if self.data else "")

    def by_run(self) -> Comparison:
        """The same with each run as a group of its own."""
        groups = [SeedGroup(label, [run]) for label, run in zip(self.labels, self.runs)]
        return replace(self, groups=groups)

    @property
    def has_seeds(self) -> bool:
        """Whether a setting was run with several seeds."""
        return any(group.finished > 1 for group in self.groups)

    @property
    def has_sweeps(self) -> bool:
        """Whether the runs are not all of the same sweeps."""
        return len({tuple(run.sweeps) for run in self.runs}) > 1


def compare_runs(runs: Sequence[Run], kind: str, group_by: Sequence[str] = ()) -> list[Comparison]:
    """The runs of one kind (StageView.kind), compared where they have the same data; the
    comparison of the most runs comes first. Args: group_by: as `compare_alike`."""
    same_data = partition([run for run in runs if run.kind == kind], data_settings)
    return [compare_alike(some, group_by) for some in sorted(same_data, key=len, reverse=True)]


def compare_alike(runs: Sequence[Run], group_by: Sequence[str] = ()) -> Comparison:
    """The comparison of runs of one kind on the same data.

    Args: group_by: settings; runs that agree in them are one group. None given: all but the seeds.
    """
    stages = list(dict.fromkeys(run.stage for run in runs))
    keys = distinguishing_settings(runs)
    in_label = informative_settings(runs, keys)
    labelled = sorted(
        ((run_label(run, in_label, len(stages) > 1), run) for run in runs), key=lambda pair: pair[0]
    )
    runs = [run for _, run in labelled]
    return Comparison(
        data_name(runs[0]),
        stages,
        runs,
        number_duplicates([label for label, _ in labelled]),
        keys,
        in_label,
        seed_groups(runs, group_by),
        [name for name in view_of(stages[0]).metrics if any(name in run.metrics for run in runs)],
        primary_metric(runs),
    )


def partition(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in lists of equal `key`, in the order of their first ones."""
    parts: dict[Hashable, list[Item]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return list(parts.values())


# ---- data


def data_settings(run: Run) -> str:
    """The settings that name a run's sources, as text; "" where they are unknown."""
    sources = {
        key: value
        for key, value in run.settings.items()
        if key.startswith("data.sources.") and not key.endswith(".weight")
    }
    return json.dumps(sources, sort_keys=True) if sources else ""


def data_name(run: Run) -> str:
    """Short names of a run's sources: rm-static + pairs.jsonl."""
    paths = [
        str(value)
        for key, value in sorted(run.settings.items())
        if key.startswith("data.sources.") and key.endswith(".path") and value is not None
    ]
    return " + ".join(Path(path.removeprefix("builtin:")).name or path for path in paths)


# ---- settings and labels


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ, sorted."""
    known = [run.settings for run in runs if run.settings]
    keys = sorted({key for settings in known for key in settings})
    # as text: 1, 1.0 and true are equal for Python; repr is quicker than JSON, for 500 runs
    return [key for key in keys if len({repr(settings.get(key)) for settings in known}) > 1]


def distinguishing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings that tell runs apart, sorted.

    Those in which runs of the same stage differ, and those that all runs have, of any stage.
    The rl.* values of different presets do not count: the preset's name stands for them.
    """
    by_stage = partition(runs, lambda run: run.stage)
    known = [run for run in runs if run.settings]
    shared = {
        key
        for key in differing_settings(known)
        if all(key in run.settings for run in known) and not key.startswith("rl.")
    }
    return sorted(shared.union(*(differing_settings(some) for some in by_stage)))


def informative_settings(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """The few of the differing settings `keys` that labels name; the seeds last.

    Of settings that split the runs in the same way (all that a recipe sets), one is enough.
    First come those that the runs' names show, which were set by hand; then names; then the
    settings of the stage itself.
    """
    own = {run.stage for run in runs} | {"rl"}

    def order(key: str) -> tuple[bool, bool, bool, str]:
        by_hand = any(f"+{key}-" in run.name for run in runs)
        return (not by_hand, not key.endswith(".name"), key.partition(".")[0] not in own, key)

    chosen: dict[tuple[int, ...], str] = {}  # by how they split the runs
    for key in sorted((key for key in keys if key not in SEEDS), key=order):
        values = [json.dumps(run.settings.get(key)) for run in runs]
        chosen.setdefault(tuple(map(values.index, values)), key)
    return [*list(chosen.values())[:IN_LABEL], *(key for key in SEEDS if key in keys)]


def format_value(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_label(run: Run, keys: Sequence[str], with_stage: bool = False) -> str:
    """The settings `keys` that a run has; its short name where they are unknown or none.

    The settings of its own stage are written without their node: kl.coef=0.05. Of a long value
    the end is shown.
    Args: with_stage: begin with the stage's name.
    """
    if not run.settings:
        return run.short_name
    parts = [run.stage] if with_stage else []
    for key in keys:
        if key in run.settings:
            value = format_value(run.settings[key])
            value = value if len(value) <= LONGEST_VALUE else f"…{value[1 - LONGEST_VALUE :]}"
            parts.append(f"{key.removeprefix(run.stage + '.').removeprefix('rl.')}={value}")
    return " ".join(parts) or run.short_name


def number_duplicates(names: list[str]) -> list[str]:
    """The names; the second of equal ones gets " (2)", and so on."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


# ---- groups over seeds


def primary_metric(runs: Sequence[Run]) -> PrimaryMetric:
    """The metric by which runs of one kind are compared.

    The first candidate that all of the finished runs have, else the one that most of them have.
    """
    candidates = view_of(runs[0].stage).primary

    def count(metric: PrimaryMetric) -> int:
        return sum(metric.name in run.metrics for run in runs)

    return max(candidates, key=count)  # the first of equal ones


def seed_groups(runs: Sequence[Run], group_by: Sequence[str] = ()) -> list[SeedGroup]:
    """The runs of one kind, grouped over seeds; the best group first.

    A run whose settings are unknown is a group of its own.
    Args: group_by: settings; runs that agree in them are one group, whatever else differs.
    """
    keys = [*group_by] or [key for key in distinguishing_settings(runs) if key not in SEEDS]
    in_label = [*group_by] or informative_settings(runs, keys)
    with_stage = len({run.stage for run in runs}) > 1

    def setting(run: Run) -> Hashable:
        if not run.settings:
            return run.path
        return run.stage, json.dumps([run.settings.get(key) for key in keys])

    def label(run: Run) -> str:
        has_label = in_label or with_stage or not run.settings
        return run_label(run, in_label, with_stage) if has_label else "all"

    alike = sorted(partition(runs, setting), key=lambda some: label(some[0]))
    labels = number_duplicates([label(some[0]) for some in alike])
    metric = primary_metric(runs)
    sign = -1 if metric.higher_is_better else 1

    def rank(group: SeedGroup) -> tuple[bool, float]:
        if not group.is_measured(metric.name):
            return True, 0.0
        return False, sign * statistics.fmean(group.values(metric.name))

    return sorted(map(SeedGroup, labels, alike), key=rank)


def confidence_half_width(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of a mean, by Student's t; NaN for one value, and where one
    is not finite."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    from scipy import special  # scipy.stats takes a second to import

    return float(special.stdtrit(freedom, 0.975))


def format_mean(values: Sequence[float]) -> str:
    """Mean +- half the confidence interval, as text; "" without a value."""
    if not values:
        return ""
    half = confidence_half_width(values)
    return f"{statistics.fmean(values):.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
