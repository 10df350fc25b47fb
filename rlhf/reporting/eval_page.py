"""The results of stage=eval as one HTML page.

Plotly draws the figures (eval_figures.py); templates/eval.html is the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from rlhf.base.files import atomic_path
from rlhf.reporting import eval_figures
from rlhf.reporting.eval_results import (
    BestOfPoint,
    EvalResults,
    ScorerResults,
    pass_rate_by_column_cells,
    pass_rate_cells,
    policy_cells,
    scorer_cells,
    win_rate_cells,
)
from rlhf.reporting.eval_summary import summarize
from rlhf.reporting.html import Figures, Table, render

FIGURE_HEIGHT = f"{eval_figures.HEIGHT}px"
MAX_PROMPTS = 12  # held-out prompts whose responses are shown


class ScorerSection(NamedTuple):
    """What the page shows of a reward model."""

    name: str
    tables: list[Table]
    figures: list[tuple[str, Markup]]  # with their captions


def write_page(results: EvalResults, file: Path, title: str) -> None:
    """Write the page."""
    with atomic_path(file) as temporary:
        temporary.write_text(page(results, title), encoding="utf-8")


def page(results: EvalResults, title: str) -> str:
    """The page as HTML. Figures are made in the order of the page."""
    figures = Figures()
    return render(
        "eval.html",
        title=title,
        results=results,
        summary=summarize(results),
        policies=policies_table(results),
        pass_rate_figure=figures.add(eval_figures.pass_rates(results.pass_rates), FIGURE_HEIGHT)
        if results.samples > 1 and results.pass_rates
        else "",
        pass_rates=Table(*pass_rate_cells(results.pass_rates)),
        pass_rates_by_column=Table(*pass_rate_by_column_cells(results.pass_rates)),
        win_rate_figure=figures.add(eval_figures.win_rates(results.win_rates), FIGURE_HEIGHT)
        if results.win_rates
        else "",
        win_rates=Table(*win_rate_cells(results.win_rates)),
        reward_models=Table(*scorer_cells(results.reward_models)),
        scorers=[
            scorer_section(name, scorer, figures) for name, scorer in results.reward_models.items()
        ],
        best_of_figure=figures.add(eval_figures.best_of(results.best_of), FIGURE_HEIGHT)
        if results.best_of
        else "",
        best_of=best_of_table(results.best_of),
        fixed=responses_table(results.fixed),
        held_out=responses_table(results.answers[:MAX_PROMPTS]),
    )


def scorer_section(name: str, scorer: ScorerResults, figures: Figures) -> ScorerSection:
    """Accuracy and calibration of a reward model."""
    drawn = {
        "Calibration: a larger mark is more pairs": eval_figures.reliability(scorer),
        "Margins: left of the line the model prefers the rejected response": eval_figures.margins(
            scorer.margins
        ),
    }
    added = [(caption, figures.add(one, FIGURE_HEIGHT)) for caption, one in drawn.items()]
    return ScorerSection(name, scorer_tables(scorer), added)


def policies_table(results: EvalResults) -> Table:
    """A row per policy: its metrics and where its model is."""
    header, rows = policy_cells(results.policies)
    lines = [[*row, results.where[name]] for name, row in zip(results.policies, rows)]
    return Table([*header, "model"], lines, ["model"])


def scorer_tables(scorer: ScorerResults) -> list[Table]:
    """Accuracy of a reward model by source and by length, and its calibration."""
    tables = []
    for title, groups in (
        ("source", scorer.by_source),
        ("length of the responses", scorer.by_length),
    ):
        rows = [
            [name, f"{pairs:,}", f"{accuracy:.1%}"] for name, (pairs, accuracy) in groups.items()
        ]
        tables.append(Table([title, "pairs", "accuracy"], rows))
    rows = [
        [
            f"{bin.low:.0%} to {bin.high:.0%}",
            f"{bin.pairs:,}",
            f"{bin.probability:.1%}",
            f"{bin.accuracy:.1%}",
        ]
        for bin in scorer.reliability
    ]
    return [*tables, Table(["confidence", "pairs", "mean confidence", "accuracy"], rows)]


def best_of_table(points: Sequence[BestOfPoint]) -> Table:
    """A row per n; the gold reward where it is known."""
    has_gold = any(point.gold is not None for point in points)
    rows = []
    for point in points:
        gold = [f"{point.gold:.3f}"] if point.gold is not None else []
        rows.append([str(point.n), f"{point.score:.3f}", *gold, f"{point.kl:.2f}"])
    gold_column = ["gold reward"] if has_gold else []
    return Table(["n", "score", *gold_column, "KL, nats (upper bound)"], rows)


def responses_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row per prompt, a column per policy. Args: rows: of eval_results.side_by_side."""
    policies = list(rows[0]["answers"]) if rows else []
    header = ["prompt", *policies]
    lines = [
        [row["prompt"], *(response_with_scores(row["answers"][name]) for name in policies)]
        for row in rows
    ]
    return Table(header, lines, header)


def response_with_scores(row: dict[str, Any]) -> str:
    """A response and, in brackets, its scores."""
    scores = [f"{key} {row[key]:.2f}" for key in ("score", "gold") if row.get(key) is not None]
    return row["completion"] + (f"  [{', '.join(scores)}]" if scores else "")
