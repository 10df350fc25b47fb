"""Runs side by side as one HTML page: curves, frontier, settings, answers, lineage. Plotly draws; no script here is ours."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.reporting.comparison import (
    REPORTED_METRICS,
    SeedGroup,
    compare_best,
    distinguishing_settings,
    format_mean,
    format_value,
    primary_metric,
    run_label,
    seed_groups,
)
from rlhf.reporting.curves import _ONLINE, PANELS, smooth
from rlhf.reporting.html import Figures, document, html_table
from rlhf.runs.history import Run, parent_runs, read_lines

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
PROMPTS = 8  # whose answers are shown


def page(runs: Sequence[Run], title: str) -> str:
    """The page. Args: runs: of any stages; those of one stage are compared with each other."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    figures = Figures()
    for kind in ("policy", "rm", "sft", "eval"):
        some = [run for run in runs if run.kind == kind]
        if not some:
            continue
        keys, stages = (
            distinguishing_settings(some),
            list(dict.fromkeys(run.stage for run in some)),
        )
        name_of = functools.partial(run_label, keys=keys, algorithm=len(stages) > 1)
        some = sorted(some, key=name_of)
        names = unique([name_of(run) for run in some])
        body += [f"<h2>{', '.join(stages)}</h2>", runs_table(some, names)]
        found = seed_groups(some)
        if any(len(cell.runs) > 1 for cell in found):
            body += [
                "<h3>Over seeds: mean ± 95 % confidence interval</h3>",
                cells_table(found, kind),
            ]
        if line := compare_best(found, primary_metric(some)[0]):
            body.append(f'<p class="note">{html.escape(line)}</p>')
        drawn = [
            Drawn(name, run, *look(run, found, i))
            for i, (name, run) in enumerate(zip(names, some))
            if run.rows and PANELS.get(run.stage, _ONLINE)
        ]
        if drawn:
            body += [
                "<h3>Curves</h3>",
                '<p class="note">A click on a name hides or shows a run, a double click leaves it alone.</p>',
            ]
            body.append(figures.add(all_curves(drawn, stages)))
        if kind == "policy" and drawn:
            body += ["<h3>Reward against KL</h3>", figures.add(frontier(drawn))]
        if keys:
            rows = [[key, *(format_value(run.settings.get(key)) for run in some)] for key in keys]
            body += ["<h3>Settings that differ</h3>", html_table(["", *names], rows)]
        if kind == "policy":
            body += answers(some, names)
    body += [
        f'<p class="warning">{html.escape(run.name)}: {html.escape(run.status)}</p>'
        for run in runs
        if not run.stage
    ]
    body += lineage([run for run in runs if run.kind == "policy"])
    return document(title, body, "body { max-width: 1400px; }", scripts=True)


@dataclass
class Drawn:
    """A run with the look of its lines: a colour for each setting, dashes for the seeds."""

    name: str
    run: Run
    color: str
    dash: str


