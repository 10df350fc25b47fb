"""Rows, optimizer steps and tokens of a stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf.config.deployment import world_size
from rlhf.config.schema import Config
from rlhf.config.stage_graph import is_aligned, is_rl

ROWS = {
    "Dahoas/rm-static": 76256,
    "Dahoas/full-hh-rlhf": 112052,
    "Anthropic/hh-rlhf": 160800,
}  # preference pairs, from their cards


def share_of(stage: str) -> str:
    """Whose share of the data a stage learns from."""
    return "rm" if stage == "dpo" else "ppo" if is_aligned(stage) else stage


def rows_for_stage(cfg: Config, stage: str) -> int | None:
    """Training rows of a stage, before any is dropped for its length; None where that is known only when the data are there."""
    part = share_of(stage)
    if cfg.data.sandbox:
        rest = (
            7200 - cfg.data.eval_rows
        )  # rlhf/data/sandbox.py makes so many prompts, and leaves PPO a fifth
        return {
            "sft": cfg.data.sandbox.demonstrations,
            "rm": cfg.data.sandbox.pairs,
            "ppo": rest - int(0.8 * rest),
        }[part]
    total = 0
    for source in cfg.data.sources.values():
        path = Path(source.path).expanduser()
        if source.path in ROWS:
            total += ROWS[source.path]
        elif path.suffix == ".jsonl" and path.is_file():
            with open(path, "rb") as file:
                total += sum(1 for _ in file)
        else:
            return None
    share = cfg.data.shares[["sft", "rm", "ppo"].index(part)] / sum(cfg.data.shares)
    return int(total * (1 - cfg.data.eval_share) * share)


def count_steps(cfg: Config, stage: str) -> tuple[str, int | None, int | None]:
    """How a batch is cut, the number of steps (PPO: rollouts) and of tokens, at most."""
    if stage == "eval":
        return "nothing is trained", 0, 0
    node: Any = cfg.rl if is_rl(stage) else getattr(cfg, stage)
    online, pairs = is_rl(stage), stage in ("rm", "dpo")
    world, rows = world_size(cfg), rows_for_stage(cfg, stage)
    each = node.responses_per_prompt if online else 1
    per_step = node.batch_size // node.minibatches if online else node.batch_size
    forwards = math.ceil(per_step / world / cfg.deploy.micro_batch)
    what = "pairs" if pairs else "answers" if online else "demonstrations"
    text = f"{per_step} {what} per optimizer step = {world} process(es) x {forwards} forward(s)"
    text += f" of {min(cfg.deploy.micro_batch, max(1, per_step // world))}"
    if online:
        text += f"; {node.batch_size // each} prompts per rollout, " + (
            f"{each} answers to each, " if each > 1 else ""
        )
        text += f"{node.epochs} x {node.minibatches} steps on each rollout"
    epochs = node.prompt_epochs if online else node.epochs
    steps = None if rows is None else rows // (node.batch_size // each) * epochs
    if node.max_steps:
        steps = node.max_steps if steps is None else min(steps, node.max_steps)
    longest = cfg.data.max_prompt_tokens + (
        cfg.rollout.max_new_tokens if online else cfg.data.max_response_tokens
    )
    sequences = node.batch_size * (2 if pairs else 1)
    return text, steps, None if steps is None else steps * sequences * longest
