"""Pictures of one run: its curves, and the score that it reached at each KL.

python -m rlhf.reporting.curves RUN_DIR STAGE draws the curves of a run that is still training.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.base.files import atomic_path
from rlhf.base.log import log
from rlhf.base.own_processes import end_with_parent
from rlhf.runs.history import read_shown
from rlhf.runs.metrics import Metrics, Points, thin
from rlhf.runs.stage_views import ONLINE_RL, Panel, view_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, without yellow: people who are colour-blind can tell them apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GRID_COLUMNS = 3
PANEL_SIZE = (3.8, 2.9)  # inches
DOTS_PER_INCH = 110
MOST_POINTS = 2000  # of a line in a picture; a panel is 400 dots wide
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


def plot_run(run_dir: Path, stage: str, final: dict[str, float]) -> None:
    """Draw the pictures of a finished run from its metrics.jsonl.

    Args: final: its final metrics, eval/NAME.
    """
    view = view_of(stage)
    if not view.panels:
        return
    metrics = read_shown(run_dir / "metrics.jsonl", stage)
    for line in metrics.damage:
        log.warning(line)
    plot_curves(run_dir, stage, metrics)
    if view is ONLINE_RL:
        plot_frontier(run_dir, metrics, final)


def plot_curves(run_dir: Path, stage: str, metrics: Metrics) -> None:
    """Draw run_dir/curves.png: raw values faint, their running mean strong."""
    view = view_of(stage)
    drawn = [panel for panel in view.panels if panel.drawn(metrics.columns)]
    if not drawn:
        log.warning(f"{run_dir}: metrics.jsonl has nothing to draw; there is no curves.png")
        return
    figure, axes = panel_grid(len(drawn))
    for i, (axis, panel) in enumerate(zip(axes, drawn)):
        draw_panel(axis, panel, metrics)
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


def draw_panel(axis: Axes, panel: Panel, metrics: Metrics) -> None:
    """Draw the metrics of a panel that a run has."""
    names = panel.drawn(metrics.columns)
    for color, name in zip(COLORS, names):
        raw = metrics.curve(name)
        mean = Points(raw.x, smooth(raw.y, max(3, len(raw.y) // 20)))
        marker = "o" if len(raw.y) == 1 else None  # a single point has no line
        axis.plot(*thin(raw, MOST_POINTS), color=color, alpha=0.3, linewidth=1, marker=marker)
        axis.plot(*thin(mean, MOST_POINTS), color=color, linewidth=2, label=name)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize=9)


def plot_frontier(run_dir: Path, metrics: Metrics, final: dict[str, float]) -> None:
    """Draw run_dir/frontier.png: score and gold reward against the KL to the SFT policy.

    Dots are rollouts. Circles are evaluations on held-out prompts, with those of the start and the
    end. Source: Gao 2022, arXiv:2210.10760. Args: final: the run's final metrics, eval/NAME.
    """
    rewards = [one for one in FRONTIER_REWARDS if len(metrics.pairs("objective/kl", one.rollout).y)]
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
        draw_frontier(axis, reward, color, metrics, final)
    save(figure, run_dir / "frontier.png")


def draw_frontier(
    axis: Axes, reward: FrontierReward, color: str, metrics: Metrics, final: dict[str, float]
) -> None:
    """Draw one reward against the root of the KL."""
    rollouts = thin(root_of_kl(metrics, "objective/kl", reward.rollout), MOST_POINTS)
    axis.plot(*rollouts, color=color, linewidth=0.6, alpha=0.4)
    axis.scatter(*rollouts, color=color, s=25, alpha=0.6, label="rollouts")
    held_out = held_out_points(metrics, final, reward.held_out)
    if len(held_out.x):
        axis.scatter(
            *held_out,
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


def held_out_points(metrics: Metrics, final: dict[str, float], reward: str) -> Points:
    """The root of the KL, and a reward, of each evaluation that has both: start, middle, end.

    At the start the KL is 0. Args: final: the run's final metrics.
    """
    kl, values = (axis.tolist() for axis in root_of_kl(metrics, "eval/kl", reward))
    if f"{reward}_before" in final:
        kl, values = [0.0, *kl], [final[f"{reward}_before"], *values]
    if reward in final and "eval/kl" in final:
        kl, values = [*kl, root_kl(final["eval/kl"])], [*values, final[reward]]
    return Points(np.array(kl, float), np.array(values, float))


def root_of_kl(metrics: Metrics, kl: str, reward: str) -> Points:
    """The root of the KL, and a reward, in the rows that have both."""
    points = metrics.pairs(kl, reward)
    return Points(np.sqrt(np.maximum(0.0, points.x)), points.y)


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
    with atomic_path(file) as temporary:  # the run's page may be showing the one before
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")
    headless_pyplot().close(figure)


def smooth(values: Sequence[float] | NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred running mean over at most `window` values, fewer at the ends.

    A window is the end of one block of its length and the beginning of the next, whose sums are
    running sums: nothing is subtracted, so that one large or infinite value stays where it is.
    """
    half = window // 2
    size = 2 * half + 1
    padded = np.concatenate([np.zeros(half), values, np.zeros(half)])
    blocks = np.pad(padded, (0, -len(padded) % size)).reshape(-1, size)
    beginnings = blocks.cumsum(axis=1).ravel()  # of a block up to each value
    ends = blocks[:, ::-1].cumsum(axis=1)[:, ::-1].ravel()  # from each value
    first = np.arange(len(values))
    sums = np.where(first % size, ends[first], 0.0) + beginnings[first + size - 1]
    counts = np.minimum(first, half) + np.minimum(first[::-1], half) + 1
    return sums / counts


if __name__ == "__main__":
    end_with_parent()  # the training
    os.nice(19)  # which goes first
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    plot_curves(folder, stage, read_shown(folder / "metrics.jsonl", stage))
