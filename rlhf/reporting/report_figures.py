"""Plotly figures of the report page: curves of several runs, and reward against KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.reporting.comparison import Comparison, SeedGroup
from rlhf.reporting.curves import root_kl, smooth
from rlhf.runs.history import Run
from rlhf.runs.stage_views import view_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SMOOTHING = [1, 3, 9, 27]  # steps of the running mean
COLORS = [
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#17becf",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
]
DASHES = ["solid", "dash", "dot"]


@dataclass
class DrawnRun:
    """A run with the look of its lines: a colour for each setting, dashes for the seeds."""

    name: str
    run: Run
    color: str
    dash: str


class Subplot(NamedTuple):
    """One metric of all runs over their steps."""

    metric: str
    title: str
    unit: str


def drawn_runs(comparison: Comparison) -> list[DrawnRun]:
    """The runs that have curves, each with its look."""
    groups = comparison.groups if comparison.has_seeds else []
    return [
        DrawnRun(name, run, *line_style(run, groups, index))
        for index, (name, run) in enumerate(zip(comparison.labels, comparison.runs))
        if run.rows and view_of(run.stage).panels
    ]


def line_style(run: Run, groups: Sequence[SeedGroup], index: int) -> tuple[str, str]:
    """Colour and dashes of a run: by its group over seeds, or by its index where it has none."""
    for i, group in enumerate(sorted(groups, key=lambda group: group.label)):
        if run in group.runs:
            return COLORS[i % len(COLORS)], DASHES[group.runs.index(run) % 3]
    return COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % 3]


# ---- curves


def curves_figure(drawn: Sequence[DrawnRun], stages: Sequence[str]) -> Figure:
    """All metrics of the stages' panels over the steps of the runs; a slider sets the smoothing."""
    from plotly.subplots import make_subplots

    subplots = subplots_of(drawn, stages)
    columns = min(3, len(subplots))
    lines = math.ceil(len(subplots) / columns)
    figure = make_subplots(
        rows=lines,
        cols=columns,
        subplot_titles=[subplot.title for subplot in subplots],
        vertical_spacing=0.3 / lines,
    )
    values: list[list[float]] = []  # of each trace, for the slider
    in_legend: set[str] = set()  # a run has one entry, that of the first subplot that it is in
    for i, subplot in enumerate(subplots):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        for one in drawn:
            trace = run_trace(one, subplot.metric, one.name not in in_legend)
            values.append(trace["y"])
            in_legend |= {one.name} if trace["y"] else set()
            figure.add_scatter(**trace, **place)
        figure.update_yaxes(title_text=subplot.unit, **place)
        figure.update_xaxes(title_text="step", **place)
    figure.update_layout(
        template="plotly_white",
        height=340 * lines + 160,
        sliders=[smoothing_slider(values)],
        legend={"groupclick": "togglegroup"},
    )
    return figure


def subplots_of(drawn: Sequence[DrawnRun], stages: Sequence[str]) -> list[Subplot]:
    """A subplot for each metric that the stages show and that at least one run has."""
    subplots = [
        Subplot(metric, panel.title if len(panel.metrics) == 1 else metric, panel.unit)
        for stage in stages
        for panel in view_of(stage).panels
        for metric in panel.metrics
    ]
    return [
        subplot
        for subplot in dict.fromkeys(subplots)
        if any(subplot.metric in row for one in drawn for row in one.run.rows)
    ]


def run_trace(one: DrawnRun, metric: str, show_legend: bool) -> dict[str, Any]:
    """The arguments of plotly's add_scatter for one metric of one run; finite values only."""
    points = [
        (row["step"], row[metric])
        for row in one.run.rows
        if metric in row and math.isfinite(row[metric])
    ]
    return {
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "name": one.name,
        "legendgroup": one.name,
        "showlegend": show_legend and bool(points),
        "mode": "lines",
        "line": {"color": one.color, "width": 2, "dash": one.dash},
    }


def smoothing_slider(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """plotly's description of a slider that replaces the values of all traces by running means."""
    steps = [
        {
            "label": str(window),
            "method": "restyle",
            "args": [{"y": [smooth(trace, window) for trace in values]}],
        }
        for window in SMOOTHING
    ]
    prefix = {"prefix": "running mean over "}
    return {"active": 0, "steps": steps, "currentvalue": prefix, "pad": {"t": 50}}


# ---- reward against KL


def frontier_figure(drawn: Sequence[DrawnRun]) -> Figure:
    """The reward of each run against the root of its KL to the SFT policy.

    The gold reward where all runs have it, else the score. Dots are rollouts, circles are
    evaluations on held-out prompts. Source: Gao 2022, arXiv:2210.10760.
    """
    from plotly import graph_objects

    has_gold = all("eval/gold" in one.run.metrics for one in drawn if one.run.metrics)
    rollout, held_out = (
        ("reward/gold/mean", "eval/gold") if has_gold else ("objective/scores", "eval/score")
    )
    figure = graph_objects.Figure()
    for one in drawn:
        rows = [row for row in one.run.rows if rollout in row]
        figure.add_scatter(
            x=[root_kl(row["objective/kl"]) for row in rows],
            y=[row[rollout] for row in rows],
            mode="markers",
            marker={"color": one.color, "size": 4, "opacity": 0.5},
            name=one.name,
            legendgroup=one.name,
        )
        points = held_out_points(one.run, held_out)
        figure.add_scatter(
            x=[kl for kl, _ in points],
            y=[reward for _, reward in points],
            mode="lines+markers",
            marker={
                "color": one.color,
                "size": 12,
                "symbol": "circle-open",
                "line": {"width": 2},
            },
            line={"width": 1, "color": one.color},
            name=f"{one.name}, held out" if rows else one.name,
            legendgroup=one.name,
            showlegend=not rows,
        )
    figure.update_layout(
        template="plotly_white",
        height=520,
        xaxis_title="root of the KL to the SFT policy, nats per response",
        yaxis_title="gold reward, points" if has_gold else "score, standard deviations",
        legend={"groupclick": "togglegroup"},
    )
    return figure


def held_out_points(run: Run, metric: str) -> list[tuple[float, float]]:
    """Root of the KL, and the metric, of each evaluation of a run: start, middle, end."""
    points = [
        (root_kl(row["eval/kl"]), row[metric])
        for row in [*run.rows, run.metrics]
        if metric in row and "eval/kl" in row
    ]
    if f"{metric}_before" in run.metrics:
        points.insert(0, (0.0, run.metrics[f"{metric}_before"]))
    return points
