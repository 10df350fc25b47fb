"""The update of a rollout: `epochs` passes of `minibatches` optimizer steps for actor and critic.

Every rank holds the experience of the whole rollout and trains on its rows of each minibatch, so
minibatches, losses and metrics do not depend on the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import call

import numpy as np
from torch import Tensor

from rlhf.config.choices import KlAppliedTo
from rlhf.config.schema import Config
from rlhf.data import tokenized
from rlhf.data.batches import micro_batches
from rlhf.distributed import collectives
from rlhf.rl.controllers import MovingAverage
from rlhf.rl.experience import Experience, Models, values_before
from rlhf.rl.guards import Guards
from rlhf.rl.losses import kl_estimate, policy_loss, token_weights, value_loss
from rlhf.training.likelihood import response_nll_stats
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.stats import Stats

Texts = tokenized.Rows[tuple[list[int], list[int]]]
TERMS = ("policy", "entropy", "kl", "ptx")  # of the actor's loss


@dataclass
class Learner:
    """What is trained, and what stays the same from rollout to rollout."""

    cfg: Config
    models: Models
    guards: Guards
    steps: int  # rollouts of the run
    ema: MovingAverage | None = None
    texts: Texts | None = None  # of the pretraining loss

    def actor_trains(self, step: int) -> bool:
        """Whether the actor is trained at a rollout, or only the critic (warm-up)."""
        return step >= self.warmup

    @property
    def warmup(self) -> int:
        """First rollouts, in which only the critic is trained."""
        return self.cfg.rl.critic.warmup_rollouts if self.models.critic is not None else 0

    def actor_lr(self, step: int) -> float:
        """The actor's learning rate; its warm-up begins when the actor begins."""
        return learning_rate(step - self.warmup, self.steps - self.warmup, self.cfg.rl)


@dataclass
class Minibatch:
    """The rows of one optimizer step."""

    experience: Experience  # of the whole rollout
    rows: list[int]  # of all ranks
    micro_batches: list[Sequence[int]]  # of this rank
    tokens: float  # in the loss, over all ranks
    kl_coef: float  # weight of the KL in the loss; 0 where it is part of the reward
    is_first: bool  # of the rollout: the policy is still the one that sampled
    step: int
    stats: Stats = field(default_factory=Stats)

    def weights(self, part: Experience, cfg: Config) -> Tensor:
        """Weight of each token of a micro-batch in the step's loss, (b, r)."""
        aggregation, longest = cfg.rl.loss_aggregation, cfg.rollout.max_new_tokens
        return token_weights(part.loss_mask, aggregation, self.tokens, len(self.rows), longest)


# --------------------------------------------------------------------- losses of micro-batches


def actor_loss(learner: Learner, batch: Minibatch, rows: Sequence[int]) -> Tensor:
    """The actor's loss on some of this rank's rows, a part of the step's loss."""
    rl, part = learner.cfg.rl, batch.experience.rows(rows)
    weight, r = batch.weights(part, learner.cfg), part.response_mask.shape[1]
    outputs = learner.models.actor(
        part.ids, part.full_mask, part.target_mask, learner.cfg.rollout.temperature
    )
    logprobs, entropy = outputs[0][:, -r:], outputs[1][:, -r:]
    if batch.is_first and learner.actor_trains(batch.step):
        first = batch.step == learner.warmup
        learner.guards.check_ratio(logprobs.detach(), part.old_logprobs, part.response_mask, first)
    loss, sums = policy_loss(logprobs, part.old_logprobs, part.advantages, part.loss_mask, rl)
    batch.stats.maximum(ratio_max=sums.pop("ratio_max"))
    entropy_sum = (entropy.detach() * part.loss_mask).sum()
    batch.stats.add(**{name: value.double() for name, value in sums.items()})
    batch.stats.add(entropy=entropy_sum.double())
    terms = {"policy": (weight * loss).sum()}
    if rl.entropy_coef:
        terms["entropy"] = -rl.entropy_coef * (weight * entropy).sum()
    if batch.kl_coef:
        kl = kl_estimate(logprobs * part.response_mask, part.ref_logprobs, rl.kl.estimator)
        terms["kl"] = batch.kl_coef * (weight * kl).sum()
    batch.stats.add(**{f"loss/{name}": term.detach().double() for name, term in terms.items()})
    return sum(terms.values(), logprobs.new_zeros(()))


