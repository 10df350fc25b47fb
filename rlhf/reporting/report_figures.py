"""Plotly figures of the report page and of the app: curves of several runs, reward against KL.

They are plain dictionaries, which plotly.js draws: making them takes no time. Each trace has
`meta`: which setting it shows and what it is (mean, band, seed); the script of the page
(templates/report.html) hides, shows and smooths by that. The app asks for smoothed ones.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.base.log import valid_text
from rlhf.reporting.comparison import Comparison
from rlhf.reporting.curves import COLORS, ROOT_KL, held_out_points, root_of_kl, smooth
from rlhf.runs.history import Run
from rlhf.runs.metrics import Points, thin
from rlhf.runs.stage_views import view_of

DASHES = ("solid", "dash", "dot")
SVG_DASHES = {"solid": "none", "dash": "6 3", "dot": "2 3"}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DIGITS = 5  # significant ones in a figure
MOST_POINTS = 800  # of a line: as many as a screen shows
POINTS_OF_FIGURE = 20_000  # of all its lines: of many runs each has fewer points
FEWEST_POINTS = 60

Figure = dict[str, Any]  # data and layout, as plotly.js reads them


@dataclass
class DrawnSetting:
    """Runs that differ in nothing but the seed, with the look of their lines."""

    label: str
    runs: list[Run]
    color: str
    dash: str
    symbol: str

    @property
    def svg_dash(self) -> str:
        """The dashes of the legend's line."""
        return SVG_DASHES[self.dash]


class Subplot(NamedTuple):
    """One metric of all runs over their steps."""

    metric: str
    title: str
    x_axis: str


