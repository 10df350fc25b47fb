"""Pictures of one run: its curves, and what was reached at which KL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_ONLINE = [
    ("Score", "standard deviations", ["objective/scores"]),
    ("Gold reward", "points", ["reward/gold/mean"]),
    ("KL to the SFT policy", "nats per answer", ["objective/kl"]),
    ("Loss", "", ["loss/policy_avg", "loss/value_avg"]),
    ("Length", "tokens", ["tokens/response_mean"]),
]
# the panels of a stage, here and on the page of a comparison: title, unit, and the metrics drawn in it
PANELS = {
    "sft": [
        ("Loss", "nats per token", ["loss"]),
        ("Accuracy", "share of tokens", ["mean_token_accuracy"]),
    ],
    "rm": [
        ("Loss", "nats per pair", ["loss"]),
        ("Accuracy", "share of pairs", ["accuracy"]),
        ("Margin", "raw score", ["margin"]),
    ],
    "ppo": _ONLINE,
    "rloo": _ONLINE,
    "grpo": _ONLINE,
    "dpo": [
        ("Loss", "nats per pair", ["loss"]),
        ("Accuracy", "share of pairs", ["rewards/accuracies"]),
        ("Implicit reward", "beta x log-ratio, nats", ["rewards/chosen", "rewards/rejected"]),
    ],
}


def plot_curves(run_dir: Path, stage: str) -> None:
    """Draw run_dir/curves.png (loss, reward, KL over steps) from its metrics.jsonl: raw values faint, their running mean strong."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row}
    panels = [
        (t, label, [n for n in names if n in logged])
        for t, label, names in PANELS.get(stage, _ONLINE)
    ]
    panels = [panel for panel in panels if panel[2]]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (title, label, names) in zip(axes[0], panels):
        for color, name in zip(("#1f77b4", "#ff7f0e"), names):
            steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
            axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            axis.plot(
                steps,
                smooth(values, max(3, len(values) // 20)),
                color=color,
                linewidth=2,
                label=name,
            )
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
        points = [
            [max(0.0, row["eval/kl"]) ** 0.5 for row in seen],
            [row[held_out] for row in seen],
        ]
        axis.scatter(
            *points,
            s=60,
            facecolors="none",
            edgecolors=color,
            linewidths=1.5,
            label=f"{label}, held-out prompts",
        )
    axis.set_xlabel("root of the KL to the SFT policy, nats per answer")
    axis.set_ylabel("standard deviations; points")
    axis.set_title("Reward against KL")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(run_dir.name, fontsize=9, color="gray")
    figure.savefig(run_dir / "frontier.png", dpi=110)
    plt.close(figure)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over at most `window` values, fewer at the ends."""
    half = window // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
