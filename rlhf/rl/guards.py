"""What must hold while PPO, RLOO or GRPO runs. `check_*` stop a run whose arithmetic is broken, with the cause and the likely fix;
`Watch` warns of training that goes wrong although the arithmetic is right. All of it costs some forwards of 4 rows per run and some
comparisons.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.config.schema import DsChat, Precision
from rlhf.distributed import collectives
from rlhf.rl.experience import Experience, policy_logprobs
from rlhf.runs.log import log

# how far two computations of the same log-probability may differ: mean, maximum over tokens; nats. Below fp32 the maximum is
# reported only: one token of many may lie on an edge of the number format
TOLERANCE = {p: (1e-4, 1e-3) if p == Precision.fp32 else (0.05, math.inf) for p in Precision}


class Guards:
    """Checks of one run.

    Args: precision: of the models.  switches: a check that one of them contradicts is logged instead of stopping the run.
        temperature: of the rollouts; one below 1 enlarges the logits, and their rounding with them.
    """

    def __init__(self, precision: Precision, switches: DsChat, temperature: float = 1.0):
        self.precision, self.switches = precision, switches
        self.limit, self.limit_worst = (
            limit / min(1.0, temperature) for limit in TOLERANCE[precision]
        )
        self.logged: set[str] = set()
        self.measured: dict[str, tuple[float, float]] = {}

    def require(self, name: str, ok: bool, line: str, because: str = "") -> None:
        """Raises: RuntimeError with the line, unless it is fine; where a chosen switch is the reason, it is logged, once."""
        if ok or (because and name in self.logged):
            return
        if not because:
            raise RuntimeError(f"guard {name}: {line}")
        self.logged.add(name)
        if collectives.rank() == 0:
            log.warning(f"guard {name}: {line}. Chosen by {because}: the run goes on")

    def switch(self, *names: str) -> str:
        """Those of the switches that are on, as the user set them."""
        return ", ".join(f"ppo.dschat.{name}" for name in names if getattr(self.switches, name))

    def rounding(self, first: bool) -> str:
        """What excuses a difference after the first rollout, when logits may have become large."""
        return (
            f"deploy.precision={self.precision.name}"
            if not first and self.precision != Precision.fp32
            else ""
        )

    def measure(self, name: str, one: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and maximum of |one - other|; the largest of each are reported."""
        found, before = logprob_difference(one, other, mask), self.measured.get(name, (0.0, 0.0))
        self.measured[name] = max(before[0], found[0]), max(before[1], found[1])
        return found

    def check_models(self, **engines: Any) -> None:
        """Dropout is off in all models: with it the ratio of the first update is not 1, and KL and values are noise."""
        for role, engine in engines.items():
            on = [
                name
                for name, module in engine.module.named_modules()
                if isinstance(module, nn.Dropout) and module.p > 0
            ]
            on += [
                f"config.{key}"
                for key, value in engine.module.hf.config.to_dict().items()
                if "drop" in key and value
            ]
            line = f"the {role} has dropout ({', '.join(on[:3])}): load it with rlhf.models, which switches it off"
            self.require("dropout", not on, line, self.switch("dropout"))

    def check_rollout(self, e: Experience, eos_id: int, first: bool = True) -> None:
        """Masks say what was sampled, everything is finite, and the sampling loop saw the same policy as the training forward; after
        the first rollout a policy with large logits may lie outside the limit of its number format, which is logged."""
        for name in ("sampler_logp", "old_logp", "ref_logp", "old_values", "scores"):
            broken = int((~torch.isfinite(getattr(e, name))).sum())
            line = f"{name} is not finite in {broken} places: lower the learning rate, or set deploy.precision=fp32"
            self.require("finite", not broken, line)
        lengths = e.mask.sum(1)
        ragged = bool((e.mask[:, 1:] > e.mask[:, :-1]).any()) or bool((lengths == 0).any())
        self.require(
            "mask",
            not ragged,
            "a response mask has a hole, or no token: masks must come from the sampling loop",
        )
        is_eos = (e.response_ids == eos_id) & (e.mask > 0)
        last = torch.arange(e.mask.shape[1], device=e.mask.device) == lengths[:, None] - 1
        misplaced = int((is_eos != (last & (e.ended[:, None] > 0))).any(1).sum())
        line = f"in {misplaced} answers the mask does not end at the first EOS: lengths, masks and ids do not belong together"
        self.require("length", not misplaced, line)
        unlearnt = int((is_eos & (e.learnt == 0)).any(1).sum())
        line = f"the EOS of {unlearnt} answers is outside the mask of the loss: the policy cannot learn when to stop"
        self.require("eos", not unlearnt, line, self.switch("pad_is_eos"))
        mean, worst = self.measure("sampler", e.sampler_logp, e.old_logp, e.mask)
        line = f"the sampling loop and the training forward disagree: {describe_gap(mean, worst)}, allowed {self.limit:g}: "
        line += "cache, positions, masks or temperature of one of them are wrong"
        fine = mean <= self.limit and worst <= self.limit_worst
        self.require(
            "sampler",
            fine,
            line,
            self.switch("train_mode_logp", "pad_is_eos") or self.rounding(first),
        )

    def check_start(self, e: Experience) -> None:
        """Before its first update the policy is its reference: KL = 0."""
        mean, worst = self.measured["reference"] = logprob_difference(
            e.old_logp, e.ref_logp, e.mask
        )
        line = f"policy and reference differ before the first update: {describe_gap(mean, worst)}: "
        line += "they were not loaded from the same weights, or one of them has dropout on"
        self.require("reference", mean <= self.limit, line, self.switch("train_mode_logp"))

    def check_ratio(self, logp: Tensor, old_logp: Tensor, mask: Tensor, first: bool = True) -> None:
        """At the first minibatch of a rollout the ratio is 1; after the first rollout, as with the sampling loop, up to rounding."""
        mean, worst = self.measure("ratio", logp, old_logp, mask)
        line = f"the ratio of the first update is not 1: {describe_gap(mean, worst)}: old log-probabilities come from another forward than the one "
        line += "that trains (dropout, precision, temperature, padding)"
        self.require(
            "ratio",
            mean <= self.limit,
            line,
            self.switch("dropout", "train_mode_logp") or self.rounding(first),
        )

    def check_padding(self, actor: Any, e: Experience, temperature: float, pad_id: int) -> None:
        """Neither padding on both sides of some answers nor other answers beside them change their log-probabilities. One forward of at
        most 4 rows, and one of each."""
        index = e.full_mask.sum(1).argsort()[:4].tolist()
        some, n = e.rows(index), e.rows(index).mask.shape[1]
        front = {
            "prompt_ids": F.pad(some.prompt_ids, (3, 0), value=pad_id),
            "prompt_mask": F.pad(some.prompt_mask, (3, 0)),
        }
        behind = {
            "response_ids": F.pad(some.response_ids, (0, 2), value=pad_id),
            "mask": F.pad(some.mask, (0, 2)),
        }
        wide = replace(some, **front, **behind)
        alone = [policy_logprobs(actor, e.rows([i]), temperature)[0] for i in index]
        plain = torch.stack([F.pad(row, (0, n - len(row))) for row in alone])
        mean, worst = self.measure(
            "padding", policy_logprobs(actor, wide, temperature)[:, :n], plain, some.mask
        )
        line = f"padding or other answers change log-probabilities: {describe_gap(mean, worst)}: this architecture ignores its mask or position ids"
        self.require("padding", mean <= self.limit, line)

    def report(self) -> None:
        """Say what was measured."""
        parts = [
            f"{name} {mean:.1g} / {worst:.1g}" for name, (mean, worst) in self.measured.items()
        ]
        log.info(f"guards: log-probabilities differ by (mean / maximum, nats) {', '.join(parts)}")


def describe_gap(mean: float, worst: float) -> str:
    return f"mean {mean:.2g}, maximum {worst:.2g} nats"


def logprob_difference(one: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and maximum of |one - other| over the tokens under the mask, of all processes. Shapes (b, R)."""
    apart = (one.float() - other.float()).abs() * mask
    total, tokens = collectives.all_reduce_sum([float(apart.sum()), float(mask.sum())], mask.device)
    return total / max(tokens, 1.0), collectives.all_reduce_max(float(apart.max()), mask.device)
