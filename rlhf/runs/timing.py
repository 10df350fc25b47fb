"""How long a step took in an earlier run of the same size, for the plan. No torch here."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import NamedTuple

from omegaconf.errors import OmegaConfBaseException

from rlhf.base.errors import UserError
from rlhf.config import keys
from rlhf.config.loading import load_config
from rlhf.config.schema import Config
from rlhf.config.stage_graph import config_nodes
from rlhf.runs.history import read_lines

# what a step costs: these keys of the stage's nodes, and where and on what it runs
SIZES = (
    "path",
    "batch_size",
    "minibatches",
    "responses_per_prompt",
    "rank",
    "max_prompt_tokens",
    "max_response_tokens",
    "max_new_tokens",
)
# a rollout of online RL is trained on rl.epochs times; elsewhere epochs repeat the steps
PASSES = "rl.epochs"
MIN_STEPS = 3  # the first one starts the libraries


class StepTime(NamedTuple):
    """Seconds per step (online RL: rollout) of a run."""

    seconds: float
    run: Path


def measure_step(cfg: Config, stage: str) -> StepTime | None:
    """The time of a step in the newest run of the same stage and size; None where there is none.

    The median over its steps, so that evaluations, checkpoints and a resume do not count.
    """
    outputs = Path(cfg.root).expanduser() / "outputs"
    wanted = sizes(cfg, stage)
    runs = sorted(outputs.glob(f"{stage}-*/metrics.jsonl"), key=lambda file: -file.stat().st_mtime)
    for file in runs:
        with contextlib.suppress(UserError, OmegaConfBaseException, OSError, ValueError):
            other = load_config(file.parent / "config.yaml")
            if other.stage.name != stage or sizes(other, stage) != wanted:
                continue
            times = [row["time"] for row in read_lines(file) if "time" in row]
            if len(times) >= MIN_STEPS:
                steps = [later - earlier for earlier, later in zip(times, times[1:])]
                return StepTime(statistics.median(steps), file.parent)
    return None


def sizes(cfg: Config, stage: str) -> dict[str, object]:
    """The values that decide what a step of a stage costs."""
    nodes = config_nodes(stage)
    return {
        key: value
        for key, value in keys.values(cfg)
        if key.split(".")[0] in nodes
        and (key.startswith("deploy.") or key == PASSES or key.split(".")[-1] in SIZES)
    }
