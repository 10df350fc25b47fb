"""What must hold while PPO, RLOO or GRPO runs. `check_*` stop a run whose arithmetic is broken, with the cause and the likely fix;
`Watch` warns of training that goes wrong although the arithmetic is right. All of it costs some forwards of 4 rows per run and some
comparisons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf import comm
from rlhf.config import DsChat, Precision
from rlhf.rollout import Experience, response_logp
from rlhf.track import log

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
        self.limit, self.limit_worst = (limit / min(1.0, temperature) for limit in TOLERANCE[precision])
        self.logged: set[str] = set()
        self.measured: dict[str, tuple[float, float]] = {}

    def require(self, name: str, ok: bool, line: str, because: str = "") -> None:
        """Raises: RuntimeError with the line, unless it is fine; where a chosen switch is the reason, it is logged, once."""
        if ok or (because and name in self.logged):
            return
        if not because:
            raise RuntimeError(f"guard {name}: {line}")
        self.logged.add(name)
        if comm.rank() == 0:
            log.warning(f"guard {name}: {line}. Chosen by {because}: the run goes on")

    def switch(self, *names: str) -> str:
        """Those of the switches that are on, as the user set them."""
        return ", ".join(f"ppo.dschat.{name}" for name in names if getattr(self.switches, name))

    def rounding(self, first: bool) -> str:
        """What excuses a difference after the first rollout, when logits may have become large."""
        return f"deploy.precision={self.precision.name}" if not first and self.precision != Precision.fp32 else ""

    def measure(self, name: str, one: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and maximum of |one - other|; the largest of each are reported."""
        found, before = difference(one, other, mask), self.measured.get(name, (0.0, 0.0))
        self.measured[name] = max(before[0], found[0]), max(before[1], found[1])
        return found

    def check_models(self, **engines: Any) -> None:
        """Dropout is off in all models: with it the ratio of the first update is not 1, and KL and values are noise."""
        for role, engine in engines.items():
            on = [name for name, module in engine.module.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
            on += [f"config.{key}" for key, value in engine.module.hf.config.to_dict().items() if "drop" in key and value]
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
        self.require("mask", not ragged, "a response mask has a hole, or no token: masks must come from the sampling loop")
        is_eos = (e.response_ids == eos_id) & (e.mask > 0)
        last = torch.arange(e.mask.shape[1], device=e.mask.device) == lengths[:, None] - 1
        misplaced = int((is_eos != (last & (e.ended[:, None] > 0))).any(1).sum())
        line = f"in {misplaced} answers the mask does not end at the first EOS: lengths, masks and ids do not belong together"
        self.require("length", not misplaced, line)
        unlearnt = int((is_eos & (e.learnt == 0)).any(1).sum())
        line = f"the EOS of {unlearnt} answers is outside the mask of the loss: the policy cannot learn when to stop"
        self.require("eos", not unlearnt, line, self.switch("pad_is_eos"))
        mean, worst = self.measure("sampler", e.sampler_logp, e.old_logp, e.mask)
        line = f"the sampling loop and the training forward disagree: {gap(mean, worst)}, allowed {self.limit:g}: "
        line += "cache, positions, masks or temperature of one of them are wrong"
        fine = mean <= self.limit and worst <= self.limit_worst
        self.require("sampler", fine, line, self.switch("train_mode_logp", "pad_is_eos") or self.rounding(first))

    def check_start(self, e: Experience) -> None:
        """Before its first update the policy is its reference: KL = 0."""
        mean, worst = self.measured["reference"] = difference(e.old_logp, e.ref_logp, e.mask)
        line = f"policy and reference differ before the first update: {gap(mean, worst)}: "
        line += "they were not loaded from the same weights, or one of them has dropout on"
        self.require("reference", mean <= self.limit, line, self.switch("train_mode_logp"))

    def check_ratio(self, logp: Tensor, old_logp: Tensor, mask: Tensor, first: bool = True) -> None:
        """At the first minibatch of a rollout the ratio is 1; after the first rollout, as with the sampling loop, up to rounding."""
        mean, worst = self.measure("ratio", logp, old_logp, mask)
        line = f"the ratio of the first update is not 1: {gap(mean, worst)}: old log-probabilities come from another forward than the one "
        line += "that trains (dropout, precision, temperature, padding)"
        self.require("ratio", mean <= self.limit, line, self.switch("dropout", "train_mode_logp") or self.rounding(first))

    def check_padding(self, actor: Any, e: Experience, temperature: float, pad_id: int) -> None:
        """Neither padding on both sides of some answers nor other answers beside them change their log-probabilities. One forward of at
        most 4 rows, and one of each."""
        index = e.full_mask.sum(1).argsort()[:4].tolist()
        some, n = e.rows(index), e.rows(index).mask.shape[1]
        front = {"prompt_ids": F.pad(some.prompt_ids, (3, 0), value=pad_id), "prompt_mask": F.pad(some.prompt_mask, (3, 0))}
        behind = {"response_ids": F.pad(some.response_ids, (0, 2), value=pad_id), "mask": F.pad(some.mask, (0, 2))}
        wide = replace(some, **front, **behind)
        alone = [response_logp(actor, e.rows([i]), temperature)[0] for i in index]
        plain = torch.stack([F.pad(row, (0, n - len(row))) for row in alone])
        mean, worst = self.measure("padding", response_logp(actor, wide, temperature)[:, :n], plain, some.mask)
        line = f"padding or other answers change log-probabilities: {gap(mean, worst)}: this architecture ignores its mask or position ids"
        self.require("padding", mean <= self.limit, line)

    def report(self) -> None:
        """Say what was measured."""
        parts = [f"{name} {mean:.1g} / {worst:.1g}" for name, (mean, worst) in self.measured.items()]
        log.info(f"guards: log-probabilities differ by (mean / maximum, nats) {', '.join(parts)}")


def gap(mean: float, worst: float) -> str:
    return f"mean {mean:.2g}, maximum {worst:.2g} nats"


def difference(one: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and maximum of |one - other| over the tokens under the mask, of all processes. Shapes (b, R)."""
    apart = (one.float() - other.float()).abs() * mask
    total, tokens = comm.all_sum([float(apart.sum()), float(mask.sum())], mask.device)
    return total / max(tokens, 1.0), comm.all_max(float(apart.max()), mask.device)


# --------------------------------------------------------------------------------------------------------------- while it trains


class Watch:
    """Looks at the metrics of each rollout and says what goes wrong, each kind once per run, through alert(title, text). `stage` names the
    keys that mend it."""

    def __init__(self, alert: Callable[[str, str], None], stage: str = "ppo"):
        self.alert, self.stage = alert, stage
        self.rows: list[dict[str, float]] = []
        self.said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "said": sorted(self.said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.said = list(state["rows"]), set(state["said"])

    def look(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        for title, text in warnings_of(self.rows, self.stage):
            if title not in self.said:
                self.said.add(title)
                self.alert(title, text)


def warnings_of(rows: Sequence[dict[str, float]], stage: str = "ppo") -> list[tuple[str, str]]:
    """What is wrong at the end of a run's metrics so far: pairs of a title and what to do about it.

    KL blow-up           above 1 nat per token, or above 4 x the median of the 8 rollouts before and above 5 nats per answer
    entropy collapse     policy/entropy_avg below a tenth of its first value
    critic               val/explained_variance below 0 in each of the last 10 rollouts
    truncation           no answer of a rollout ended
    over-optimisation    over the last 16 rollouts the score rose by more than 0.1, and score - beta KL fell by more than 0.1 (means of
                         halves)
    """
    now, found = rows[-1], []
    kl, before = now["objective/kl"], [row["objective/kl"] for row in rows[-9:-1]]
    usual = statistics.median(before) if before else 0.0
    if now["objective/kl_per_token"] > 1 or (len(before) == 8 and kl > max(5.0, 4 * usual)):
        found.append(
            ("KL blow-up", f"objective/kl is {kl:.1f} nats per answer, before {usual:.1f}: raise {stage}.kl.coef or lower {stage}.lr")
        )
    entropies = [row["policy/entropy_avg"] for row in rows if "policy/entropy_avg" in row]
    if entropies and entropies[-1] < 0.1 * entropies[0]:
        text = f"policy/entropy_avg fell from {entropies[0]:.3g} to {entropies[-1]:.3g} nats per token: answers repeat themselves; "
        found.append(("entropy collapse", text + f"raise {stage}.kl.coef or {stage}.entropy_coef, or lower {stage}.lr"))
    if len(rows) >= 10 and all(row.get("val/explained_variance", 0) < 0 for row in rows[-10:]):
        text = "val/explained_variance was below 0 in the last 10 rollouts: the critic is worse than a constant; "
        found.append(("critic broken", text + "raise ppo.critic_optim.lr or ppo.value_clip, or give it ppo.critic_warmup"))
    if now["objective/eos_rate"] == 0:
        text = "no answer of the rollout ended: raise rollout.max_new_tokens, or the penalties "
        text += f"{stage}.missing_eos_penalty, {stage}.length_penalty"
        found.append(("all answers truncated", text))
    if len(rows) >= 16:
        halves, beta = (rows[-16:-8], rows[-8:]), now["objective/kl_coef"]
        score, score_now = (statistics.fmean(row["objective/scores"] for row in half) for half in halves)
        kl, kl_now = (statistics.fmean(row["objective/kl"] for row in half) for half in halves)
        objective, objective_now = score - beta * kl, score_now - beta * kl_now
        if score_now > score + 0.1 and objective_now < objective - 0.1:
            text = f"score {score:.2f} to {score_now:.2f}, but score - beta KL {objective:.2f} to {objective_now:.2f}: "
            found.append(("over-optimisation", text + f"raise {stage}.kl.coef, lower {stage}.lr, or stop here"))
    return found
