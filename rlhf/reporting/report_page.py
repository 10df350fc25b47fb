"""Runs side by side as one HTML page: which is the best, curves, reward against KL, settings,
responses, how each run was made, parent runs.

plotly.js draws the figures; templates/report.html is the page.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.base.log import valid_text
from rlhf.reporting.comparison import (
    Comparison,
    compare_runs,
    format_mean,
    format_value,
    primary_metric,
)
from rlhf.reporting.conclusions import conclusions
from rlhf.reporting.html import Figures, Table, render
from rlhf.reporting.report_figures import (
    DrawnSetting,
    curves_figure,
    drawn_settings,
    frontier_figure,
    is_thinned,
    subplots_of,
)
from rlhf.runs.finding import parent_runs
from rlhf.runs.history import Run, read_lines
from rlhf.runs.run_files import DATA, ENVIRONMENT, SUMMARY, read_file
from rlhf.runs.stage_views import view_of

MAX_PROMPTS = 8  # whose responses are shown
KINDS = ("policy", "rm", "sft", "eval")  # in the order of the page
LINKED = (  # files of a run that the page links to
    "report.html",
    "curves.png",
    "frontier.png",
    "samples.jsonl",
    "metrics.jsonl",
    "config.yaml",
    "train.log",
    "model",
)
SCORES = ("score", "gold")  # of a response in samples.jsonl
CURVE_HEIGHT, FRONTIER_HEIGHT = "240px", "460px"


@dataclass
class MadeRun:
    """How a run was made: names and texts."""

    label: str
    facts: list[tuple[str, str]]


@dataclass
class Section:
    """What the page shows of runs of one kind on the same data; None and empty are left out."""

    title: str
    anchor: str
    conclusions: list[str]
    runs: Table
    over_seeds: Table | None
    drawn: list[DrawnSetting]
    has_bands: bool
    is_thinned: bool
    curves: list[tuple[str, Markup]]  # title and figure
    frontier: Markup | None
    settings: Table | None
    responses: Table | None
    made: list[MadeRun]


def write_page(runs: Sequence[Run], file: Path, title: str, reload: int = 0) -> Path:
    """Write the page of these runs. Returns: `file`.

    Args: reload: seconds after which a browser loads the page again; 0: never.
    Raises: UserError where it cannot be written; it is found before the page is made.
    """
    if file.is_dir():
        raise UserError(f"{file}: is a directory; give the page a name: {file / 'report.html'}")
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no directory {file.parent}; make it first")
    try:
        with atomic_path(file) as temporary:
            temporary.touch()
            text = page(runs, title, file.parent, reload)
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None
    return file


def page(runs: Sequence[Run], title: str, folder: Path, reload: int = 0) -> str:
    """The page as HTML.

    Args: runs: of any stages.  folder: of the page; links start there.  reload: as `write_page`.
    """
    figures = Figures()
    comparisons = [comparison for kind in KINDS for comparison in compare_runs(runs, kind)]
    return render(
        "report.html",
        title=title,
        reload=reload,
        sections=[
            section(comparison, f"section-{number}", figures, folder)
            for number, comparison in enumerate(comparisons, 1)
        ],
        jobs_without_run=[run for run in runs if not run.stage],
        damage=[line for run in runs for line in run.damage],
        lineage=lineage_table([run for run in runs if run.kind == "policy"]),
    )


def section(comparison: Comparison, anchor: str, figures: Figures, folder: Path) -> Section:
    """The section of runs of one kind on the same data."""
    policies = comparison.runs[0].kind == "policy"  # they have a KL and write responses
    drawn = drawn_settings(comparison)
    curves = [
        (subplot.title, figures.add(curves_figure(drawn, subplot), CURVE_HEIGHT))
        for subplot in subplots_of(drawn, comparison.stages)
    ]
    frontier = frontier_figure(drawn) if policies else None
    return Section(
        title=comparison.title,
        anchor=anchor,
        conclusions=conclusions(comparison),
        runs=runs_table(comparison, folder),
        over_seeds=seeds_table(comparison) if comparison.has_seeds else None,
        drawn=drawn,
        has_bands=any(len(one.runs) > 1 for one in drawn),
        is_thinned=is_thinned(drawn),
        curves=curves,
        frontier=figures.add(frontier, FRONTIER_HEIGHT) if frontier else None,
        settings=settings_table(comparison) if comparison.settings else None,
        responses=responses_table(comparison) if policies else None,
        made=[
            MadeRun(label, facts(run, partial(link, folder)))
            for label, run in zip(comparison.labels, comparison.runs)
        ],
    )


# ---- how a run was made


def facts(run: Run, link_to: Callable[[Path, str], str]) -> list[tuple[str, str]]:
    """Names and texts: dates, command, commit, models, data, files. What is unknown is left out.

    Args: link_to: a text that links to a path.
    """
    damage: list[str] = []
    made = readable(run, ENVIRONMENT, damage) or {}
    summary = readable(run, SUMMARY, damage) or {}
    data = summary.get("data") or readable(run, DATA, damage) or []
    commit = made.get("git", "") + (" with uncommitted changes" if made.get("git_dirty") else "")
    seconds = summary.get("seconds")
    given = [
        ("directory", link_to(run.path, run.name)),
        ("sweep", ", ".join(run.sweeps)),
        ("status", run.status_text),
        ("started", made.get("started", "")),
        ("finished", finished_at(run, summary)),
        ("training time", f"{seconds / 60:,.1f} minutes" if seconds else ""),
        ("command", made.get("command", "")),
        ("in the folder", made.get("folder", "")),
        ("commit", commit if made.get("git") else ""),
        *model_facts(run),
        ("data", "; ".join(data_line(report, run) for report in data)),
        ("files", file_links(run, link_to)),
        ("damage", "; ".join([*run.damage, *damage])),
    ]
    return [(name, text) for name, text in given if text]


def readable(run: Run, name: str, damage: list[str]) -> Any:
    """What a JSON file of a run has; None where it is damaged, with a line in `damage`."""
    try:
        return read_file(run.path, name)
    except UserError as error:
        damage.append(str(error))
        return None


def finished_at(run: Run, summary: dict[str, Any]) -> str:
    """When a run ended, local time; of older runs by the date of the file."""
    if not summary or "finished" in summary:
        return summary.get("finished", "")
    written = time.localtime((run.path / SUMMARY).stat().st_mtime)
    return time.strftime("%Y-%m-%d %H:%M", written)


def model_facts(run: Run) -> list[tuple[str, str]]:
    """The models of a run, with their paths; trained ones that were given by hand replace them."""
    given = {
        key: str(value)
        for key, value in run.settings.items()
        if value is not None
        and (key in ("rl.actor", "rl.reward", "dpo.actor") or is_reward_source(key))
    }
    models = [
        (node, f"{run.settings[f'{node}.name']} ({run.settings[f'{node}.path']})")
        for node in ("actor", "reward")
        if f"{node}.path" in run.settings
    ]
    return models + sorted(given.items())


def is_reward_source(key: str) -> bool:
    """Whether a setting names a reward model or function."""
    return ".rewards." in key and key.rpartition(".")[2] in ("path", "function")


def data_line(report: dict[str, Any], run: Run) -> str:
    """One source and split, its rows, and those of each stage. Args: report: of data.json."""
    name = report["source"]
    path = run.settings.get(f"data.sources.{name}.path")
    where = f" ({path})" if path and path != name else ""
    stages = [f"{part} {report[part]:,}" for part in ("sft", "rm", "ppo", "eval") if part in report]
    return f"{name}/{report['split']}{where}: {report['rows']:,} rows ({', '.join(stages)})"


def link(folder: Path, path: Path, text: str) -> str:
    """A link to a file or directory, relative to the page's folder; only the text where the path is
    not UTF-8."""
    target = os.path.relpath(path.resolve(), folder.resolve())
    if target != valid_text(target):
        return text
    return Markup('<a href="{}">{}</a>').format(quote(target), text)


def file_links(run: Run, link_to: Callable[[Path, str], str]) -> Markup:
    """Links to the files of a run that there are. Args: link_to: as of `facts`."""
    files = [name for name in LINKED if (run.path / name).exists()]
    return Markup(", ").join(link_to(run.path / name, name) for name in files)


# ---- tables


def runs_table(comparison: Comparison, folder: Path) -> Table:
    """A row per run: label, status, steps, final metrics, sweeps, directory."""
    unit = ", ".join(dict.fromkeys(f"{view_of(s).step_name or 'step'}s" for s in comparison.stages))
    sweeps = ["sweep"] if comparison.has_sweeps else []
    rows = [
        [
            label,
            run.status_text,
            str(len(run.rows)),
            *(f"{run.metrics[m]:.3f}" if m in run.metrics else "" for m in comparison.metrics),
            *([", ".join(run.sweeps)] if sweeps else []),
            link(folder, run.path, run.short_name),
        ]
        for label, run in zip(comparison.labels, comparison.runs)
    ]
    names = [name.removeprefix("eval/") for name in comparison.metrics]
    return Table(["run", "status", unit, *names, *sweeps, "directory"], rows, ["run", "status"])


def seeds_table(comparison: Comparison) -> Table:
    """A row per group of seeds: mean and confidence interval of each metric."""
    groups = comparison.groups
    metrics = [name for name in comparison.metrics if any(group.values(name) for group in groups)]
    rows = [
        [group.label, str(group.finished), *(format_mean(group.values(name)) for name in metrics)]
        for group in groups
    ]
    names = [name.removeprefix("eval/") for name in metrics]
    return Table(["settings", "seeds", *names], rows, ["settings"])


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
        rows = sample_rows(run)
        by_prompt = {row["prompt"]: row for row in rows if is_sample(row)}
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


def sample_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of a run's samples.jsonl; none where it cannot be read."""
    try:
        return read_lines(run.path / "samples.jsonl")
    except OSError:
        return []


def is_sample(row: dict[str, Any]) -> bool:
    """Whether a row of samples.jsonl has a response before and after training, and sound scores."""
    scores = (row.get(f"{key}_{when}", 0.0) for key in SCORES for when in ("before", "after"))
    return all(isinstance(row.get(key), str) for key in ("prompt", "before", "after")) and all(
        isinstance(score, (int, float)) for score in scores
    )


def response_with_scores(row: dict[str, Any], when: str) -> str:
    """A response of samples.jsonl and its scores. Args: when: before or after."""
    scores = [f"{key} {row[f'{key}_{when}']:.2f}" for key in SCORES if f"{key}_{when}" in row]
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
