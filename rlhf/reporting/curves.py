"""Pictures of one run: its curves, and the score that it reached at each KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rlhf.runs.history import read_lines
from rlhf.runs.stage_views import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]  # a line of metrics.jsonl

COLORS = ("#1f77b4", "#ff7f0e")


def plot_curves(run_dir: Path, panels: Sequence[Panel]) -> None:
    """Draw run_dir/curves.png from metrics.jsonl: raw values faint, their running mean strong."""
    rows = read_lines(run_dir / "metrics.jsonl")
    logged = {name for row in rows for name in row}
    drawn = [panel for panel in panels if logged.intersection(panel.metrics)]
    plt = headless_pyplot()
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(4.2 * len(drawn), 3.2), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], drawn):
        draw_panel(axis, panel, rows)
    save(figure, run_dir / "curves.png")


def draw_panel(axis: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    """Draw the metrics of a panel that `rows` have."""
    names = [name for name in panel.metrics if any(name in row for row in rows)]
    for color, name in zip(COLORS, names):
        steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        mean = smooth(values, max(3, len(values) // 20))
        axis.plot(steps, mean, color=color, linewidth=2, label=name)
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize=8)


def plot_frontier(run_dir: Path, final: dict[str, float]) -> None:
    """Draw run_dir/frontier.png: score and gold reward against the KL to the SFT policy.

    Dots are rollouts. Circles are evaluations on held-out prompts, with those of the start and the
    end. Source: Gao 2022, arXiv:2210.10760. Args: final: the run's final metrics, eval/NAME.
    """
    rows = read_lines(run_dir / "metrics.jsonl")
    figure, axis = headless_pyplot().subplots(figsize=(5.6, 4.0), layout="constrained")
    for color, label, name, held_out in (
        ("#1f77b4", "score", "objective/scores", "eval/score"),
        ("#d62728", "gold reward", "reward/gold/mean", "eval/gold"),
    ):
        if name not in rows[0]:
            continue
        kl = [root_kl(row["objective/kl"]) for row in rows]
        rewards = [row[name] for row in rows]
        axis.plot(kl, rewards, color=color, linewidth=0.6, alpha=0.4)
        axis.scatter(kl, rewards, color=color, s=12, label=label)
        start = {"eval/kl": 0.0, held_out: final[f"{held_out}_before"]}
        evaluated = [start, *(row for row in rows if held_out in row), final]
        axis.scatter(
            [root_kl(row["eval/kl"]) for row in evaluated],
            [row[held_out] for row in evaluated],
            s=60,
            facecolors="none",
            edgecolors=color,
            linewidths=1.5,
            label=f"{label}, held-out prompts",
        )
    axis.set_xlabel("root of the KL to the SFT policy, nats per response")
    axis.set_ylabel("standard deviations; points")
    axis.set_title("Reward against KL")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, run_dir / "frontier.png")


def root_kl(kl: float) -> float:
    """The root of a KL; its estimate may be below 0."""
    return max(0.0, kl) ** 0.5


def headless_pyplot() -> ModuleType:
    """pyplot that needs no screen; imported late, as it takes time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Figure, file: Path) -> None:
    """Write a picture with the run's name above it."""
    figure.suptitle(file.parent.name, fontsize=9, color="gray")
    figure.savefig(file, dpi=110)
    headless_pyplot().close(figure)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over at most `window` values, fewer at the ends."""
    half = window // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
