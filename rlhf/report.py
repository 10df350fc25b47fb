"""Tables of runs for the terminal, and the picture of a run's curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# the panels of curves.png: title, y label, and the metrics drawn in it
CURVES = {
    "sft": [("Loss", "nats per token", ["loss"]), ("Accuracy", "share of tokens", ["mean_token_accuracy"])],
    "rm": [("Loss", "nats per pair", ["loss"]), ("Accuracy", "share of pairs", ["accuracy"])],
    "ppo": [
        ("Score of the reward model", "standard deviations", ["objective/scores"]),
        ("Gold reward", "points", ["reward/gold/mean"]),
        ("KL to the SFT policy", "nats per sequence", ["objective/kl"]),
        ("Loss", "", ["loss/policy_avg", "loss/value_avg"]),
    ],
}
TEXTS = ("prompt", "chosen", "rejected")


def plot_curves(run_dir: Path) -> None:
    """Draw run_dir/curves.png (loss, reward, KL over steps) from its metrics.jsonl: raw values faint, their running mean strong."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row}
    panels = [(t, label, [n for n in names if n in logged]) for t, label, names in CURVES[run_dir.name.split("-")[0]]]
    panels = [panel for panel in panels if panel[2]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, label, names) in zip(axes[0], panels):
        for color, name in zip(("#1f77b4", "#ff7f0e"), names):
            steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
            axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            axis.plot(steps, smooth(values), color=color, linewidth=2, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(run_dir.name, fontsize=9, color="gray")
    figure.savefig(run_dir / "curves.png", dpi=110)
    plt.close(figure)


def plot_frontier(run_dir: Path, final: dict[str, float]) -> None:
    """Draw run_dir/frontier.png: what was reached at which distance from the SFT policy (Gao 2022, arXiv:2210.10760: score and truth
    against the root of the KL). Dots are rollouts, circles evaluations on held-out prompts, of start and end (`final`) too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
    for color, label, name, held_out in (
        ("#1f77b4", "score", "objective/scores", "eval/score"),
        ("#d62728", "gold reward", "reward/gold/mean", "eval/gold"),
    ):
        if name not in rows[0]:
            continue
        kl = [max(0.0, row["objective/kl"]) ** 0.5 for row in rows]
        axis.plot(kl, [row[name] for row in rows], color=color, linewidth=0.6, alpha=0.4)
        axis.scatter(kl, [row[name] for row in rows], color=color, s=12, label=label)
        start = {"eval/kl": 0.0, held_out: final[f"{held_out}_before"]}
        seen = [start, *(row for row in rows if held_out in row), final]
        points = [[max(0.0, row["eval/kl"]) ** 0.5 for row in seen], [row[held_out] for row in seen]]
        axis.scatter(*points, s=60, facecolors="none", edgecolors=color, linewidths=1.5, label=f"{label}, held-out prompts")
    axis.set_xlabel("root of the KL to the SFT policy, nats per answer")
    axis.set_ylabel("standard deviations; points")
    axis.set_title("Reward against KL")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(run_dir.name, fontsize=9, color="gray")
    figure.savefig(run_dir / "frontier.png", dpi=110)
    plt.close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the curve, at least 3 values (fewer at the ends)."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def print_runs(runs: list[Path], seconds: float) -> None:
    """What a command achieved: the final metrics of its stages, and where everything lies."""
    table = Table(title=f"Finished in {seconds:.0f} s", title_justify="left")
    for column in ("stage", "result", "before", "after"):
        table.add_column(column)
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        for label, before, after in lines_of(summary["stage"], summary["metrics"]):
            table.add_row(summary["stage"], label, before, after)
        table.add_section()
    console = Console()
    console.print(table)
    for run in runs:
        pictures = "curves.png, frontier.png" if run.name.startswith("ppo-") else "curves.png"
        console.print(f"{run}  ({pictures}, metrics.jsonl, model/)", soft_wrap=True, highlight=False)
    if (runs[-1].name.split("-")[0]) in ("sft", "ppo"):
        console.print(f"Talk to it:  python chat.py --path {runs[-1]}", soft_wrap=True, highlight=False)


def lines_of(stage: str, metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows of the table for one stage: what, before, after."""
    wanted = {
        "sft": [
            ("held-out perplexity", "", "perplexity", ".3f"),
            ("answers that end", "", "eos_rate", ".1%"),
            ("gold score", "", "gold", ".2f"),
        ],
        "rm": [
            ("held-out accuracy", "", "accuracy", ".1%"),
            ("  of a perfect judge", "", "accuracy_bayes", ".1%"),
            ("  against the truth", "", "accuracy_gold", ".1%"),
            ("  fits its prompt", "", "accuracy_prompt", ".1%"),
        ],
        "ppo": [
            ("score", "score_before", "score", ".2f"),
            ("gold score", "gold_before", "gold", ".2f"),
            ("  best possible", "", "gold_best", ".2f"),
            ("KL, nats per answer", "", "kl", ".2f"),
            ("length, tokens", "length_before", "length", ".1f"),
            ("answers that end", "eos_rate_before", "eos_rate", ".1%"),
        ],
    }[stage]

    def show(key: str, form: str) -> str:
        return format(metrics[f"eval/{key}"], form) if f"eval/{key}" in metrics else ""

    return [(label, show(before, form), show(after, form)) for label, before, after, form in wanted if f"eval/{after}" in metrics]


def print_sweep(jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """One row per job of a sweep, with the metrics that its last stage has."""
    names = ["score", "gold", "kl", "length", "perplexity", "accuracy"]
    names = [name for name in names if any(f"eval/{name}" in summary["metrics"] for _, summary in jobs)]
    table = Table(title="Sweep", title_justify="left")
    for column in ("job", *names):
        table.add_column(column)
    for job, summary in jobs:
        table.add_row(job, *(f"{summary['metrics'][f'eval/{name}']:.3f}" if f"eval/{name}" in summary["metrics"] else "" for name in names))
    Console().print(table)


def print_inspection(found: dict[str, Any], page: Path) -> None:
    """What the dataset doctor found: a table of sources, one of stages, what to worry about, and where the page lies."""
    console = Console(width=130, highlight=False)
    from_sources = Table(title="Sources", title_justify="left")
    for column in ("source/split", "rows", "left out", "sft", "rm", "ppo", "held out"):
        from_sources.add_column(column, justify="left" if column == "source/split" else "right")
    for entry in found["sources"]:
        stages = [f"{entry[part]:,} ({entry['share'].get(part, 0):.0%})" if part in entry else "" for part in ("sft", "rm", "ppo", "eval")]
        name = escape(f"{entry['source']}/{entry['split']}")
        from_sources.add_row(name, f"{entry['rows']:,}", f"{sum(entry['left_out'].values()):,}", *stages)
    console.print(from_sources)
    lengths = Table(title="Tokens: median / 95 % / longest", title_justify="left")
    for column in ("stage", "rows", "prompts", "chosen", "rejected", "dropped", "cut", "chosen longer"):
        lengths.add_column(column, justify="left" if column == "stage" else "right")
    for name, numbers in found["stages"].items():
        spreads = [numbers["tokens"].get(key) or numbers["tokens"].get({"chosen": "text"}.get(key, ""), {}) for key in TEXTS]
        measured = max(1, numbers["measured"])
        shares = [f"{numbers[key] / measured:.1%}" if key in numbers else "" for key in ("dropped", "cut")]
        longer = f"{numbers['chosen_longer'] / numbers['pairs']:.1%}" if numbers.get("pairs") else ""
        tokens = (" / ".join(f"{n:,}" for n in spread.values()) for spread in spreads)
        lengths.add_row(name, f"{numbers['rows']:,}", *tokens, *shares, longer)
    console.print(lengths)
    for part in found["stages"], {f"{e['source']}/{e['split']}": e["tokens"] for e in found["sources"]}:
        for name, numbers in part.items():
            if numbers["measured"] < numbers["rows"]:
                console.print(f"{name}: tokens of a random sample of {numbers['measured']:,} rows", markup=False)
    for line in found["verdicts"] or ["nothing to worry about"]:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    console.print(f"{page}", markup=False, soft_wrap=True)
