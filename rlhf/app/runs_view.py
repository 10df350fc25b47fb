"""What the Runs tab shows, as tables, texts and figures. No gradio here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from rlhf.app.pages import link_to
from rlhf.base.errors import UserError
from rlhf.base.files import special_kind
from rlhf.base.log import valid_text
from rlhf.reporting.comparison import (
    SEEDS,
    compare_runs,
    differing_settings,
    format_value,
    informative_settings,
    number_duplicates,
    run_label,
)
from rlhf.reporting.html import Table, render
from rlhf.reporting.report_figures import (
    DrawnSetting,
    Figure,
    curves_figure,
    drawn_settings,
    subplots_of,
)
from rlhf.reporting.report_page import facts, readable
from rlhf.runs.directory import read_warnings
from rlhf.runs.finding import runs_at, without_copies
from rlhf.runs.history import Run, read_lines
from rlhf.runs.newest import Newest
from rlhf.runs.progress import progress_of
from rlhf.runs.run_files import ENVIRONMENT
from rlhf.runs.stage_views import KINDS, view_of

HEADER = ["", "run", "status", "progress", "time left", "settings", "metrics", "sweep"]
CHOSEN = "✓"  # in the first column
MAX_FIGURES = 20  # of the chosen runs
MAX_DETAILS = 6  # chosen runs whose files and samples are shown
MAX_SAMPLES = 8
MAX_METRICS = 4  # in the table
LOG_START = 1 << 18  # bytes of train.log in which the guards report
GUARD = re.compile(r"^\d\d:\d\d:\d\d (guards?[ :].*)$", re.MULTILINE)

SAMPLES: Newest[list[dict[str, Any]]] = Newest()
GUARDS: Newest[list[str]] = Newest()


@dataclass
class Listed:
    """The runs of the folders, the newest first, with names that are all different."""

    runs: list[Run]
    names: list[str]
    problems: list[str] = field(default_factory=list)  # folders that cannot be read

    def named(self, names: Sequence[str]) -> list[Run]:
        """The runs with these names that are still there."""
        wanted = set(names)
        return [run for name, run in zip(self.names, self.runs) if name in wanted]

    def running(self) -> list[str]:
        """The names of the runs that are training now."""
        return [n for n, run in zip(self.names, self.runs) if run.status == "running"]


def list_runs(roots: Sequence[Path]) -> Listed:
    """All runs of these folders, which may have none yet."""
    runs: dict[Path, Run] = {}
    problems = []
    for root in roots:
        try:
            runs |= {run.path: run for run in runs_at(root)}
        except OSError as error:
            problems.append(f"{error.filename or root}: cannot be read ({error.strerror})")
    newest = without_copies(list(runs.values()))[::-1]  # runs_at begins with the oldest
    return Listed(newest, number_duplicates([run.short_name for run in newest]), problems)


# ---- the table


def matches(run: Run, words: str) -> bool:
    """Whether all words are in what the table shows of a run, or in a setting (key=value)."""
    if not words:
        return True
    settings = (f"{key}={format_value(value)}" for key, value in run.settings.items())
    text = "\n".join([run.name, run.status, *run.sweeps, *settings]).lower()
    return all(word in text for word in words.lower().split())


def table(
    listed: Listed, words: str, group_by: Sequence[str], chosen: Sequence[str]
) -> list[list[str]]:
    """Rows of HEADER for the runs that match, those of a group together."""
    shown = [(n, run) for n, run in zip(listed.names, listed.runs) if matches(run, words)]
    keys = label_keys([run for _, run in shown], group_by)
    marks = {name: CHOSEN for name in chosen}
    rows = [
        (run, [marks.get(name, ""), *row_of(name, run, keys.get(run.kind, []))])
        for name, run in shown
    ]
    if group_by:
        rows.sort(key=lambda pair: [format_value(pair[0].settings.get(key)) for key in group_by])
    return [[valid_text(cell) for cell in row] for _, row in rows]


def label_keys(runs: Sequence[Run], group_by: Sequence[str]) -> dict[str, list[str]]:
    """The settings that the table names, by kind of the runs."""
    keys = {}
    for kind in KINDS:
        alike = [run for run in runs if run.kind == kind]
        informative = informative_settings(alike, differing_settings(alike)) if alike else []
        keys[kind] = list(dict.fromkeys([*group_by, *informative]))
    return keys


def row_of(name: str, run: Run, keys: Sequence[str]) -> list[str]:
    """A row of HEADER, without its first cell."""
    progress = progress_of(run)
    has_steps = bool(run.stage and view_of(run.stage).step_name)
    return [
        name,
        "unreadable" if run.is_unreadable else run.status_text,  # the details say why
        str(progress) if has_steps else "",
        progress.time_left,
        run_label(run, keys) if any(key in run.settings for key in keys) else "",
        key_metrics(run),
        ", ".join(run.sweeps),
    ]


def key_metrics(run: Run) -> str:
    """The final metrics of a run; those of the last step while it runs."""
    if not run.stage:
        return ""
    view = view_of(run.stage)
    if run.metrics:
        values = {name.removeprefix("eval/"): run.metrics.get(name) for name in view.metrics}
    elif run.status == "running":
        names = [n for panel in view.panels for n in panel.drawn(run.rows.columns)]
        values = {name: float(run.rows.columns[name].values[-1]) for name in names}
    else:
        values = {}
    known = [f"{name} {value:.3g}" for name, value in values.items() if value is not None]
    return ", ".join(known[:MAX_METRICS])


def settings_that_differ(runs: Sequence[Run]) -> list[str]:
    """Settings that runs can be grouped by."""
    return [valid_text(key) for key in differing_settings(runs) if key not in SEEDS]


# ---- curves


class Drawing(NamedTuple):
    """The curves of the chosen runs."""

    figures: list[tuple[str, Figure]]  # with titles
    legend: str  # HTML
    hidden: int  # figures that are not shown


def draw(
    runs: Sequence[Run], group_by: Sequence[str], window: int, log_axis: bool, by_seed: bool
) -> Drawing:
    """The curves of these runs: a figure for each metric, a line for each group.

    Args: group_by: settings that make a group; none: all but the seeds.  window: of the running
        mean.  by_seed: single seeds instead of mean and band.
    """
    comparisons = [one for kind in KINDS for one in compare_runs(runs, kind, group_by)]
    parts: list[tuple[str, list[DrawnSetting]]] = []
    figures = []
    for comparison in comparisons:
        drawn = drawn_settings(comparison)
        if by_seed:
            drawn = drawn_settings(comparison.by_run())
        if not drawn:
            continue
        parts.append((comparison.title, drawn))
        for subplot in subplots_of(drawn, comparison.stages):
            figure = curves_figure(drawn, subplot, window, log_axis)
            start = f"{comparison.title}: " if len(comparisons) > 1 else ""
            figures.append((start + subplot.title, figure))
    legend = render("app_legend.html", parts=parts)
    return Drawing(figures[:MAX_FIGURES], legend, max(0, len(figures) - MAX_FIGURES))


# ---- details


@dataclass
class Details:
    """What the page says of one run."""

    name: str
    status: str
    warnings: list[str]
    guards: list[str]
    command: str
    command_note: str
    facts: list[tuple[str, str]]
    samples: Table | None
    samples_note: str
    is_open: bool


def details(runs: Sequence[Run]) -> str:
    """Status, warnings, command, files and samples of the first of these runs, as HTML."""
    shown = [details_of(run, len(runs) == 1) for run in runs[:MAX_DETAILS]]
    return render("app_runs.html", runs=shown, hidden=max(0, len(runs) - MAX_DETAILS))


def details_of(run: Run, is_open: bool) -> Details:
    """What the page says of one run; what has been deleted meanwhile is left out."""
    damage: list[str] = []
    made = readable(run, ENVIRONMENT, damage) or {}
    try:
        warnings = read_warnings(run.path)
    except UserError as error:
        warnings = [str(error)]
    samples, note = samples_table(run)
    command, command_note = how_to_run(run, made)
    try:
        known = facts(run, link_to)
    except OSError:  # deleted while it was read
        known = []
    return Details(
        name=run.name,
        status=run.status_text,
        warnings=[*warnings, *run.damage],
        guards=guards_of(run),
        command=command,
        command_note=command_note,
        facts=[(name, text) for name, text in known if name not in ("status", "command", "damage")],
        samples=samples,
        samples_note=note,
        is_open=is_open,
    )


def how_to_run(run: Run, made: dict[str, Any]) -> tuple[str, str]:
    """The command that repeats or resumes a run, and what it does; "" where it is unknown.

    Args: made: its env.json.
    """
    if "command" not in made:
        return "", ""
    folder = made.get("folder", "")
    start = f"cd {shlex.quote(folder)} && " if folder else ""
    if run.status == "finished":
        return f"{start}{made['command']} fresh=true", "Repeat it (this run goes to its attempts/):"
    if run.status == "running":
        return start + made["command"], "It runs with this command, which also resumes it:"
    return start + made["command"], "Resume it:"


def guards_of(run: Run) -> list[str]:
    """What the guards have reported in train.log."""
    file = run.path / "train.log"

    def read() -> list[str]:
        if special_kind(file):
            return []
        try:
            with open(file, "rb") as log_file:
                return GUARD.findall(log_file.read(LOG_START).decode(errors="replace"))
        except OSError:
            return []

    return GUARDS.get(file, [file], read)


def samples_table(run: Run) -> tuple[Table | None, str]:
    """Prompts, responses and scores of the newest evaluation, and what they are of."""
    file = run.path / "samples.jsonl"

    def read() -> list[dict[str, Any]]:
        rows = read_lines(file)
        return [row for row in rows if row.get("step") == rows[-1].get("step")]

    try:
        rows = [] if special_kind(file) else SAMPLES.get(file, [file], read)
    except OSError:
        rows = []
    if not rows:
        return None, ""
    shown = rows[:MAX_SAMPLES]
    names = [name for name in dict.fromkeys(n for row in shown for n in row) if name != "step"]
    cells = [[cell(row.get(name)) for name in names] for row in shown]
    texts = [name for name in names if any(isinstance(row.get(name), str) for row in shown)]
    step = format_value(rows[0].get("step"))
    note = f"Newest evaluation, after step {step}: {len(shown)} of {len(rows)} samples"
    return Table(names, cells, texts), note


def cell(value: Any) -> str:
    """A value of samples.jsonl as text."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def escaped(text: str) -> Markup:
    """A text as HTML."""
    return Markup("<p>{}</p>").format(valid_text(text))
