"""The learning-rate schedule."""

from __future__ import annotations

import math

from rlhf.config.choices import Schedule
from rlhf.config.stage_nodes import Optim


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total` (PPO: of a rollout): linear warm-up, then constant, linear or
    cosine decay to `final_lr` * lr, which the last step has where the warm-up leaves it room."""
    warmup = (
        math.ceil(optim.warmup_ratio * total) if optim.warmup_steps is None else optim.warmup_steps
    )
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if optim.schedule == Schedule.constant:
        return optim.lr
    decay = (
        1 - progress
        if optim.schedule == Schedule.linear
        else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    )
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * decay)
