"""What stage=eval has measured, as one HTML page. Plotly draws; no script here is ours."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.reporting.html import Figures, document, html_table

SHOWN = 12  # held-out prompts whose answers are shown
COLUMNS = {  # of a policy: title and format
    "perplexity": ("perplexity", ".3f"),
    "score": ("score", ".3f"),
    "gold": ("gold score", ".3f"),
    "kl": ("KL, nats per answer", ".2f"),
    "length": ("length, tokens", ".1f"),
    "eos_rate": ("answers that end", ".1%"),
    "repetition": ("repetition", ".1%"),
}


def write(found: dict[str, Any], file: Path, title: str) -> None:
    """Write the page through a temporary name. Args: found: what eval.json holds."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    figures = Figures()
    if found["policies"]:
        body += ["<h2>Policies</h2>", policies_table(found)]
    if found["win_rates"]:
        against = html.escape(found["against"])
        body += [
            f"<h2>Win rates against {against}</h2>",
            figures.add(win_rate_figure(found["win_rates"])),
        ]
        body.append(win_rates_table(found["win_rates"]))
        body.append(
            f'<p class="note">Same prompts, one answer each ({found["decoding"]}); a tie counts half; Wilson intervals.</p>'
        )
    for name, about in found["reward_models"].items():
        body += [f"<h2>Reward model: {html.escape(name)}</h2>", scorer_tables(about)]
        body += [figures.add(reliability_figure(about)), figures.add(margin_figure(about))]
    if found["best_of"]:
        policy = html.escape(found["best_of_policy"])
        body += [
            f"<h2>Best of n answers of {policy}</h2>",
            figures.add(best_of_figure(found["best_of"])),
            best_of_table(found["best_of"]),
        ]
    for key, heading in (
        ("fixed", "Answers to fixed prompts"),
        ("answers", "Answers to held-out prompts"),
    ):
        rows = found[key] if key == "fixed" else found[key][:SHOWN]
        if rows:
            body += [f"<h2>{heading}</h2>", answers_table(rows)]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(document(title, body, "body { max-width: 1400px; }", scripts=True))
    os.replace(temporary, file)


# ------------------------------------------------------------------------------------------------------------------------ tables


def policies_table(found: dict[str, Any]) -> str:
    kept = [key for key in COLUMNS if any(key in numbers for numbers in found["policies"].values())]
    rows = [
        [
            name,
            *(format(numbers[key], COLUMNS[key][1]) if key in numbers else "" for key in kept),
            found["where"][name],
        ]
        for name, numbers in found["policies"].items()
    ]
    return html_table(["policy", *(COLUMNS[key][0] for key in kept), "model"], rows, ["model"])


def win_rates_table(duels: Sequence[dict[str, Any]]) -> str:
    header = ["policy", "judge", "win rate", "95 % interval", "wins", "ties", "prompts"]
    rows = [
        [
            d["policy"],
            d["judge"],
            f"{d['rate']:.1%}",
            f"{d['low']:.1%} to {d['high']:.1%}",
            *(str(d[k]) for k in ("wins", "ties", "prompts")),
        ]
        for d in duels
    ]
    return html_table(header, rows)


def scorer_tables(about: dict[str, Any]) -> str:
    line = f"{about['pairs']:,} held-out pairs, accuracy {about['accuracy']:.1%}, expected calibration error {about['ece']:.3f}"
    line += f"; against the truth {about['accuracy_gold']:.1%}" if "accuracy_gold" in about else ""
    parts = [f"<p>{html.escape(line)}</p>"]
    for key, title in (("by_source", "source"), ("by_length", "length of the answers")):
        rows = [
            [name, f"{pairs:,}", f"{accuracy:.1%}"]
            for name, (pairs, accuracy) in about[key].items()
        ]
        parts.append(html_table([title, "pairs", "accuracy"], rows))
    header = ["it says", "pairs", "mean of what it says", "is right"]
    rows = [
        [
            f"{b['low']:.0%} to {b['high']:.0%}",
            f"{b['pairs']:,}",
            f"{b['probability']:.1%}",
            f"{b['accuracy']:.1%}",
        ]
        for b in about["reliability"]
    ]
    return "".join([*parts, html_table(header, rows)])


