"""Rows, optimizer steps and tokens of a stage."""

from __future__ import annotations

import math
from pathlib import Path

from rlhf.base.constants import SANDBOX_PROMPTS, SANDBOX_SPLIT
from rlhf.base.log import plural
from rlhf.config.deployment import world_size
from rlhf.config.schema import Config, Sandbox, Source
from rlhf.config.stage_graph import is_aligned, is_rl, prompts_per_rollout
from rlhf.config.stage_nodes import Dpo, Rm, Sft

# preference pairs of data sets on the hub, from their cards
HUB_ROWS = {
    "Dahoas/rm-static": 76256,
    "Dahoas/full-hh-rlhf": 112052,
    "Anthropic/hh-rlhf": 160800,
}


def share_of(stage: str) -> str:
    """The share of the data that a stage is trained on: sft, rm or ppo."""
    if stage == "dpo":
        return "rm"
    return "ppo" if is_aligned(stage) else stage


def rows_for_stage(cfg: Config, stage: str) -> int | None:
    """Training rows of a stage, before any is skipped for its length.

    Returns: None where the number is unknown before the data are read.
    """
    share = share_of(stage)
    if cfg.data.sandbox:
        return sandbox_rows(cfg.data.sandbox, cfg.data.eval_rows, share)
    counts = [count_rows(source) for source in cfg.data.sources.values()]
    total = sum(count for count in counts if count is not None)
    if None in counts:
        return None
    part = cfg.data.shares[["sft", "rm", "ppo"].index(share)] / sum(cfg.data.shares)
    return int(total * (1 - cfg.data.eval_share) * part)


def sandbox_rows(sandbox: Sandbox, eval_rows: int, share: str) -> int:
    """Rows of a share of the built-in world (rlhf/data/sandbox/world.py)."""
    if share == "sft":
        return sandbox.demonstrations
    if share == "rm":
        return sandbox.pairs
    training = SANDBOX_PROMPTS - eval_rows
    return training - int(SANDBOX_SPLIT[-1] * training)


def count_rows(source: Source) -> int | None:
    """Rows of a data source; None where it is neither a known data set nor a local .jsonl file."""
    if source.path in HUB_ROWS:
        return HUB_ROWS[source.path]
    path = Path(source.path).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def count_steps(cfg: Config, stage: str) -> tuple[str, int | None, int | None]:
    """How a batch is cut, as text; steps (online algorithms: rollouts); tokens, at most.

    Steps and tokens are None where the number of rows is unknown before the data are read.
    """
    if stage == "eval":
        return "nothing is trained", 0, 0
    online = is_rl(stage)
    rows = rows_for_stage(cfg, stage)
    per_step, epochs, max_steps = schedule(cfg, stage)
    steps = None if rows is None else rows // per_step * epochs
    if max_steps:
        steps = max_steps if steps is None else min(steps, max_steps)
    response = cfg.rollout.max_new_tokens if online else cfg.data.max_response_tokens
    tokens = sequences_per_step(cfg, stage) * (cfg.data.max_prompt_tokens + response)
    return describe_batch(cfg, stage), steps, None if steps is None else steps * tokens


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
        text += f"{rl.epochs} x {rl.minibatches} steps on each rollout"
    return text
