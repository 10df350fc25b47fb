"""Evaluations on held-out prompts before, during and after online RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.base.log import log
from rlhf.config.schema import Config
from rlhf.config.stage_nodes import EvalSampling
from rlhf.data.records import Dataset, Prompt
from rlhf.evaluation.policy import PolicyEvaluation, before_and_after, evaluate_policy
from rlhf.models.loading import save_engine
from rlhf.rl.experience import Experience, Models
from rlhf.sampling.token_choice import Sampling


@dataclass
class Evaluations:
    """Evaluations on held-out prompts; model_best/ is the best policy so far."""

    cfg: Config
    data: Dataset
    models: Models
    run_dir: Path
    best: float = -float("inf")
    start: dict[str, float] = field(default_factory=dict)  # metrics before training
    start_samples: list[dict[str, Any]] = field(default_factory=list)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after rollout `step`; the last one is evaluated at the end anyway."""
        every = self.cfg.rl.evaluation.every
        return bool(every) and step % (every or 1) == 0 and step < steps

    def evaluate(self, step: int) -> PolicyEvaluation:
        """Metrics and samples of the present policy, which is saved where it is the best so far.

        With top-p or top-k there is no KL, and no objective.
        """
        cfg, settings = self.cfg, self.cfg.rl.evaluation
        measured, samples = evaluate_policy(
            self.models if is_full_distribution(settings) else replace(self.models, ref=None),
            self.data,
            cfg.data.max_prompt_tokens,
            cfg.rollout.max_new_tokens,
            Sampling(settings.temperature, settings.top_p, settings.top_k),
            cfg.deploy.eval_micro_batch,
        )
        # by the first KL coefficient, not the current one, so that evaluations can be compared
        if {"score", "kl"} <= measured.keys():  # some source applies
            measured["objective"] = measured["score"] - cfg.rl.kl.coef * measured["kl"]
        if settings.every and measured.get(settings.best_by.name, -math.inf) > self.best:
            self.best = measured[settings.best_by.name]
            log.info(f"rollout {step}: best {settings.best_by.name} so far, {self.best:.3f}")
            save_engine(self.models.actor, self.models.tokenizer, self.run_dir / "model_best")
        return measured, samples

    def remember_start(self) -> None:
        """Evaluate before training."""
        self.start, self.start_samples = self.evaluate(0)

    def compare(self, step: int) -> PolicyEvaluation:
        """Evaluate after training, and put it beside the start."""
        return before_and_after((self.start, self.start_samples), self.evaluate(step))

    def gold_metrics(self, experience: Experience, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Gold rewards of a rollout, where the ground truth is known."""
        if not self.data.gold:
            return {}
        texts = [experience.text(row, self.models.tokenizer) for row in range(len(prompts))]
        gold = [self.data.gold(prompt.turns, text) for prompt, text in zip(prompts, texts)]
        return {"reward/gold/mean": float(np.mean(gold)), "reward/gold/std": float(np.std(gold))}

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_by": self.cfg.rl.evaluation.best_by.name,
            "start": self.start,
            "start_samples": self.start_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.start_samples = state["start"], state["start_samples"]
        now = self.cfg.rl.evaluation.best_by.name
        before = state.get("best_by", now)
        if before == now:
            self.best = state["best"]
        else:  # the two have no common unit
            log.info(f"rl.evaluation.best_by={now}, before {before}: model_best/ begins anew")


def is_full_distribution(sampling: EvalSampling) -> bool:
    """Whether the full distribution is sampled; else the mean log-ratio estimates no KL."""
    return sampling.top_p == 1 and sampling.top_k == 0
