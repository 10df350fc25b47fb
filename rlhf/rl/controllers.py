"""What online RL remembers between rollouts: KL coefficient, score scale, average weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.config.choices import KlController
from rlhf.config.stage_nodes import Kl
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine
from rlhf.models.wrappers import Policy


class KlCoefficient:
    """The weight of the KL penalty, score units per nat.

    fixed     kl.coef
    linear    from kl.coef at the first of `steps` rollouts to kl.final_coef at the last
    adaptive  after each rollout coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon;
              KL in nats per response, the sum over its tokens (Ziegler 2019, arXiv:1909.08593,
              section 2.2)
    """

    def __init__(self, kl: Kl, steps: int):
        self.kl, self.steps = kl, steps
        self.value, self.rollouts = kl.coef, 0

    def update(self, kl: float, responses: int) -> None:
        """After a rollout of `responses` responses whose mean KL was `kl` nats per response."""
        self.rollouts += 1
        if self.kl.controller == KlController.linear:
            progress = min(1.0, self.rollouts / max(1, self.steps - 1))
            self.value = self.kl.coef + (self.kl.final_coef - self.kl.coef) * progress
        elif self.kl.controller == KlController.adaptive:
            error = min(0.2, max(-0.2, kl / self.kl.target - 1))
            self.value *= 1 + error * responses / self.kl.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.rollouts = state["value"], int(state["rollouts"])


class RunningScale:
    """Divides scores by the standard deviation of all scores so far.

    Mean and variance are merged batch by batch (Chan 1979, "Updating formulae and a pairwise
    algorithm"). The mean is kept: advantages are centred anyway (Zheng 2023, "Secrets of RLHF",
    arXiv:2307.04964). Every rank sees all scores, so all have the same numbers.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def __call__(self, score: Tensor) -> Tensor:
        """Add the scores (B,) to the statistics, then divide them, unless all are equal.

        NaN, no score, is not counted.
        """
        batch = score[~score.isnan()].double()
        if not len(batch):
            return score
        n, mean = len(batch), float(batch.mean())
        delta, total = mean - self.mean, self.count + n
        self.m2 += float(((batch - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        by_rounding_only = self.std <= 1e-6 * abs(self.mean)
        return score if by_rounding_only else score / self.std

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


class MovingAverage:
    """Exponential moving average of a policy's trained weights, in fp32.

    ema <- decay * ema + (1 - decay) * weight, after each optimizer step (InstructGPT,
    arXiv:2203.02155, appendix C: 0.992). A bf16 average would lose every step smaller than its last
    digit. Where ZeRO-3 partitions the weights, each rank averages its own partition; else the first
    rank alone keeps the average.
    """

    def __init__(self, engine: Engine[Policy], decay: float):
        self.decay = decay
        self.weights = []
        for p in engine.module.parameters():
            if p.requires_grad and hasattr(p, "ds_id"):
                self.weights.append(getattr(p, "ds_tensor"))  # noqa: B009  DeepSpeed's own
            elif p.requires_grad and collectives.rank() == 0:
                self.weights.append(p)
        self.average = [weight.detach().float().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take one optimizer step into account."""
        for average, weight in zip(self.average, self.weights):
            average.lerp_(weight.detach().float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in place of the weights, in their precision; all ranks enter together."""
        trained = [weight.detach().clone() for weight in self.weights]
        try:
            self._overwrite(self.average)
            yield
        finally:
            self._overwrite(trained)

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values):
            weight.data.copy_(value)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for average, saved in zip(self.average, state["average"]):
            average.copy_(saved)
