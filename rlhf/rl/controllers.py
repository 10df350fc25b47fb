"""What PPO, RLOO and GRPO remember from rollout to rollout: the KL coefficient, the scale of the scores, the average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import Kl, KlController
from rlhf.distributed import collectives


class KlCoefficient:
    """beta, the weight of the KL penalty, score units per nat.

    fixed     kl.coef
    linear    from kl.coef at the first of `steps` rollouts to kl.final_coef at the last
    adaptive  after each rollout beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * answers / horizon (Ziegler 2019, arXiv:1909.08593,
              section 2.2); KL in nats per answer, the sum over its tokens
    """

    def __init__(self, kl: Kl, steps: int):
        self.kl, self.steps = kl, steps
        self.value, self.rollouts = kl.coef, 0

    def update(self, kl: float, answers: int) -> None:
        """After a rollout of `answers` answers whose mean KL was `kl` nats per answer."""
        self.rollouts += 1
        if self.kl.controller == KlController.linear:
            progress = min(1.0, self.rollouts / max(1, self.steps - 1))
            self.value = self.kl.coef + (self.kl.final_coef - self.kl.coef) * progress
        elif self.kl.controller == KlController.adaptive:
            error = min(0.2, max(-0.2, kl / self.kl.target - 1))
            self.value *= 1 + error * answers / self.kl.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.rollouts = state["value"], state["rollouts"]


class RunningScale:
    """Mean and variance of all scores so far, merged batch by batch (Chan 1979, "Updating formulae and a pairwise algorithm"), and
    scores divided by that standard deviation; their mean is left, the advantages are whitened anyway (Zheng 2023, "Secrets of RLHF",
    arXiv:2307.04964). Every process sees all scores, so all have the same numbers."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def __call__(self, score: Tensor) -> Tensor:
        """Take the scores (B,) into account, then divide them by the standard deviation of all so far, where they have any."""
        batch = score.double()
        n, mean = len(batch), float(batch.mean())
        delta, total = mean - self.mean, self.count + n
        self.m2 += float(((batch - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        return (
            score / self.std if self.std > 1e-6 * abs(self.mean) else score
        )  # else they differ by rounding only

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


class MovingAverage:
    """Exponential moving average of a policy's trained weights, in fp32: a bf16 average would lose every step smaller than its last
    digit. Where ZeRO-3 partitions the weights, each process averages its own part; else the first process alone keeps the average.

    ema <- decay * ema + (1 - decay) * weight, after each optimizer step (InstructGPT, arXiv:2203.02155, appendix C: 0.992).
    """

    def __init__(self, engine: Any, decay: float):
        self.decay = decay
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        self.parts = [
            p.ds_tensor if hasattr(p, "ds_id") else p
            for p in trained
            if hasattr(p, "ds_id") or collectives.rank() == 0
        ]
        self.average = [part.detach().float().clone() for part in self.parts]

    @torch.no_grad()
    def update(self) -> None:
        for average, part in zip(self.average, self.parts):
            average.lerp_(part.detach().float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the average stands where the weights are, in their precision; all processes enter it together."""
        weights = [part.detach().clone() for part in self.parts]
        try:
            self.put(self.average)
            yield
        finally:
            self.put(weights)

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        for part, value in zip(self.parts, values):
            part.data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self.average, state["average"]):
            average.copy_(saved)