def critic_loss(learner: Learner, batch: Minibatch, rows: Sequence[int]) -> Tensor:
    """The critic's loss on some of this rank's rows, a part of the step's loss."""
    critic, part = learner.models.critic, batch.experience.rows(rows)
    assert critic is not None
    values = values_before(critic(part.ids, part.full_mask), part.response_mask.shape[1])
    clip = learner.cfg.rl.critic.value_clip
    loss, clipped = value_loss(values, part.values, part.returns, part.loss_mask, clip)
    total = (batch.weights(part, learner.cfg) * loss).sum()
    batch.stats.add(**{"loss/value": total.detach().double(), "value_clipfrac": clipped.double()})
    return total


def ptx_loss(
    learner: Learner, batch: Minibatch, texts: Sequence[tuple[list[int], list[int]]], tokens: int
) -> Tensor:
    """The pretraining loss on some texts. Args: tokens: in the loss of the step, over all ranks."""
    pad_id = learner.models.tokenizer.pad_token_id
    nll = response_nll_stats(learner.models.actor, texts, pad_id)[0]
    loss = learner.cfg.rl.ptx.coef * nll / tokens
    batch.stats.add(**{"loss/ptx": loss.detach().double()})
    return loss


def ptx_losses(
    learner: Learner, texts: Texts, batch: Minibatch, key: Sequence[int]
) -> list[Callable[[], Tensor]]:
    """The pretraining losses of an optimizer step: as many texts as responses.

    Args: key: of the random choice of texts.
    """
    size = len(batch.rows)
    choice = np.random.default_rng(key).choice(len(texts), size, replace=len(texts) < size)
    chosen = {int(i): texts[int(i)] for i in choice}
    tokens = sum(len(chosen[int(i)][1]) for i in choice)
    rank, world = collectives.rank(), collectives.world_size()
    size_of_micro = learner.cfg.deploy.micro_batch
    cut = micro_batches(
        choice.tolist(), texts.lengths, size_of_micro, rank, world, max(texts.lengths)
    )
    return [partial(ptx_loss, learner, batch, [chosen[i] for i in rows], tokens) for rows in cut]


# -------------------------------------------------------------------------------------- update


def update_policy(
    learner: Learner, experience: Experience, kl_coef: float, step: int
) -> dict[str, float]:
    """Train actor and critic on a rollout.

    Args:
        experience: with advantages, and with a critic its returns.
        kl_coef: current KL coefficient.
        step: number of the rollout, from 0.
    Returns: metrics: means over the tokens, or the optimizer steps, of all ranks.
    """
    rl, models = learner.cfg.rl, learner.models
    trained = [models.actor] + ([models.critic] if models.critic is not None else [])
    for engine in trained:
        engine.train()  # no dropout is on; activation checkpointing works only in this mode
    totals: dict[str, float] = defaultdict(float)  # sums over all optimizer steps
    progress = Progress()
    for epoch in range(rl.epochs):
        approxkl = tokens = 0.0  # sums over this pass
        for number, batch in enumerate(minibatches(learner, experience, kl_coef, step, epoch)):
            train_minibatch(learner, batch, [learner.cfg.seed, step, epoch, number], progress)
            reduced = batch.stats.reduce(models.actor.device)
            for name, value in reduced.items():
                totals[name] += value
            progress.ratio_max = max(progress.ratio_max, batch.stats.maxima.get("ratio_max", 0.0))
            approxkl += reduced.get("approxkl", 0.0)
            tokens += batch.tokens
            if batch.is_first and learner.actor_trains(step):
                progress.first_ratio = reduced["ratio"] / max(batch.tokens, 1.0)
        progress.passes += 1
        progress.tokens += tokens
        if rl.target_kl and approxkl > rl.target_kl * tokens:
            break
    for engine in trained:
        engine.eval()
    return update_metrics(learner, totals, progress, step)


