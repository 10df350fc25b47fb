"""How long a step took in an earlier run of the same size, for the plan. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from omegaconf.errors import OmegaConfBaseException

from rlhf.base.errors import UserError
from rlhf.config import keys
from rlhf.config.loading import load_config
from rlhf.config.schema import Config
from rlhf.config.stage_graph import config_nodes

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
NEWEST_BYTES = 1 << 20  # of metrics.jsonl: a thousand steps
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
            times = newest_times(file)
            if len(times) >= MIN_STEPS:
                steps = [later - earlier for earlier, later in zip(times, times[1:])]
                return StepTime(statistics.median(steps), file.parent)
    return None


def newest_times(file: Path) -> list[float]:
    """When the last steps of a run ended, from the end of its metrics.jsonl."""
    with open(file, "rb") as content:
        content.seek(-min(file.stat().st_size, NEWEST_BYTES), os.SEEK_END)
        lines = content.read().split(b"\n")
    times = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            times.append(float(json.loads(line)["time"]))
    return times


def sizes(cfg: Config, stage: str) -> dict[str, object]:
    """The values that decide what a step of a stage costs."""
    nodes = config_nodes(stage)
    return {
        key: value
        for key, value in keys.values(cfg)
        if key.split(".")[0] in nodes
        and (key.startswith("deploy.") or key == PASSES or key.split(".")[-1] in SIZES)
    }