def look(run: Run, found: Sequence[SeedGroup], place: int) -> tuple[str, str]:
    """Colour and dashes of a run: by its cell where there are several seeds, else by its place."""
    dashes = ["solid", "dash", "dot"]
    if any(len(cell.runs) > 1 for cell in found):
        for i, cell in enumerate(sorted(found, key=lambda cell: cell.label)):
            if run in cell.runs:
                return COLORS[i % len(COLORS)], dashes[cell.runs.index(run) % 3]
    return COLORS[place % len(COLORS)], dashes[place // len(COLORS) % 3]


def unique(names: list[str]) -> list[str]:
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def runs_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    metrics = [
        name for name in REPORTED_METRICS[runs[0].kind] if any(name in run.metrics for run in runs)
    ]
    rows = [
        [
            name,
            run.status,
            str(len(run.rows)),
            *(f"{run.metrics[m]:.3f}" if m in run.metrics else "" for m in metrics),
            run.name,
        ]
        for name, run in zip(names, runs)
    ]
    return html_table(
        ["run", "status", "steps", *metrics, "directory"], rows, ["status", "directory"]
    )


def cells_table(found: Sequence[SeedGroup], kind: str) -> str:
    metrics = [name for name in REPORTED_METRICS[kind] if any(cell.values(name) for cell in found)]
    rows = [
        [cell.label, str(len(cell.runs)), *(format_mean(cell.values(name)) for name in metrics)]
        for cell in found
    ]
    return html_table(["settings", "seeds", *metrics], rows)


# ---------------------------------------------------------------------------------------------------------------------- figures


def all_curves(drawn: Sequence[Drawn], stages: Sequence[str]) -> Any:
    """All metrics of some stages over their steps; the slider smoothes."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    panels = [
        (metric, title if len(metrics) == 1 else metric, unit)
        for stage in stages
        for title, unit, metrics in PANELS.get(stage, _ONLINE)
        for metric in metrics
    ]
    panels = [
        panel
        for panel in dict.fromkeys(panels)
        if any(panel[0] in row for one in drawn for row in one.run.rows)
    ]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = make_subplots(
        rows=lines,
        cols=columns,
        subplot_titles=[title for _, title, _ in panels],
        vertical_spacing=0.3 / lines,
    )
    raw: list[list[float]] = []
    named: set[str] = set()  # a run stands in the legend once, with the first panel that it is in
    for i, (metric, _, unit) in enumerate(panels):
        row, column = i // columns + 1, i % columns + 1
        for one in drawn:
            points = [
                (r["step"], r[metric])
                for r in one.run.rows
                if metric in r and math.isfinite(r[metric])
            ]
            raw.append([value for _, value in points])
            style = {"color": one.color, "width": 2, "dash": one.dash}
            new = bool(points) and one.name not in named
            named |= {one.name} if points else set()
            trace = graph_objects.Scatter(
                x=[step for step, _ in points],
                y=raw[-1],
                name=one.name,
                legendgroup=one.name,
                showlegend=new,
                mode="lines",
                line=style,
            )
            figure.add_trace(trace, row=row, col=column)
        figure.update_yaxes(title_text=unit, row=row, col=column)
        figure.update_xaxes(title_text="step", row=row, col=column)
    steps = [
        {
            "label": str(w),
            "method": "restyle",
            "args": [{"y": [smooth(values, w) for values in raw]}],
        }
        for w in SMOOTHING
    ]
    slider = {
        "active": 0,
        "steps": steps,
        "currentvalue": {"prefix": "running mean over "},
        "pad": {"t": 50},
    }
    figure.update_layout(
        template="plotly_white",
        height=340 * lines + 160,
        sliders=[slider],
        legend={"groupclick": "togglegroup"},
    )
    return figure


def frontier(drawn: Sequence[Drawn]) -> Any:
    """What each run reached at which distance from its SFT policy (Gao 2022, arXiv:2210.10760): the truth where it is known, else the
    score; rollouts as dots, held-out evaluations as circles."""
    from plotly import graph_objects

    known = all("eval/gold" in one.run.metrics for one in drawn if one.run.metrics)
    online, held_out = (
        ("reward/gold/mean", "eval/gold") if known else ("objective/scores", "eval/score")
    )
    figure = graph_objects.Figure()

    def root(row: dict[str, float], key: str) -> float:
        return max(0.0, row[key]) ** 0.5

    for one in drawn:
        name, run, color = one.name, one.run, one.color
        rows = [row for row in run.rows if online in row]
        x, y = [root(row, "objective/kl") for row in rows], [row[online] for row in rows]
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"color": color, "size": 4, "opacity": 0.5},
            name=name,
            legendgroup=name,
        )
        seen = [row for row in [*run.rows, run.metrics] if held_out in row and "eval/kl" in row]
        points = [(root(row, "eval/kl"), row[held_out]) for row in seen]
        if f"{held_out}_before" in run.metrics:
            points.insert(0, (0.0, run.metrics[f"{held_out}_before"]))
        marker = {"color": color, "size": 12, "symbol": "circle-open", "line": {"width": 2}}
        figure.add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], mode="lines+markers", marker=marker, line={"width": 1, "color": color},
            name=f"{name}, held out" if rows else name, legendgroup=name, showlegend=not rows,
        )  # fmt: skip
    title = "gold reward, points" if known else "score, standard deviations"
    figure.update_layout(
        template="plotly_white",
        height=520,
        xaxis_title="root of the KL to the SFT policy, nats per answer",
    )
    figure.update_layout(yaxis_title=title, legend={"groupclick": "togglegroup"})
    return figure


# ----------------------------------------------------------------------------------------------------------------------- texts


def answers(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What the runs answer to the same held-out prompts, beside the first one's SFT policy."""
    by_run = []
    for name, run in zip(names, runs):
        rows = {
            row["prompt"]: row for row in read_lines(run.path / "samples.jsonl") if "after" in row
        }
        if rows:
            by_run.append((name, rows))
    prompts = (
        [p for p in by_run[0][1] if all(p in rows for _, rows in by_run)][:PROMPTS]
        if by_run
        else []
    )
    if not prompts:
        return []

    def scored(text: str, row: dict[str, Any], when: str) -> str:
        marks = [
            f"{key} {row[f'{key}_{when}']:.2f}"
            for key in ("score", "gold")
            if f"{key}_{when}" in row
        ]
        return f"{text}  [{', '.join(marks)}]"

    header = ["prompt", f"before ({by_run[0][0]})", *(name for name, _ in by_run)]
    first = by_run[0][1]
    lines = [
        [
            p,
            scored(first[p]["before"], first[p], "before"),
            *(scored(r[p]["after"], r[p], "after") for _, r in by_run),
        ]
        for p in prompts
    ]
    return ["<h3>Answers to the same held-out prompts</h3>", html_table(header, lines, header)]


def lineage(runs: Sequence[Run]) -> list[str]:
    """Which runs stand on which."""
    near = parent_runs(runs)
    lines = []
    for run in runs:
        parents = []
        for role, id in sorted(run.parents.items(), key=lambda item: item[0] != "sft"):
            parent = near.get(id)
            if parent is None:
                parents.append(f"{role} {id}")
                continue
            metric = primary_metric([parent])[0]
            parents.append(
                parent.name
                + (f" ({metric} {parent.metrics[metric]:.3f})" if metric in parent.metrics else "")
            )
        lines.append([run.name, " + ".join(parents)])
    return (
        ["<h2>Lineage</h2>", html_table(["run", "stands on"], lines, ["stands on"])]
        if lines
        else []
    )