def drawn_settings(comparison: Comparison) -> list[DrawnSetting]:
    """The settings that have curves, each with its look."""
    groups = sorted(comparison.groups, key=lambda group: group.label)
    label_of_run = {id(run): label for label, run in zip(comparison.labels, comparison.runs)}
    drawn: list[DrawnSetting] = []
    for group in groups:
        runs = [run for run in group.runs if len(run.rows) and view_of(run.stage).panels]
        if runs:
            i = len(drawn)
            alone = len(group.runs) == 1 and group.label == "all"
            drawn.append(
                DrawnSetting(
                    label_of_run[id(runs[0])] if alone else group.label,
                    runs,
                    COLORS[i % len(COLORS)],
                    DASHES[i // len(COLORS) % len(DASHES)],
                    SYMBOLS[i % len(SYMBOLS)],
                )
            )
    return drawn


# ---- curves


def subplots_of(drawn: Sequence[DrawnSetting], stages: Sequence[str]) -> list[Subplot]:
    """A subplot for each metric that the stages show and that at least one run has."""
    found: dict[tuple[str, str], list[str]] = {}  # stages by metric and title
    for stage in stages:
        runs = [run for one in drawn for run in one.runs if run.stage == stage]
        logged = {name for run in runs for name in run.rows.columns}
        for panel in view_of(stage).panels:
            for metric in panel.drawn(logged):
                title = panel.title if panel.metrics == (metric,) else f"{panel.title}: {metric}"
                title += f", {panel.unit}" if panel.unit else ""
                found.setdefault((metric, title), []).append(stage)
    return [
        Subplot(metric, title, " / ".join(dict.fromkeys(view_of(stage).x_axis for stage in some)))
        for (metric, title), some in found.items()
    ]


def points_of_line(drawn: Sequence[DrawnSetting]) -> int:
    """The number of points that each line of a figure has at most."""
    lines = sum(len(one.runs) for one in drawn)
    return min(MOST_POINTS, max(FEWEST_POINTS, POINTS_OF_FIGURE // max(1, lines)))


def is_thinned(drawn: Sequence[DrawnSetting]) -> bool:
    """Whether some line has fewer points than its run has steps."""
    return any(len(run.rows) > points_of_line(drawn) for one in drawn for run in one.runs)


def curves_figure(
    drawn: Sequence[DrawnSetting], subplot: Subplot, window: int = 1, log_axis: bool = False
) -> Figure:
    """One metric over the steps: for each setting its run, or the mean and range of its seeds.

    Args: window: steps of a running mean; 1: the values themselves.  log_axis: of the metric.
    """
    most = points_of_line(drawn)
    traces = [
        trace
        for i, setting in enumerate(drawn)
        for trace in setting_traces(setting, i, subplot.metric, most, window)
    ]
    figure: Figure = {"data": traces, "layout": layout(subplot.x_axis)}
    if log_axis:
        figure["layout"]["yaxis"]["type"] = "log"
    return figure


def setting_traces(
    setting: DrawnSetting, number: int, metric: str, most: int, window: int = 1
) -> list[Figure]:
    """The traces of a setting: a line of one run; of several the band, the mean, and thin lines.

    Mean and band (minimum to maximum) are at the steps that all seeds have reached.
    Args: most: points of a line.  window: steps of a running mean.
    """
    curves = [curve for run in setting.runs if len((curve := curve_of(run, metric)).x)]
    line = {"color": setting.color, "width": 2.5, "dash": setting.dash}

    def trace(curve: Points, kind: str, **look: Any) -> Figure:
        thinned = thin(running_mean(curve, window), most)
        has_line = kind == "band" or len(thinned.x) > 1  # a single point is drawn by a mark only
        return {
            "type": "scatter",
            "mode": "lines" if has_line else "lines+markers",
            "x": numbers(thinned.x),
            "y": numbers(thinned.y),
            "name": plain(setting.label),
            "showlegend": False,
            "meta": {"setting": number, "kind": kind},
            "line": line,
        } | look

    if len(curves) < 2:
        return [trace(curve, "mean") for curve in curves]
    steps = functools.reduce(np.intersect1d, [curve.x for curve in curves])
    # by numpy.unique in `curve_of`, the steps of each curve are sorted
    values = np.stack([curve.y[np.searchsorted(curve.x, steps)] for curve in curves])
    edge = {"line": {"width": 0}, "hoverinfo": "skip"}
    fill = {"fill": "tonexty", "fillcolor": transparent(setting.color)}
    narrow = line | {"width": 1}
    hidden = len(steps) == 0  # then the single seeds are all there is
    return [
        trace(Points(steps, values.min(axis=0)), "band", **edge),
        trace(Points(steps, values.max(axis=0)), "band", **edge, **fill),
        trace(Points(steps, values.mean(axis=0)), "mean"),
        *(trace(curve, "seed", line=narrow, visible=hidden) for curve in curves),
    ]


def curve_of(run: Run, metric: str) -> Points:
    """The finite values of a metric over the steps; of a step that is there twice, the last one."""
    x, y = run.rows.curve(metric)
    finite = np.isfinite(x) & np.isfinite(y)
    steps, last = np.unique(x[finite][::-1], return_index=True)
    return Points(steps, y[finite][::-1][last])


def running_mean(curve: Points, window: int) -> Points:
    """A curve smoothed by a centred running mean over `window` steps."""
    return Points(curve.x, smooth(curve.y, window)) if window > 1 else curve


def plain(text: str) -> str:
    """A text for plotly, which takes <b>, <a href> and the like for formatting."""
    return html.escape(valid_text(text), quote=False)


def numbers(values: NDArray[np.float64]) -> list[float]:
    """Numbers with few digits, whole ones without a point: the page is smaller."""
    return [int(value) if value.is_integer() else short(value) for value in values.tolist()]


def short(value: float) -> float:
    """A number with few digits."""
    return float(f"{value:.{DIGITS}g}")


def transparent(color: str) -> str:
    """A colour #rrggbb as the colour of a band."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def layout(x_title: str, y_title: str = "") -> Figure:
    """A white figure with grid lines and small margins; the page gives it its size."""
    axis = {"gridcolor": "#e4e4e4", "zerolinecolor": "#cccccc", "automargin": True}
    return {
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "xaxis": axis | {"title": {"text": x_title, "standoff": 4}},
        "yaxis": axis | {"title": {"text": y_title}},
        "hovermode": "closest",
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
        "font": {"size": 12},
    }


# ---- reward against KL


def frontier_figure(drawn: Sequence[DrawnSetting]) -> Figure | None:
    """The reward of each run against the root of its KL to the SFT policy; None without points.

    The gold reward where all runs have it, else the score. Small marks are rollouts, large open
    ones are evaluations on held-out prompts. Source: Gao 2022, arXiv:2210.10760.
    """
    final = [run.metrics for one in drawn for run in one.runs if run.metrics]
    has_gold = bool(final) and all("eval/gold" in metrics for metrics in final)
    rollout, held_out = (
        ("reward/gold/mean", "eval/gold") if has_gold else ("objective/scores", "eval/score")
    )
    most = points_of_line(drawn)
    traces = []
    for i, one in enumerate(drawn):
        for run in one.runs:
            small = {"color": one.color, "symbol": one.symbol, "size": 7, "opacity": 0.55}
            points = thin(root_of_kl(run.rows, "objective/kl", rollout), most)
            traces.append(frontier_trace(one.label, i, points, mode="markers", marker=small))
            large = {
                "color": one.color,
                "symbol": f"{one.symbol}-open",
                "size": 14,
                "line": {"width": 3},
            }
            line = {"width": 1.5, "color": one.color, "dash": one.dash}
            points = held_out_points(run.rows, run.metrics, held_out)
            look = {"mode": "lines+markers", "marker": large, "line": line}
            traces.append(frontier_trace(f"{one.label}, held out", i, points, **look))
    if not any(trace["x"] for trace in traces):
        return None
    y_title = "gold reward, points" if has_gold else "score, weighted sum of rl.rewards"
    return {"data": traces, "layout": layout(ROOT_KL, y_title)}


def frontier_trace(name: str, number: int, points: Points, **look: Any) -> Figure:
    """Points of a setting. Args: points: root of the KL, and reward."""
    finite = np.isfinite(points.x) & np.isfinite(points.y)
    return {
        "type": "scatter",
        "x": numbers(points.x[finite]),
        "y": numbers(points.y[finite]),
        "name": plain(name),
        "showlegend": False,
        "meta": {"setting": number, "kind": "points"},
    } | look
