"""Plotly figures of the page of stage=eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.reporting.eval_results import BestOfPoint, ScorerResults, WinRate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def win_rates(rates: Sequence[WinRate]) -> Figure:
    """The win rate of each policy with its interval, by judge."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for judge in dict.fromkeys(rate.judge for rate in rates):
        by_judge = [rate for rate in rates if rate.judge == judge]
        figure.add_scatter(
            x=[rate.policy for rate in by_judge],
            y=[rate.rate for rate in by_judge],
            error_y={
                "type": "data",
                "array": [rate.high - rate.rate for rate in by_judge],
                "arrayminus": [rate.rate - rate.low for rate in by_judge],
            },
            mode="markers",
            marker={"size": 11},
            name=f"by {judge}",
        )
    figure.add_hline(y=0.5, line={"dash": "dot", "color": "gray"})
    figure.update_layout(template="plotly_white", height=380, scattermode="group", scattergap=0.75)
    figure.update_yaxes(title_text="win rate", tickformat=".0%", range=[0, 1.02])
    return figure


def reliability(scorer: ScorerResults) -> Figure:
    """The accuracy of a reward model against its confidence; a larger dot is more pairs."""
    from plotly import graph_objects

    bins = scorer.reliability
    figure = graph_objects.Figure()
    figure.add_scatter(
        x=[0.5, 1],
        y=[0.5, 1],
        mode="lines",
        line={"dash": "dot", "color": "gray"},
        name="perfect calibration",
    )
    figure.add_scatter(
        x=[bin.probability for bin in bins],
        y=[bin.accuracy for bin in bins],
        mode="lines+markers",
        name="this model",
        marker={"size": [6 + 24 * (bin.pairs / scorer.pairs) ** 0.5 for bin in bins]},
    )
    title = "Calibration: a larger dot is more pairs"
    figure.update_layout(template="plotly_white", height=380, title=title)
    figure.update_xaxes(title_text="mean confidence", tickformat=".0%")
    figure.update_yaxes(title_text="accuracy", tickformat=".0%")
    return figure


def margins(values: Sequence[float]) -> Figure:
    """A histogram of the margins of a reward model."""
    from plotly import graph_objects

    figure = graph_objects.Figure(graph_objects.Histogram(x=values, nbinsx=60))
    figure.add_vline(x=0, line={"color": "#d62728"})
    title = "Margins: left of the line the model prefers the rejected response"
    figure.update_layout(template="plotly_white", height=340, title=title, bargap=0.05)
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
    for name, values in lines:
        figure.add_scatter(
            x=[point.n for point in points], y=values, mode="lines+markers", name=name
        )
    figure.update_xaxes(title_text="n", type="log", tickvals=[point.n for point in points])
    figure.update_layout(template="plotly_white", height=380)
    return figure
