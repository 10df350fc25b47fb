"""Runs side by side as one HTML page: curves, reward against KL, settings, responses, parent runs.

Plotly draws the figures; templates/report.html is the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf.base.files import atomic_path
from rlhf.reporting.comparison import (
    Comparison,
    compare_best,
    compare_runs,
    format_mean,
    format_value,
    primary_metric,
)
from rlhf.reporting.html import Figures, Table, render
from rlhf.reporting.report_figures import curves_figure, drawn_runs, frontier_figure
from rlhf.runs.history import Run, parent_runs, read_lines

MAX_PROMPTS = 8  # whose responses are shown
KINDS = ("policy", "rm", "sft", "eval")  # in the order of the page


@dataclass
class Section:
    """What the page shows of the runs of one kind; None and "" are left out."""

    stages: str
    runs: Table
    over_seeds: Table | None
    verdict: str
    curves: Markup | None
    frontier: Markup | None
    settings: Table | None
    responses: Table | None


def write_page(runs: Sequence[Run], file: Path, title: str) -> Path:
    """Write the page of these runs. Returns: `file`."""
    with atomic_path(file) as temporary:
        temporary.write_text(page(runs, title))
    return file


def page(runs: Sequence[Run], title: str) -> str:
    """The page as HTML. Args: runs: of any stages; those of one kind are compared."""
    figures = Figures()
    comparisons = [(kind, compare_runs(runs, kind)) for kind in KINDS]
    return render(
        "report.html",
        title=title,
        sections=[
            section(comparison, kind == "policy", figures)
            for kind, comparison in comparisons
            if comparison
        ],
        jobs_without_run=[run for run in runs if not run.stage],
        lineage=lineage_table([run for run in runs if run.kind == "policy"]),
    )


def section(comparison: Comparison, policies: bool, figures: Figures) -> Section:
    """The section of one kind of runs. Args: policies: they have a KL and write responses."""
    drawn = drawn_runs(comparison)
    return Section(
        stages=", ".join(comparison.stages),
        runs=runs_table(comparison),
        over_seeds=seeds_table(comparison) if comparison.has_seeds else None,
        verdict=compare_best(comparison.groups, comparison.primary.name),
        curves=figures.add(curves_figure(drawn, comparison.stages)) if drawn else None,
        frontier=figures.add(frontier_figure(drawn)) if drawn and policies else None,
        settings=settings_table(comparison) if comparison.settings else None,
        responses=responses_table(comparison) if policies else None,
    )


# ---- tables


def runs_table(comparison: Comparison) -> Table:
    """A row per run: label, status, steps, final metrics, directory."""
    rows = [
        [
            label,
            run.status_text,
            str(len(run.rows)),
            *(f"{run.metrics[m]:.3f}" if m in run.metrics else "" for m in comparison.metrics),
            run.name,
        ]
        for label, run in zip(comparison.labels, comparison.runs)
    ]
    header = ["run", "status", "steps", *comparison.metrics, "directory"]
    return Table(header, rows, ["status", "directory"])


def seeds_table(comparison: Comparison) -> Table:
    """A row per group of seeds: mean and confidence interval of each metric."""
    groups = comparison.groups
    metrics = [name for name in comparison.metrics if any(group.values(name) for group in groups)]
    rows = [
        [group.label, str(len(group.runs)), *(format_mean(group.values(name)) for name in metrics)]
        for group in groups
    ]
    return Table(["settings", "seeds", *metrics], rows)


def settings_table(comparison: Comparison) -> Table:
    """A row per setting that differs, a column per run."""
    rows = [
        [key, *(format_value(run.settings.get(key)) for run in comparison.runs)]
        for key in comparison.settings
    ]
    return Table(["", *comparison.labels], rows)


def responses_table(comparison: Comparison) -> Table | None:
    """Responses of the runs to the same held-out prompts; None where no prompt is in all runs.

    The first column after the prompt is the first run's policy before training.
    """
    samples: dict[str, dict[str, dict[str, Any]]] = {}  # by run and prompt
    for label, run in zip(comparison.labels, comparison.runs):
        rows = read_lines(run.path / "samples.jsonl")
        by_prompt = {row["prompt"]: row for row in rows if "after" in row}
        if by_prompt:
            samples[label] = by_prompt
    if not samples:
        return None
    first_label, first = next(iter(samples.items()))
    prompts = [p for p in first if all(p in rows for rows in samples.values())][:MAX_PROMPTS]
    if not prompts:
        return None
    header = ["prompt", f"before ({first_label})", *samples]
    lines = [
        [
            prompt,
            response_with_scores(first[prompt], "before"),
            *(response_with_scores(rows[prompt], "after") for rows in samples.values()),
        ]
        for prompt in prompts
    ]
    return Table(header, lines, header)


def response_with_scores(row: dict[str, Any], when: str) -> str:
    """A response of samples.jsonl and its scores. Args: when: before or after."""
    scores = [
        f"{key} {row[f'{key}_{when}']:.2f}" for key in ("score", "gold") if f"{key}_{when}" in row
    ]
    return f"{row[when]}  [{', '.join(scores)}]"


def lineage_table(runs: Sequence[Run]) -> Table | None:
    """The parent runs of each run, with their primary metric; None without runs."""
    parents = parent_runs(runs)
    lines = []
    for run in runs:
        names = []
        for role, id in sorted(run.parents.items(), key=lambda item: item[0] != "sft"):
            parent = parents.get(id)
            if parent is None:
                names.append(f"{role} {id}")
                continue
            metric = primary_metric([parent]).name
            value = f" ({metric} {parent.metrics[metric]:.3f})" if metric in parent.metrics else ""
            names.append(parent.name + value)
        lines.append([run.name, " + ".join(names)])
    return Table(["run", "parent runs"], lines, ["parent runs"]) if lines else None
