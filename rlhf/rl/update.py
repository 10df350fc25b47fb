"""The update of a rollout: `epochs` passes of `minibatches` optimizer steps for actor and critic.

Every rank holds the experience of the whole rollout and trains on its rows of each minibatch, so
minibatches, losses and metrics do not depend on the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.config.choices import KlAppliedTo
from rlhf.config.schema import Config
from rlhf.data import tokenized
from rlhf.data.batches import micro_batches, upload
from rlhf.data.records import Dataset
from rlhf.distributed import collectives
from rlhf.models.loading import check_context
from rlhf.rl.advantages import gae, scored_rewards
from rlhf.rl.experience import Experience, values_before
from rlhf.rl.learner import Learner, Minibatch, Texts
from rlhf.rl.losses import kl_estimate, policy_loss, value_loss
from rlhf.training.likelihood import response_nll_stats
from rlhf.training.optimizer_step import optimizer_step

TERMS = ("policy", "entropy", "kl", "ptx")  # of the actor's loss


# --------------------------------------------------------------------- losses of micro-batches


def actor_loss(learner: Learner, batch: Minibatch, rows: Sequence[int]) -> Tensor:
    """The actor's loss on some of this rank's rows, a part of the step's loss."""
    rl, part = learner.cfg.rl, batch.experience.rows(rows)
    actor, r = learner.models.actor, part.response_mask.shape[1]
    stats = actor(part.ids, part.full_mask, part.target_mask, learner.cfg.rollout.temperature)
    logprobs, entropy = stats.logprobs[:, -r:], stats.entropy[:, -r:]
    if batch.is_first:
        first, new = batch.rollout == learner.warmup, logprobs.detach().cpu()
        learner.guards.check_ratio(new, part.old_logprobs, part.response_mask, first)
    old_logprobs, ref_logprobs, advantages, mask, weight = upload(
        actor.device,
        part.old_logprobs,
        part.ref_logprobs,
        part.advantages,
        part.loss_mask,
        batch.weights(part, learner.cfg),
    )
    loss, sums = policy_loss(logprobs, old_logprobs, advantages, mask, rl)
    if len(part.sampler_weights):
        loss = loss * upload(learner.models.actor.device, part.sampler_weights)[0]
    batch.stats.maximum(ratio_max=sums.pop("ratio_max"))
    entropy_sum = (entropy.detach() * mask).sum()
    batch.stats.add(**{name: value.double() for name, value in sums.items()})
    batch.stats.add(entropy=entropy_sum.double())
    terms = {"policy": (weight * loss).sum()}
    if rl.entropy_coef:
        terms["entropy"] = -rl.entropy_coef * (weight * entropy).sum()
    if batch.kl_coef:
        kl = kl_estimate(logprobs, ref_logprobs, rl.kl.estimator)
        terms["kl"] = batch.kl_coef * (weight * kl).sum()
    batch.stats.add(**{f"loss/{name}": term.detach().double() for name, term in terms.items()})
    return sum(terms.values(), logprobs.new_zeros(()))


def critic_loss(learner: Learner, batch: Minibatch, rows: Sequence[int]) -> Tensor:
    """The critic's loss on some of this rank's rows, a part of the step's loss."""
    critic, part = learner.models.critic, batch.experience.rows(rows)
    assert critic is not None
    r = part.response_mask.shape[1]
    values = values_before(critic(part.ids, part.full_mask), r)
    if batch.scored is not None:
        fill_in_values(learner, batch, rows, part, values.detach())
    weight, clip = batch.weights(part, learner.cfg), learner.cfg.rl.critic.value_clip
    old_values, returns, mask, weight = upload(
        critic.device, part.values, part.returns, part.loss_mask, weight
    )
    loss, clipped = value_loss(values, old_values, returns, mask, clip)
    total = (weight * loss).sum()
    batch.stats.add(**{"loss/value": total.detach().double(), "value_clipfrac": clipped.double()})
    return total


def fill_in_values(
    learner: Learner, batch: Minibatch, rows: Sequence[int], part: Experience, values: Tensor
) -> None:
    """Give a micro-batch its values and returns, and the whole rollout its values.

    Args: values (b, r): of the critic before its update.
    """
    assert batch.scored is not None
    rl, r = learner.cfg.rl, values.shape[1]
    rewards, mask = (x[list(rows), :r] for x in batch.scored)
    part.values = values * part.response_mask
    _, part.returns = gae(rewards, part.values, mask, rl.gamma, rl.gae_lambda)
    batch.experience.values[list(rows), :r] = part.values