@dataclass
class Progress:
    """What the optimizer steps of a rollout leave behind besides sums."""

    actor_norms: list[float] = field(default_factory=list)  # of gradients, before clipping
    critic_norms: list[float] = field(default_factory=list)
    first_ratio: float = 0.0  # mean ratio at the first minibatch
    ratio_max: float = 0.0
    tokens: float = 0.0
    passes: int = 0


def minibatches(
    learner: Learner, experience: Experience, kl_coef: float, step: int, epoch: int
) -> list[Minibatch]:
    """The minibatches of one pass, the same on every rank."""
    cfg = learner.cfg
    in_loss = kl_coef if cfg.rl.kl.applied_to == KlAppliedTo.loss else 0.0
    lengths = experience.full_mask.sum(1).tolist()
    order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(lengths))
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    rank, world = collectives.rank(), collectives.world_size()
    batches = []
    for number, rows in enumerate(np.split(order, cfg.rl.minibatches)):
        cut = micro_batches(rows.tolist(), lengths, cfg.deploy.micro_batch, rank, world, longest)
        tokens = float(experience.loss_mask[rows].sum())
        is_first = epoch == number == 0
        batches.append(Minibatch(experience, rows.tolist(), cut, tokens, in_loss, is_first, step))
    return batches


def train_minibatch(
    learner: Learner, batch: Minibatch, key: Sequence[int], progress: Progress
) -> None:
    """One optimizer step of the actor, unless the critic warms up, and one of the critic."""
    models, step = learner.models, batch.step
    if learner.actor_trains(step):
        losses: list[Callable[[], Tensor]] = [
            partial(actor_loss, learner, batch, rows) for rows in batch.micro_batches
        ]
        if learner.texts is not None:
            losses += ptx_losses(learner, learner.texts, batch, key)
        norm = optimizer_step(models.actor, losses, call, learner.actor_lr(step))
        progress.actor_norms.append(norm)
        if learner.ema is not None:
            learner.ema.update()
    if models.critic is not None:
        lr = learning_rate(step, learner.steps, learner.cfg.rl.critic)
        loss_fn = partial(critic_loss, learner, batch)
        progress.critic_norms.append(
            optimizer_step(models.critic, batch.micro_batches, loss_fn, lr)
        )


def update_metrics(
    learner: Learner, totals: dict[str, float], progress: Progress, step: int
) -> dict[str, float]:
    """Means over tokens, and of losses over optimizer steps."""
    rl, models = learner.cfg.rl, learner.models
    # DeepSpeed-Chat's masks may leave no token
    mean = {name: value / max(progress.tokens, 1.0) for name, value in totals.items()}
    loss = {
        name.removeprefix("loss/"): value / (progress.passes * rl.minibatches)
        for name, value in totals.items()
        if name.startswith("loss/")
    }
    actor_trains = learner.actor_trains(step)
    metrics: dict[str, float] = {
        "lr": learner.actor_lr(step) if actor_trains else 0.0,
        "policy/epochs": progress.passes,
    }
    if models.critic is not None:
        metrics |= {
            "lr_critic": learning_rate(step, learner.steps, rl.critic),
            "loss/value_avg": loss["value"],
            "val/clipfrac_avg": mean["value_clipfrac"],
            "val/grad_norm": float(np.mean(progress.critic_norms)),
        }
    if not actor_trains:
        return metrics
    metrics |= {f"loss/{name}_avg": loss[name] for name in TERMS if name in loss}
    metrics |= {
        "loss/total_avg": sum(loss.get(name, 0.0) for name in TERMS),
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac_low"] + mean["clipfrac_high"],
        "policy/clipfrac_low_avg": mean["clipfrac_low"],
        "policy/entropy_avg": mean["entropy"],
        "policy/ratio_max": collectives.all_reduce_max(progress.ratio_max, models.actor.device),
        "policy/grad_norm": float(np.mean(progress.actor_norms)),
        "val/ratio": mean["ratio"],
        "val/ratio_var": max(0.0, mean["ratio_sq"] - mean["ratio"] ** 2),
    }
    if progress.first_ratio:
        metrics["policy/ratio_first_minibatch"] = progress.first_ratio
    return metrics
