"""The learning-rate schedule."""

from __future__ import annotations

import math

from rlhf.config.choices import Schedule
from rlhf.config.stage_nodes import Optim


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Learning rate of one step: linear warm-up, then constant, or linear or cosine decay.

    A decay ends at final_lr * lr at the last step, if the warm-up ends before it.

    Args: step: optimizer step (RL: rollout), from 0.  total: number of them in the run.
    """
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if optim.schedule == Schedule.constant:
        return optim.lr
    if optim.schedule == Schedule.linear:
        decay = 1 - progress
    else:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * decay)