def ptx_loss(
    learner: Learner, batch: Minibatch, texts: Sequence[tuple[list[int], list[int]]], tokens: int
) -> Tensor:
    """The pretraining loss on some texts. Args: tokens: in the loss of the step, over all ranks."""
    pad_id = learner.models.tokenizer.pad_token_id
    nll = response_nll_stats(learner.models.actor, texts, pad_id)[0]
    loss = learner.cfg.rl.ptx.coef * nll / tokens
    batch.stats.add(**{"loss/ptx": loss.detach().double()})
    return loss


def ptx_losses(learner: Learner, batch: Minibatch, texts: Texts) -> list[Callable[[], Tensor]]:
    """The pretraining losses of an optimizer step: as many random texts as responses."""
    size = len(batch.rows)
    seed = [learner.cfg.seed, batch.rollout, batch.epoch, batch.number]
    choice = np.random.default_rng(seed).choice(len(texts), size, replace=len(texts) < size)
    chosen = {int(i): texts[int(i)] for i in choice}
    tokens = sum(len(chosen[int(i)][1]) for i in choice)
    rank, world = collectives.rank(), collectives.world_size()
    size_of_micro = learner.cfg.deploy.micro_batch
    cut = micro_batches(
        choice.tolist(), texts.lengths, size_of_micro, rank, world, max(texts.lengths)
    )
    return [partial(ptx_loss, learner, batch, [chosen[i] for i in rows], tokens) for rows in cut]