def best_of_table(curve: Sequence[dict[str, float]]) -> str:
    known = "gold" in curve[0]
    rows = [
        [
            str(c["n"]),
            f"{c['score']:.3f}",
            *([f"{c['gold']:.3f}"] if known else []),
            f"{c['kl']:.2f}",
        ]
        for c in curve
    ]
    return html_table(["n", "score", *(["gold score"] if known else []), "KL at most, nats"], rows)


def answers_table(rows: Sequence[dict[str, Any]]) -> str:
    policies = list(rows[0]["answers"])

    def cell(about: dict[str, Any]) -> str:
        marks = [f"{key} {about[key]:.2f}" for key in ("score", "gold") if key in about]
        return about["completion"] + (f"  [{', '.join(marks)}]" if marks else "")

    header = ["prompt", *policies]
    return html_table(
        header,
        [[row["prompt"], *(cell(row["answers"][name]) for name in policies)] for row in rows],
        header,
    )


# ----------------------------------------------------------------------------------------------------------------------- figures


def win_rate_figure(duels: Sequence[dict[str, Any]]) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for judge in dict.fromkeys(d["judge"] for d in duels):
        some = [d for d in duels if d["judge"] == judge]
        bars = {
            "type": "data",
            "array": [d["high"] - d["rate"] for d in some],
            "arrayminus": [d["rate"] - d["low"] for d in some],
        }
        figure.add_scatter(
            x=[d["policy"] for d in some],
            y=[d["rate"] for d in some],
            error_y=bars,
            mode="markers",
            marker={"size": 11},
            name=f"by {judge}",
        )
    figure.add_hline(y=0.5, line={"dash": "dot", "color": "gray"})
    figure.update_layout(template="plotly_white", height=380, scattermode="group", scattergap=0.75)
    figure.update_yaxes(title_text="win rate", tickformat=".0%", range=[0, 1.02])
    return figure


def reliability_figure(about: dict[str, Any]) -> Any:
    from plotly import graph_objects

    bins = about["reliability"]
    figure = graph_objects.Figure()
    figure.add_scatter(
        x=[0.5, 1],
        y=[0.5, 1],
        mode="lines",
        line={"dash": "dot", "color": "gray"},
        name="as often as it says",
    )
    figure.add_scatter(
        x=[b["probability"] for b in bins], y=[b["accuracy"] for b in bins], mode="lines+markers", name="this model",
        marker={"size": [6 + 24 * (b["pairs"] / about["pairs"]) ** 0.5 for b in bins]},
    )  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=380, title="Calibration: a larger dot is more pairs"
    )
    figure.update_xaxes(title_text="probability that it gives its choice", tickformat=".0%")
    figure.update_yaxes(title_text="it is right", tickformat=".0%")
    return figure


def margin_figure(about: dict[str, Any]) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure(graph_objects.Histogram(x=about["margins"], nbinsx=60))
    figure.add_vline(x=0, line={"color": "#d62728"})
    figure.update_layout(
        template="plotly_white",
        height=340,
        title="Margins: left of the line it chooses the rejected answer",
        bargap=0.05,
    )
    figure.update_xaxes(title_text="raw score of chosen minus rejected")
    figure.update_yaxes(title_text="pairs")
    return figure


def best_of_figure(curve: Sequence[dict[str, float]]) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for key, name in (("score", "score"), ("gold", "gold score, points")):
        if key in curve[0]:
            figure.add_scatter(
                x=[c["n"] for c in curve],
                y=[c[key] for c in curve],
                mode="lines+markers",
                name=name,
            )
    figure.update_xaxes(title_text="n", type="log", tickvals=[c["n"] for c in curve])
    figure.update_layout(template="plotly_white", height=380)
    return figure
