"""Rows, optimizer steps and tokens of a stage."""

from __future__ import annotations

import math
from pathlib import Path

from rlhf.config.constants import SANDBOX_PROMPTS, SANDBOX_SPLIT
from rlhf.config.deployment import world_size
from rlhf.config.schema import ALIGNMENT, ONLINE, Config, Sandbox, Source, Stage
from rlhf.runs.log import plural

# preference pairs of data sets on the hub, from their cards
HUB_ROWS = {
    "Dahoas/rm-static": 76256,
    "Dahoas/full-hh-rlhf": 112052,
    "Anthropic/hh-rlhf": 160800,
}


def share_of(stage: Stage) -> str:
    """The share of the data that a stage is trained on: sft, rm or ppo."""
    if stage == Stage.dpo:
        return "rm"
    return "ppo" if stage in ALIGNMENT else stage.name


def rows_for_stage(cfg: Config, stage: Stage) -> int | None:
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


def count_steps(cfg: Config, stage: Stage) -> tuple[str, int | None, int | None]:
    """How a batch is cut, as text; steps (online algorithms: rollouts); tokens, at most.

    Steps and tokens are None where the number of rows is unknown before the data are read.
    """
    if stage == Stage.eval:
        return "nothing is trained", 0, 0
    settings = getattr(cfg, stage.name)
    online = stage in ONLINE
    rows = rows_for_stage(cfg, stage)
    epochs = settings.prompt_epochs if online else settings.epochs
    steps = None if rows is None else rows // settings.batch_size * epochs
    if settings.max_steps:
        steps = settings.max_steps if steps is None else min(steps, settings.max_steps)
    response = cfg.rollout.max_new_tokens if online else cfg.data.max_response_tokens
    tokens = sequences_per_step(cfg, stage) * (cfg.data.max_prompt_tokens + response)
    return describe_batch(cfg, stage), steps, None if steps is None else steps * tokens


def sequences_per_step(cfg: Config, stage: Stage) -> int:
    """Sequences of an optimizer step, or of a rollout of the online algorithms."""
    settings = getattr(cfg, stage.name)
    if stage in ONLINE:
        return settings.batch_size * settings.responses_per_prompt
    return settings.batch_size * (2 if stage in (Stage.rm, Stage.dpo) else 1)


def describe_batch(cfg: Config, stage: Stage) -> str:
    """How the rows of an optimizer step are cut into forward passes, as text."""
    settings, world = getattr(cfg, stage.name), world_size(cfg)
    what = "pairs" if stage in (Stage.rm, Stage.dpo) else "demonstrations"
    per_step = settings.batch_size
    if stage in ONLINE:
        what = "responses"
        per_step = settings.responses_per_prompt * settings.batch_size // settings.minibatches
    passes = math.ceil(per_step / world / cfg.deploy.micro_batch)
    rows = min(cfg.deploy.micro_batch, max(1, per_step // world))
    text = (
        f"{per_step} {what} per optimizer step = {plural(world, 'process', 'es')} x "
        f"{plural(passes, 'forward pass', 'es')} of {rows}"
    )
    if stage in ONLINE:
        text += f"; {settings.batch_size} prompts per rollout, "
        if settings.responses_per_prompt > 1:
            text += f"{settings.responses_per_prompt} responses per prompt, "
        text += f"{settings.epochs} x {settings.minibatches} steps on each rollout"
    return text