def pretraining_texts(cfg: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """What the pretraining loss reads: sources of plain text, else the SFT demonstrations.

    Raises: UserError where there are neither.
    """
    longest = cfg.rl.ptx.max_tokens
    if data.texts is not None:
        note = ""
        check_context(cfg.inputs["sft"], 0, longest, "rl.ptx.max_tokens")
        texts = tokenized.texts(tokenizer, data.texts, longest, cfg.data.workers)
    else:
        note = ", as no source has plain text"
        longest = min(longest, cfg.data.max_response_tokens)  # what SFT had room for
        max_prompt, workers = cfg.data.max_prompt_tokens, cfg.data.workers
        texts = tokenized.demonstrations(tokenizer, data.sft, max_prompt, longest, workers)
    if not len(texts):
        raise UserError(
            f"rl.ptx.coef={cfg.rl.ptx.coef}: there are neither texts (a source of format text) nor "
            "demonstrations; add data, or set it to 0"
        )
    log.info(f"pretraining loss: {texts}{note}")
    return texts


# -------------------------------------------------------------------------------------- update


def step_critic_first(
    learner: Learner, experience: Experience, rewards: Tensor, kl_coef: float, rollout: int
) -> Minibatch:
    """The critic's step on a rollout of which each response is used once; it measures the values.

    The values of a rollout are those of the critic before its update. If there is one update, its
    forward pass computes them anyway, and the returns of a response need no other response.

    Args: experience: its values are filled in.  rewards (B, R): of each token.  kl_coef, rollout:
        as `update_policy`.
    Returns: the minibatch, on which `update_policy` trains the actor.
    """
    critic = learner.models.critic
    assert critic is not None
    critic.train()
    (batch,) = minibatches_of_pass(learner, experience, kl_coef, rollout, 0)
    batch.scored = scored_rewards(rewards, experience.response_mask, learner.cfg.rl)
    step_critic(learner, batch)
    # each rank has filled in its own rows
    experience.values = collectives.all_gather_rows(experience.values[None]).sum(0)
    return batch


def update_policy(
    learner: Learner,
    experience: Experience,
    kl_coef: float,
    rollout: int,
    critic_done: Minibatch | None = None,
) -> dict[str, float]:
    """Train actor and critic on a rollout.

    Args:
        experience: with advantages, and with a critic its returns.
        kl_coef: current KL coefficient.
        rollout: its number, from 0.
        critic_done: the only minibatch; the critic has already been trained on it.
    Returns: metrics: means over the tokens, or the optimizer steps, of all ranks.
    """
    rl, models = learner.cfg.rl, learner.models
    engines = [models.actor] + ([models.critic] if models.critic is not None else [])
    for engine in engines:
        engine.train()  # no dropout is on; activation checkpointing works only in this mode
    done: list[Minibatch] = []
    for epoch in range(rl.epochs):
        batches = (
            [critic_done]
            if critic_done is not None
            else minibatches_of_pass(learner, experience, kl_coef, rollout, epoch)
        )
        for batch in batches:
            train_minibatch(learner, batch)
        done += batches
        if rl.target_kl and total(batches)["approxkl"] > rl.target_kl * count_tokens(batches):
            break
    for engine in engines:
        engine.eval()
    return update_metrics(learner, done, rollout)


def minibatches_of_pass(
    learner: Learner, experience: Experience, kl_coef: float, rollout: int, epoch: int
) -> list[Minibatch]:
    """The minibatches of one pass over the rollout, in a new order; the same on every rank."""
    cfg = learner.cfg
    in_loss = kl_coef if cfg.rl.kl.applied_to == KlAppliedTo.loss else 0.0
    lengths = experience.full_mask.sum(1).tolist()
    order = np.random.default_rng([cfg.seed, rollout, epoch]).permutation(len(lengths))
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    rank, world = collectives.rank(), collectives.world_size()
    return [
        Minibatch(
            experience,
            rollout,
            epoch,
            number,
            rows=rows.tolist(),
            micro_batches=micro_batches(
                rows.tolist(), lengths, cfg.deploy.micro_batch, rank, world, longest
            ),
            tokens=float(experience.loss_mask[rows].sum()),
            sequences=int(experience.loss_mask[rows].any(1).sum()),
            kl_coef=in_loss,
        )
        for number, rows in enumerate(np.split(order, cfg.rl.minibatches))
    ]


def train_minibatch(learner: Learner, batch: Minibatch) -> None:
    """One optimizer step of the actor, unless the critic warms up, and one of the critic, unless it
    came first (`step_critic_first`)."""
    models = learner.models
    if learner.actor_trains(batch.rollout):
        losses: list[Callable[[], Tensor]] = [
            partial(actor_loss, learner, batch, rows) for rows in batch.micro_batches
        ]
        if learner.texts is not None:
            losses += ptx_losses(learner, batch, learner.texts)
        lr = learner.actor_lr(batch.rollout)
        batch.actor_grad_norm = optimizer_step(models.actor, losses, lr)
        if learner.ema is not None:
            learner.ema.update()
    if not batch.critic_is_done:
        step_critic(learner, batch)
    batch.sums = batch.stats.reduce(models.actor.device)


def step_critic(learner: Learner, batch: Minibatch) -> None:
    """One optimizer step of the critic, where there is one."""
    if learner.models.critic is None:
        return
    losses = [partial(critic_loss, learner, batch, rows) for rows in batch.micro_batches]
    lr = learner.critic_lr(batch.rollout)
    batch.critic_grad_norm = optimizer_step(learner.models.critic, losses, lr)
    batch.critic_is_done = True


# ------------------------------------------------------------------------------------- metrics


def total(batches: Sequence[Minibatch]) -> dict[str, float]:
    """The sums of all minibatches; 0 for a name that none has."""
    totals: dict[str, float] = defaultdict(float)
    for batch in batches:
        for name, value in batch.sums.items():
            totals[name] += value
    return totals


def count_tokens(batches: Sequence[Minibatch]) -> float:
    """Tokens in the loss; at least 1, as DeepSpeed-Chat's masks may leave none."""
    return max(sum(batch.tokens for batch in batches), 1.0)


def update_metrics(learner: Learner, done: list[Minibatch], rollout: int) -> dict[str, float]:
    """Means over tokens, and of losses and gradient norms over optimizer steps.

    Args: done: the minibatches of all passes over the rollout.
    """
    totals, tokens = total(done), count_tokens(done)
    mean = {name: value / tokens for name, value in totals.items()}
    loss = {
        name.removeprefix("loss/"): value / len(done)
        for name, value in totals.items()
        if name.startswith("loss/")
    }
    critic_norms = [b.critic_grad_norm for b in done if b.critic_grad_norm is not None]
    actor_norms = [b.actor_grad_norm for b in done if b.actor_grad_norm is not None]
    metrics: dict[str, float] = {
        "lr": learner.actor_lr(rollout) if actor_norms else 0.0,
        "policy/epochs": done[-1].epoch + 1,
    }
    if critic_norms:
        metrics |= {
            "lr_critic": learner.critic_lr(rollout),
            "loss/value_avg": loss["value"],
            "val/clipfrac_avg": mean["value_clipfrac"],
            "val/grad_norm": float(np.mean(critic_norms)),
        }
    if not actor_norms:
        return metrics
    ratio_max = float(torch.stack([batch.stats.maxima["ratio_max"] for batch in done]).max())
    metrics |= {f"loss/{name}_avg": loss[name] for name in TERMS if name in loss}
    metrics |= {
        "loss/total_avg": sum(loss.get(name, 0.0) for name in TERMS),
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac_low"] + mean["clipfrac_high"],
        "policy/clipfrac_low_avg": mean["clipfrac_low"],
        "policy/entropy_avg": mean["entropy"],
        "policy/ratio_max": collectives.all_reduce_max(ratio_max, learner.models.actor.device),
        "policy/grad_norm": float(np.mean(actor_norms)),
        "val/ratio": mean["ratio"],
        "val/ratio_var": max(0.0, mean["ratio_sq"] - mean["ratio"] ** 2),
    }
    if done[0].tokens:
        metrics["policy/ratio_first_minibatch"] = done[0].sums["ratio"] / done[0].tokens
    return metrics
