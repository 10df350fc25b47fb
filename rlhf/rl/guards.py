"""Invariants of online training: `Guards.check_*` stop a run whose arithmetic is broken.

The message names the cause and the likely fix. Training that goes wrong although the arithmetic is
right is rl/monitor.py's. Costs: some forward passes of 4 rows per run, and comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.base.log import log
from rlhf.config.choices import Precision
from rlhf.config.stage_nodes import DsChat
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine
from rlhf.models.lora import AdapterOff
from rlhf.models.wrappers import Policy
from rlhf.rl.experience import Experience, Models, policy_logprobs

# How far two computations of the same log-prob may differ: mean, maximum over tokens; nats. Below
# fp32 the maximum is reported only: one token of many may lie on an edge of the number format.
TOLERANCE = {p: (1e-4, 1e-3) if p == Precision.fp32 else (0.05, math.inf) for p in Precision}
# Below fp32 the sampling loop rounds unlike the training forward pass, by how much depends on the
# weights. Beyond the tolerance it is logged; the run stops beyond this mean, nats. Not yet compared
# with what kernels of GPUs do.
SAMPLER_LIMIT = 0.2
OF_OUR_LOOP = "cache, positions, masks or temperature of one of them are wrong"
OF_ANOTHER_PROGRAM = (
    "rollout.engine samples from other weights, in another precision or temperature (vLLM: "
    "--dtype, --logprobs-mode processed_logprobs); rollout.engine=native shows whether it is that"
)
MEASURED = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values")


class Guards:
    """Checks of one run.

    Args:
        precision: of the models.
        switches: a check that one of them contradicts is logged instead of stopping the run.
        temperature: of the rollouts; below 1 it enlarges the logits, and with them their rounding.
        foreign_sampler: another program samples, whose differences are corrected.
    """

    def __init__(
        self,
        precision: Precision,
        switches: DsChat,
        temperature: float = 1.0,
        foreign_sampler: bool = False,
    ):
        self.foreign_sampler = foreign_sampler
        self.precision, self.switches = precision, switches
        mean, maximum = TOLERANCE[precision]
        self.mean_limit, self.max_limit = (
            mean / min(1.0, temperature),
            maximum / min(1.0, temperature),
        )
        self.sampler_limit = SAMPLER_LIMIT / min(1.0, temperature)
        self.logged: set[str] = set()
        self.measured: dict[str, tuple[float, float]] = {}

    def check(self, name: str, ok: bool, line: str, waived_by: str = "") -> None:
        """Raises: RuntimeError with the line, unless it is ok. Where a setting explains the
        failure (`waived_by`), it is logged instead, once."""
        if ok or (waived_by and name in self.logged):
            return
        if not waived_by:
            raise RuntimeError(f"guard {name}: {line}")
        self.logged.add(name)
        if collectives.rank() == 0:
            log.warning(f"guard {name}: {line}. Expected with {waived_by}: the run continues")

    def pad_is_eos(self) -> str:
        """What explains a mask that is guessed from ids."""
        return "rl.dschat.pad_is_eos" if self.switches.pad_is_eos else ""

    def rounding(self, must_hold: bool) -> str:
        """What explains a difference that need not stop the run."""
        low = not must_hold and self.precision != Precision.fp32
        return f"deploy.precision={self.precision.name}" if low else ""

    def measure(self, name: str, one: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and maximum of |one - other|; the largest of each are reported."""
        gap, before = logprob_difference(one, other, mask), self.measured.get(name, (0.0, 0.0))
        self.measured[name] = max(before[0], gap[0]), max(before[1], gap[1])
        return gap

    def check_models(self, models: Models) -> None:
        """Dropout is off: with it the first ratio is not 1, and KL and values are noise."""
        engines = {"actor": models.actor, "critic": models.critic, "reference": models.ref}
        for role, engine in engines.items():
            if engine is None or isinstance(engine, AdapterOff):
                continue
            module = engine.module
            on = [n for n, m in module.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
            settings = module.hf.config.to_dict().items()
            on += [f"config.{key}" for key, value in settings if "drop" in key and value]
            line = f"the {role} has dropout ({', '.join(on[:3])}): load it with rlhf.models"
            self.check("dropout", not on, line)

    def check_rollout(
        self, e: Experience, eos_id: int, first: bool = True, functions: Sequence[int] = ()
    ) -> None:
        """Masks match what was sampled, everything is finite, and the sampling loop computed the
        same policy as the training forward pass.

        After the first rollout a policy with large logits may lie outside the limit of its number
        format, which is logged.

        Args: functions: columns of the scores that may be NaN: those of functions, which need not
            apply to a response.
        """
        measured = {name: getattr(e, name) for name in MEASURED}
        of_models = [k for k in range(e.scores.shape[1]) if k not in functions]
        measured["scores"] = e.scores[:, of_models]
        for name, values in measured.items():
            broken = int((~torch.isfinite(values)).sum())
            line = f"{name} is not finite in {broken} places: lower rl.lr, or set "
            self.check("finite", not broken, line + "deploy.precision=fp32")
        mask = e.response_mask
        lengths = mask.sum(1)
        ragged = bool((mask[:, 1:] > mask[:, :-1]).any()) or bool((lengths == 0).any())
        line = "a response mask has a hole, or no token: masks must come from the sampling loop"
        self.check("mask", not ragged, line)
        is_eos = (e.response_ids == eos_id) & (mask > 0)
        last = torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1
        misplaced = int((is_eos != (last & (e.finished[:, None] > 0))).any(1).sum())
        line = f"in {misplaced} responses the mask does not end at the first EOS: lengths, masks "
        self.check("length", not misplaced, line + "and ids do not belong together")
        outside = int((is_eos & (e.loss_mask == 0)).any(1).sum())
        line = f"the EOS of {outside} responses is not in the loss: the policy cannot learn to stop"
        self.check("eos", not outside, line, self.pad_is_eos())
        self.check_sampler(e, first)

    def check_sampler(self, e: Experience, first: bool) -> None:
        """The sampling loop computed the same policy as the training forward pass."""
        mean, worst = self.measure("sampler", e.sampler_logprobs, e.old_logprobs, e.response_mask)
        limit, waived_by, cause = self.mean_limit, "", OF_OUR_LOOP
        if self.foreign_sampler:  # its differences are corrected, up to a limit
            limit, cause = self.sampler_limit, OF_ANOTHER_PROGRAM
            holds = mean <= limit
        else:
            holds = mean <= limit and worst <= self.max_limit
            if self.precision != Precision.fp32 and first and mean > self.sampler_limit:
                limit = self.sampler_limit
            else:
                waived_by = self.rounding(False)  # by nothing in fp32
        line = (
            "the sampling loop and the training forward pass disagree: "
            f"{describe_gap(mean, worst)}, allowed {limit:g}: {cause}"
        )
        self.check("sampler", holds, line, self.pad_is_eos() or waived_by)

    def check_start(self, e: Experience) -> None:
        """Before its first update the policy is its reference: KL = 0."""
        gap = logprob_difference(e.old_logprobs, e.ref_logprobs, e.response_mask)
        self.measured["reference"] = gap
        line = (
            f"policy and reference differ before the first update: {describe_gap(*gap)}: they were "
            "not loaded from the same weights, or one of them has dropout on"
        )
        self.check("reference", gap[0] <= self.mean_limit, line)

    def check_ratio(
        self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, first: bool = True
    ) -> None:
        """At the first minibatch of a rollout the ratio is 1, up to rounding."""
        mean, worst = self.measure("ratio", logprobs, old_logprobs, mask)
        line = (
            f"the ratio of the first update is not 1: {describe_gap(mean, worst)}: old log-probs "
            "come from another forward pass than the one that trains (dropout, precision, "
            "temperature, padding)"
        )
        self.check("ratio", mean <= self.mean_limit, line, self.rounding(first))

    def check_padding(
        self, actor: Engine[Policy], e: Experience, temperature: float, pad_id: int
    ) -> None:
        """Neither padding nor other responses in the batch change log-probs.

        One forward pass of at most 4 rows, and one of each row alone.
        """
        index = e.full_mask.sum(1).argsort()[:4].tolist()
        some = e.rows(index)
        n = some.response_mask.shape[1]
        wide = replace(
            some,
            prompt_ids=F.pad(some.prompt_ids, (3, 0), value=pad_id),
            prompt_mask=F.pad(some.prompt_mask, (3, 0)),
            response_ids=F.pad(some.response_ids, (0, 2), value=pad_id),
            response_mask=F.pad(some.response_mask, (0, 2)),
        )
        alone = [policy_logprobs(actor, e.rows([i]), temperature)[0] for i in index]
        expected = torch.stack([F.pad(row, (0, n - len(row))) for row in alone])
        padded = policy_logprobs(actor, wide, temperature)[:, :n]
        mean, worst = self.measure("padding", padded, expected, some.response_mask)
        line = (
            f"padding or other responses change log-probs: {describe_gap(mean, worst)}: this "
            "architecture ignores its mask or position ids"
        )
        self.check("padding", mean <= self.mean_limit, line)

    def report(self) -> None:
        """Log what was measured."""
        parts = [
            f"{name} {mean:.1g} / {worst:.1g}" for name, (mean, worst) in self.measured.items()
        ]
        log.info(f"guards: log-probs differ by (mean / maximum, nats) {', '.join(parts)}")


def describe_gap(mean: float, worst: float) -> str:
    return f"mean {mean:.2g}, maximum {worst:.2g} nats"


def logprob_difference(one: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and maximum of |one - other| over the masked tokens of all ranks. Shapes (b, R)."""
    apart = (one.float() - other.float()).abs() * mask
    local = [float(apart.sum()), float(mask.sum())]
    total, tokens = collectives.all_reduce_sum(local, mask.device)
    return total / max(tokens, 1.0), collectives.all_reduce_max(float(apart.max()), mask.device)
