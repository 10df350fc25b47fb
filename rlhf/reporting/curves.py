"""Pictures of one run: its curves, and the score that it reached at each KL."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from rlhf.base.log import log
from rlhf.runs.history import read_lines
from rlhf.runs.stage_views import Panel, StageView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]  # a line of metrics.jsonl

# Okabe and Ito's colours, without yellow: people who are colour-blind can tell them apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GRID_COLUMNS = 3
PANEL_SIZE = (3.8, 2.9)  # inches
DOTS_PER_INCH = 110
ROOT_KL = "square root of the KL to the SFT policy, nats per response"


class FrontierReward(NamedTuple):
    """A reward that is drawn against the KL."""

    title: str
    unit: str
    rollout: str  # metric of the rollouts
    held_out: str  # metric of the evaluations


FRONTIER_REWARDS = (
    FrontierReward("Gold reward", "points", "reward/gold/mean", "eval/gold"),
    FrontierReward("Score", "weighted sum of rl.rewards", "objective/scores", "eval/score"),
)


def plot_curves(run_dir: Path, view: StageView) -> None:
    """Draw run_dir/curves.png from metrics.jsonl: raw values faint, their running mean strong."""
    rows = read_lines(run_dir / "metrics.jsonl")
    logged = {name for row in rows for name in row}
    drawn = [panel for panel in view.panels if panel.drawn(logged)]
    if not drawn:
        log.warning(f"{run_dir}: metrics.jsonl has nothing to draw; there is no curves.png")
        return
    figure, axes = panel_grid(len(drawn))
    for i, (axis, panel) in enumerate(zip(axes, drawn)):
        draw_panel(axis, panel, rows)
        below = i + GRID_COLUMNS  # the panel under this one, where there is one
        axis.set_xlabel(view.x_axis if below >= len(drawn) else "")
    save(figure, run_dir / "curves.png")


def panel_grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, in rows of at most GRID_COLUMNS."""
    columns = min(GRID_COLUMNS, count)
    lines = math.ceil(count / columns)
    width, height = PANEL_SIZE
    figure, axes = headless_pyplot().subplots(
        lines,
        columns,
        figsize=(width * columns, height * lines),
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def draw_panel(axis: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    """Draw the metrics of a panel that `rows` have."""
    names = panel.drawn({name for row in rows for name in row})
    for color, name in zip(COLORS, names):
        steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        mean = smooth(values, max(3, len(values) // 20))
        axis.plot(steps, mean, color=color, linewidth=2, label=name)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize=9)


def plot_frontier(run_dir: Path, final: dict[str, float]) -> None:
    """Draw run_dir/frontier.png: score and gold reward against the KL to the SFT policy.

    Dots are rollouts. Circles are evaluations on held-out prompts, with those of the start and the
    end. Source: Gao 2022, arXiv:2210.10760. Args: final: the run's final metrics, eval/NAME.
    """
    rows = [row for row in read_lines(run_dir / "metrics.jsonl") if "objective/kl" in row]
    rewards = [one for one in FRONTIER_REWARDS if rows and one.rollout in rows[0]]
    if not rewards:
        return
    width, height = PANEL_SIZE
    figure, axes = headless_pyplot().subplots(
        1,
        len(rewards),
        figsize=(1.4 * width * len(rewards), 1.3 * height),
        squeeze=False,
        layout="constrained",
    )
    for axis, reward, color in zip(axes.flat, rewards, COLORS):
        draw_frontier(axis, reward, color, rows, final)
    save(figure, run_dir / "frontier.png")


def draw_frontier(
    axis: Axes, reward: FrontierReward, color: str, rows: Sequence[Row], final: Row
) -> None:
    """Draw one reward against the root of the KL."""
    kl = [root_kl(row["objective/kl"]) for row in rows]
    values = [row[reward.rollout] for row in rows]
    axis.plot(kl, values, color=color, linewidth=0.6, alpha=0.4)
    axis.scatter(kl, values, color=color, s=25, alpha=0.6, label="rollouts")
    start = {"eval/kl": 0.0, reward.held_out: final[f"{reward.held_out}_before"]}
    evaluated = [start, *(row for row in rows if reward.held_out in row), final]
    axis.scatter(
        [root_kl(row["eval/kl"]) for row in evaluated],
        [row[reward.held_out] for row in evaluated],
        s=110,
        facecolors="none",
        edgecolors="black",
        linewidths=2,
        label="held-out prompts",
    )
    axis.set_title(f"{reward.title} against KL")
    axis.set_xlabel(ROOT_KL)
    axis.set_ylabel(reward.unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


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
    """Write a picture with the run's name above it, in lines that fit."""
    characters = int(13 * figure.get_figwidth())
    name = textwrap.fill(file.parent.name, characters)
    figure.suptitle(name, fontsize=9, color="gray")
    figure.savefig(file, dpi=DOTS_PER_INCH)
    headless_pyplot().close(figure)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over at most `window` values, fewer at the ends."""
    half = window // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
