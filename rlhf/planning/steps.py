"""Rows, optimizer steps and tokens of a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf.base.constants import SANDBOX_PROMPTS, SANDBOX_SPLIT, WORLD_HELD_OUT
from rlhf.base.log import plural
from rlhf.config.choices import TrainOn
from rlhf.config.deployment import world_size
from rlhf.config.schema import Config, Data
from rlhf.config.stage_graph import is_aligned, is_rl, prompts_per_rollout
from rlhf.config.stage_nodes import Dpo, Rm, Sft
from rlhf.planning.rows import estimate_rows


def share_of(stage: str) -> str:
    """The share of the data that a stage is trained on: sft, rm or ppo."""
    if stage == "dpo":
        return "rm"
    return "ppo" if is_aligned(stage) else stage


def rows_for_stage(cfg: Config, stage: str) -> int | None:
    """Training rows of a stage, before any is skipped: exact for a built-in world, else estimated.

    Returns: None where the number is unknown before the data are read.
    """
    share = share_of(stage)
    if cfg.data.world:
        return rows_of_world(cfg.data, share)
    every_answer = share == "sft" and cfg.sft.train_on is TrainOn.all
    return estimate_rows(cfg.data, share, every_answer)


def rows_of_world(data: Data, share: str) -> int:
    """Rows of a share of a built-in world (rlhf/data/sandbox, rlhf/data/arithmetic)."""
    sizes = data.sandbox or data.arithmetic
    assert sizes is not None
    if share == "sft":
        return sizes.demonstrations
    if share == "rm":
        return sizes.pairs
    if data.arithmetic:
        return data.arithmetic.prompts
    training = SANDBOX_PROMPTS - WORLD_HELD_OUT
    return training - int(SANDBOX_SPLIT[-1] * training)


class Steps(NamedTuple):
    """Steps of a stage (online algorithms: rollouts)."""

    batch: str  # how a batch is cut, as text
    number: int | None  # None where it is unknown before the data are read
    tokens: int | None  # at most; None likewise
    certainty: str  # "", "about " or "at most ": what to say in front of the number


def count_steps(cfg: Config, stage: str) -> Steps:
    """The steps of a stage, as far as they are known before the data are read."""
    if stage == "eval":
        return Steps("nothing is trained", 0, 0, "")
    online = is_rl(stage)
    rows = rows_for_stage(cfg, stage)
    per_step, epochs, max_steps = schedule(cfg, stage)
    steps = None if rows is None else rows // per_step * epochs
    certainty = "" if cfg.data.world else "about "
    if max_steps and (steps is None or steps >= max_steps):
        steps, certainty = max_steps, "" if cfg.data.world else "at most "
    response = cfg.rollout.max_new_tokens if online else cfg.data.max_response_tokens
    tokens = sequences_per_step(cfg, stage) * (cfg.data.max_prompt_tokens + response)
    total = None if steps is None else steps * tokens
    return Steps(describe_batch(cfg, stage), steps, total, certainty)


def too_large_batches(cfg: Config, stages: Sequence[str]) -> list[str]:
    """Batches that need more rows than there are, a line each. Estimated numbers of rows may be
    half of the real ones."""
    lines = []
    for stage in stages:
        rows = None if stage == "eval" else rows_for_stage(cfg, stage)
        per_step = schedule(cfg, stage)[0] if rows is not None else 0
        if rows is not None and per_step > rows * (1 if cfg.data.world else 2):
            node, what = ("rl", "prompts") if is_rl(stage) else (stage, "rows")
            lines.append(
                f"{node}.batch_size={batch_size(cfg, stage)}: a step of {stage} needs "
                f"{per_step:,} {what}, there are {'' if cfg.data.world else 'about '}{rows:,}; "
                "lower it, or add data"
            )
    return lines


def schedule(cfg: Config, stage: str) -> tuple[int, int, int | None]:
    """Rows of the data per step, passes over the data, and the limit of steps."""
    if is_rl(stage):
        rl = cfg.rl
        return prompts_per_rollout(rl), rl.prompt_epochs, rl.max_steps
    nodes: dict[str, Sft | Rm | Dpo] = {"sft": cfg.sft, "rm": cfg.rm, "dpo": cfg.dpo}
    node = nodes[stage]
    return node.batch_size, node.epochs, node.max_steps


def sequences_per_step(cfg: Config, stage: str) -> int:
    """Sequences of an optimizer step, or of a rollout of online RL."""
    if stage in ("rm", "dpo"):
        return 2 * batch_size(cfg, stage)
    return batch_size(cfg, stage)


def batch_size(cfg: Config, stage: str) -> int:
    """Demonstrations, pairs or responses of a batch."""
    sizes = {"sft": cfg.sft.batch_size, "rm": cfg.rm.batch_size, "dpo": cfg.dpo.batch_size}
    return sizes.get(stage, cfg.rl.batch_size)


def describe_batch(cfg: Config, stage: str) -> str:
    """How the rows of an optimizer step are cut into forward passes, as text."""
    rl, world, per_step = cfg.rl, world_size(cfg), batch_size(cfg, stage)
    what = "pairs" if stage in ("rm", "dpo") else "demonstrations"
    if is_rl(stage):
        what = "responses"
        per_step //= rl.minibatches
    passes = math.ceil(per_step / world / cfg.deploy.micro_batch)
    rows = min(cfg.deploy.micro_batch, max(1, per_step // world))
    text = (
        f"{per_step} {what} per optimizer step = {plural(world, 'process', 'es')} x "
        f"{plural(passes, 'forward pass', 'es')} of {rows}"
    )
    if is_rl(stage):
        k = rl.responses_per_prompt
        text += f"; {plural(prompts_per_rollout(rl), 'prompt')} per rollout, "
        if k > 1:
            text += f"{k} responses per prompt, "
        if rl.dynamic_sampling:
            text += f"drawn up to {rl.dynamic_sampling} times, "
        text += f"{rl.epochs} x {rl.minibatches} steps on each rollout"
    return text
