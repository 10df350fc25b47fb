"""Engines with an adapter, and what they compute from one padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import composed
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.config.schema import Config
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy, load_scorer
from rlhf.models.wrappers import Policy, Scorer, model_inputs
from rlhf.training.optimizer_step import optimizer_step

IDS = torch.tensor([[5, 6, 7, 40, 41, 42, 2], [0, 0, 8, 9, 300, 301, 2]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
WANTED = torch.arange(7).expand(2, 7) >= 3


def with_adapter(stage: str, *overrides: str) -> Config:
    node = "reward" if stage == "rm" else "actor"
    return composed(
        f"stage={stage}",
        f"{node}.lora.rank=3",
        f"{node}.lora.alpha=6",
        f"{stage}.lr=1e-2",
        *overrides,
    )


def build(cfg: Config, path: str, tokenizer: Any, run_dir: Path, role: str) -> Any:
    is_scorer = role in ("reward_trained", "critic")
    load = load_scorer if is_scorer else load_policy
    adapter = cfg.reward.lora if is_scorer else cfg.actor.lora
    return build_engine(
        lambda: load(path, tokenizer, Precision.fp32, adapter=adapter), cfg, role, run_dir
    )


def said(policy: Any, ids: Tensor = IDS) -> Tensor:
    """What a policy says of the last 4 tokens: log-probability and entropy, (2, B, 4)."""
    return torch.stack(policy(ids, MASK, WANTED)[:2])[..., -4:]


def output(engine: Any, ids: Tensor = IDS) -> Tensor:
    return said(engine, ids) if isinstance(engine.module, Policy) else engine(ids, MASK)


def logits(module: Policy | Scorer, ids: Tensor = IDS) -> Tensor:
    """What the model itself computes from the padded batch: for the last 4 tokens, or the raw score
    of each row."""
    found = module.hf(**model_inputs(module.hf, ids, MASK)).logits
    return found[:, -5:-1] if isinstance(module, Policy) else found


def update(engine: Any, steps: int = 2, ids: Tensor = IDS) -> None:
    engine.train()
    for _ in range(steps):
        optimizer_step(engine, [lambda: (output(engine, ids).float() ** 2).sum()], 1e-2)
    engine.eval()
