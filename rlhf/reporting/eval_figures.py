"""Plotly figures of the page of stage=eval."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.reporting.eval_results import BestOfPoint, PassRate, ScorerResults, WinRate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# of Okabe and Ito, which differ for colour-blind readers too
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "star"]
REFERENCE = {"dash": "dash", "color": "#555", "width": 1.5}  # a line to compare with
HEIGHT = 380  # pixels
LAYOUT = {  # narrow margins and a legend above the plot: readable on a phone
    "template": "plotly_white",
    "height": HEIGHT,
    "margin": {"l": 55, "r": 15, "t": 40, "b": 50},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
}


def win_rates(rates: Sequence[WinRate]) -> Figure:
    """The win rate of each policy with its interval, by judge."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    judges = dict.fromkeys(rate.judge for rate in rates)
    for judge, color, symbol in zip(judges, itertools.cycle(COLORS), itertools.cycle(SYMBOLS)):
        by_judge = [rate for rate in rates if rate.judge == judge]
        figure.add_scatter(
            x=[rate.policy for rate in by_judge],
            y=[rate.rate for rate in by_judge],
            error_y={
                "type": "data",
                "array": [rate.high - rate.rate for rate in by_judge],
                "arrayminus": [rate.rate - rate.low for rate in by_judge],
                "thickness": 2.5,
                "width": 8,
            },
            mode="markers",
            marker={"size": 14, "symbol": symbol, "color": color},
            name=f"by {judge}",
        )
    figure.add_hline(y=0.5, line=REFERENCE)
    figure.update_layout(**LAYOUT, showlegend=True, scattermode="group", scattergap=0.75)
    figure.update_yaxes(title_text="win rate", tickformat=".0%", range=[0, 1.02])
    return figure


def pass_rates(rates: Sequence[PassRate]) -> Figure:
    """pass@k, and maj@k with a dashed line, over k: a line of each policy and verifier."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    every = [rate for rate in rates if not rate.column]
    names = dict.fromkeys((rate.policy, rate.verifier) for rate in every)
    for name, color, symbol in zip(names, itertools.cycle(COLORS), itertools.cycle(SYMBOLS)):
        for measure, dash in (("pass", "solid"), ("maj", "dash")):
            line = [r for r in every if (r.policy, r.verifier) == name and r.measure == measure]
            if line:
                figure.add_scatter(
                    x=[rate.k for rate in line],
                    y=[rate.rate for rate in line],
                    mode="lines+markers",
                    name=f"{measure}@k: {name[0]} ({name[1]})",
                    line={"color": color, "width": 2.5, "dash": dash},
                    marker={"size": 11, "symbol": symbol},
                )
    sizes = sorted({rate.k for rate in every})
    figure.update_xaxes(title_text="k", type="log", tickvals=sizes, ticktext=[*map(str, sizes)])
    figure.update_yaxes(title_text="share of the prompts", tickformat=".0%", range=[0, 1.02])
    figure.update_layout(**LAYOUT, showlegend=True)
    return figure


def reliability(scorer: ScorerResults) -> Figure:
    """The accuracy of a reward model against its confidence; a larger mark is more pairs."""
    from plotly import graph_objects

    bins = scorer.reliability
    figure = graph_objects.Figure()
    figure.add_scatter(
        x=[0.5, 1],
        y=[0.5, 1],
        mode="lines",
        line=REFERENCE,
        name="perfect calibration",
    )
    figure.add_scatter(
        x=[bin.probability for bin in bins],
        y=[bin.accuracy for bin in bins],
        mode="lines+markers",
        name="this model",
        line={"color": COLORS[0], "width": 2.5},
        marker={"size": [9 + 24 * (bin.pairs / scorer.pairs) ** 0.5 for bin in bins]},
    )
    figure.update_layout(**LAYOUT)
    figure.update_xaxes(title_text="mean confidence", tickformat=".0%")
    figure.update_yaxes(title_text="accuracy", tickformat=".0%")
    return figure


def margins(values: Sequence[float]) -> Figure:
    """A histogram of the margins of a reward model."""
    from plotly import graph_objects

    bars = graph_objects.Histogram(x=values, nbinsx=60, marker={"color": COLORS[0]})
    figure = graph_objects.Figure(bars)
    figure.add_vline(x=0, line={"color": COLORS[1], "width": 3})
    figure.update_layout(**LAYOUT, bargap=0.05)
    figure.update_xaxes(title_text="raw score of chosen minus rejected")
    figure.update_yaxes(title_text="pairs")
    return figure


def best_of(points: Sequence[BestOfPoint]) -> Figure:
    """Score, and gold reward where it is known, of the best of n responses."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    lines = [("score", [point.score for point in points])]
    if all(point.gold is not None for point in points):
        lines.append(("gold reward, points", [point.gold or 0.0 for point in points]))
    for (name, values), color, symbol in zip(lines, COLORS, SYMBOLS):
        figure.add_scatter(
            x=[point.n for point in points],
            y=values,
            mode="lines+markers",
            name=name,
            line={"color": color, "width": 2.5},
            marker={"size": 11, "symbol": symbol},
        )
    figure.update_xaxes(title_text="n", type="log", tickvals=[point.n for point in points])
    figure.update_yaxes(title_text="mean of the chosen responses")
    figure.update_layout(**LAYOUT, showlegend=True)
    return figure
