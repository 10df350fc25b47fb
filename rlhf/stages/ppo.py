"""PPO: prompts -> answers -> scores -> a better policy, kept near the SFT policy by a KL penalty.

One rollout per step: sample answers, score them with the reward model, then `ppo.epochs` passes of `ppo.minibatches` optimizer
steps for actor and critic. Every process holds the whole rollout's experience and trains on its rows of each minibatch, so
minibatches, whitening and metrics do not depend on the number of processes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf import comm, config, plan
from rlhf.config import Config
from rlhf.data import load, template
from rlhf.data.batches import global_batches, micro_batches, uniforms
from rlhf.data.load import open_data
from rlhf.engines import build_engine, optimizer_step
from rlhf.lora import AdapterOff
from rlhf.models import check_context, load_policy, load_scorer, load_tokenizer, save_engine
from rlhf.objectives import (
    explained_variance,
    gae,
    kl_k3,
    learning_rate,
    masked_mean,
    policy_loss,
    token_logp,
    token_rewards,
    value_loss,
    whiten,
)
from rlhf.rollout import Experience, evaluate_policy, make_experience, reads_text, values_before
from rlhf.track import Tracker, log


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate before and after, save run_dir/model and run_dir/critic. Returns the final metrics."""
    # ---- data
    max_prompt, max_new = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    for model in (cfg.inputs["sft"], cfg.inputs["rm"]):
        check_context(model, max_prompt, max_new, "rollout.max_new_tokens")
    tokenizer = load_tokenizer(cfg.inputs["sft"], cfg.data.template)
    data = open_data(cfg, run_dir)
    prompts = load.prompts(tokenizer, data.ppo, max_prompt, cfg.data.workers)
    log.info(f"PPO: {prompts} prompts, {len(data.eval_prompts)} held out")
    steps = len(prompts) // cfg.ppo.batch_size * cfg.ppo.prompt_epochs
    if not steps:
        raise ValueError(f"ppo.batch_size={cfg.ppo.batch_size}: there are only {len(prompts)} prompts")
    steps = min(steps, cfg.ppo.max_steps or steps)

    # ---- models: the policy and its frozen start, the reward model and the critic that starts from it
    precision = cfg.deploy.precision
    cfg.actor.lora.dropout = cfg.reward.lora.dropout = 0.0  # the ratio of the first update must be 1
    actor = build_engine(lambda: load_policy(cfg.inputs["sft"], tokenizer, precision), cfg, "actor", run_dir)
    if config.adapter_only(cfg.actor):
        log.info("reference: the actor with its adapter off, one model less in memory")
        ref: Any = AdapterOff(actor)
    else:
        ref = build_engine(lambda: load_policy(cfg.inputs["sft"], tokenizer, precision), cfg, "ref", run_dir)
    reward_tokenizer = load_tokenizer(cfg.inputs["rm"], cfg.data.template)
    reward = build_engine(lambda: load_scorer(cfg.inputs["rm"], reward_tokenizer, precision), cfg, "reward", run_dir)
    same_tokenizer = template.same_tokens(tokenizer, reward_tokenizer)
    if not same_tokenizer:
        log.info("the reward model has another tokenizer: it reads the answers as text, and the critic starts from the SFT policy")
    trunk = cfg.inputs["rm" if same_tokenizer else "sft"]
    critic = build_engine(lambda: load_scorer(trunk, tokenizer, precision, zero_head=not same_tokenizer), cfg, "critic", run_dir)
    foreign = None if same_tokenizer else reward_tokenizer
    actor.eval(), critic.eval()
    gather = plan.gather_for_rollout(cfg)
    tracker = Tracker(cfg, run_dir, steps, ["objective/scores", "objective/kl", "reward/gold/mean", "tokens/response_mean"])

    def evaluate() -> tuple[dict[str, float], list[dict[str, Any]]]:
        micro_batch, temperature = cfg.deploy.eval_micro_batch, cfg.rollout.temperature
        return evaluate_policy(data, max_prompt, max_new, temperature, micro_batch, tokenizer, actor, ref, reward, gather, foreign)

    before, samples_before = evaluate()

    # ---- training
    for step, batch in zip(range(steps), global_batches(len(prompts), cfg.ppo.batch_size, cfg.ppo.prompt_epochs, cfg.seed)):
        started = time.time()
        draws = uniforms("rollout", batch, cfg.seed, step, max_new)
        asked, ids = zip(*(prompts[i] for i in batch))
        experience = make_experience(
            ids,
            draws,
            cfg.rollout.temperature,
            cfg.deploy.eval_micro_batch,
            tokenizer,
            actor,
            ref,
            reward,
            critic,
            gather,
            reads_text(reward, foreign, asked) if foreign else None,
        )
        made = time.time()
        score = experience.score - cfg.ppo.missing_eos_penalty * (1 - experience.ended)
        rewards = token_rewards(score, experience.old_logp, experience.ref_logp, experience.mask, cfg.ppo.kl.coef)
        advantages, returns = gae(rewards, experience.old_values, experience.mask, cfg.ppo.gamma, cfg.ppo.lam)
        whitened = whiten(advantages, experience.mask)
        schedule = (cfg.ppo.warmup_ratio, cfg.ppo.schedule.name, cfg.ppo.final_lr)
        actor_lr = learning_rate(step, steps, cfg.ppo.lr, *schedule)
        critic_lr = learning_rate(step, steps, cfg.ppo.critic_lr, *schedule)
        update = train_on(experience, whitened, returns, actor, critic, actor_lr, critic_lr, cfg, step)

        metrics = rollout_metrics(experience, score, returns, cfg) | update
        if data.gold:
            gold = [data.gold(turns, experience.text(row, tokenizer)) for row, turns in enumerate(asked)]
            metrics |= {"reward/gold/mean": float(np.mean(gold)), "reward/gold/std": float(np.std(gold))}
        seconds = time.time() - started
        metrics |= {
            "lr": actor_lr,
            "episode": (step + 1) * cfg.ppo.batch_size,
            "eps": cfg.ppo.batch_size / seconds,
            "timing_s/rollout": made - started,
            "timing_s/update": time.time() - made,
            "timing_s/step": seconds,
        }
        tracker.log(step + 1, metrics)

    # ---- evaluation
    after, samples = evaluate()
    metrics = {f"eval/{key}": value for key, value in after.items()}
    metrics |= {f"eval/{key}_before": before[key] for key in ("score", "gold", "length", "eos_rate") if key in before}
    compared = [
        {"prompt": new["prompt"], "before": old["completion"], "after": new["completion"]}
        | {f"{key}_{when}": row[key] for key in ("score", "gold") if key in new for when, row in (("before", old), ("after", new))}
        | {"kl": new["kl"], "length": new["length"]}
        for old, new in zip(samples_before, samples)
    ]
    tracker.samples(steps, compared)
    save_engine(actor, tokenizer, run_dir / "model")
    save_engine(critic, tokenizer, run_dir / "critic")
    tracker.close(metrics)
    return metrics


def train_on(
    experience: Experience,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    actor: Any,
    critic: Any,
    actor_lr: float,
    critic_lr: float,
    cfg: Config,
    step: int,
) -> dict[str, float]:
    """`ppo.epochs` passes over one rollout in `ppo.minibatches` optimizer steps each, for actor and critic.

    Args: advantages (whitened) and returns (B, R), rows as in `experience`.
    Returns: means over all tokens of all minibatches and processes (`_max`: maxima).
    """
    actor.train(), critic.train()  # nothing drops out; activation checkpointing works only so
    n = len(experience.score)
    lengths = experience.full_mask.sum(1).tolist()
    sums: dict[str, float] = defaultdict(float)
    tokens_seen, grad_norms, first_ratio, ratio_max = 0.0, [], 0.0, 0.0
    for epoch in range(cfg.ppo.epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(n)
        for number, minibatch in enumerate(np.split(order, cfg.ppo.minibatches)):
            micros = micro_batches(minibatch.tolist(), lengths, cfg.deploy.micro_batch, comm.rank(), comm.world_size())
            tokens = float(experience.mask[minibatch].sum())  # response tokens of this optimizer step, over all processes
            step_sums: dict[str, float] = defaultdict(float)

            def actor_loss(rows: Sequence[int], tokens: float = tokens, out: dict[str, float] = step_sums) -> torch.Tensor:
                part = experience.rows(rows)
                r = part.mask.shape[1]
                logits = actor(part.ids, part.full_mask, r) / cfg.rollout.temperature
                logp, entropy = token_logp(logits, part.response_ids)
                loss, terms = policy_loss(logp, part.old_logp, advantages[rows, :r], part.mask, cfg.ppo.clip)
                for key, value in terms.items():
                    out[key] = max(out[key], float(value)) if key == "ratio_max" else out[key] + float(value)
                out["policy"] += float(loss.detach())
                out["entropy"] += float((entropy.detach() * part.mask).sum())
                return loss / tokens

            def critic_loss(rows: Sequence[int], tokens: float = tokens, out: dict[str, float] = step_sums) -> torch.Tensor:
                part = experience.rows(rows)
                r = part.mask.shape[1]
                values = values_before(critic(part.ids, part.full_mask), r)
                loss, clipped = value_loss(values, part.old_values, returns[rows, :r], part.mask, cfg.ppo.value_clip)
                out["value"] += float(loss.detach())
                out["value_clipfrac"] += float(clipped)
                return loss / tokens

            actor_norm = optimizer_step(actor, micros, actor_loss, actor_lr)
            critic_norm = optimizer_step(critic, micros, critic_loss, critic_lr)
            grad_norms.append((actor_norm, critic_norm))
            ratio_max = max(ratio_max, step_sums.pop("ratio_max"))
            keys = sorted(step_sums)
            for key, value in zip(keys, comm.all_sum([step_sums[key] for key in keys], actor.device)):
                sums[key] += value
            tokens_seen += tokens
            if epoch == 0 and number == 0:
                first_ratio = sums["ratio"] / tokens_seen
    actor.eval(), critic.eval()
    mean = {key: value / tokens_seen for key, value in sums.items()}
    return {
        "loss/policy_avg": mean["policy"],
        "loss/value_avg": mean["value"],
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": mean["entropy"],
        "policy/ratio_max": comm.all_max(ratio_max, actor.device),
        "policy/ratio_first_minibatch": first_ratio,
        "policy/grad_norm": float(np.mean([a for a, _ in grad_norms])),
        "val/clipfrac_avg": mean["value_clipfrac"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": max(0.0, mean["ratio_sq"] - mean["ratio"] ** 2),
        "val/grad_norm": float(np.mean([c for _, c in grad_norms])),
    }


def rollout_metrics(e: Experience, score: torch.Tensor, returns: torch.Tensor, cfg: Config) -> dict[str, float]:
    """What the sampled answers look like. Sequence KL in nats, scores in normalised units; `score` has the EOS penalty in it."""
    kl = (e.old_logp - e.ref_logp) * e.mask
    length = e.mask.sum(1)
    metrics: dict[str, Any] = {
        "objective/kl": kl.sum(1).mean(),
        "objective/kl_per_token": masked_mean(kl, e.mask),
        "objective/kl_k3": (kl_k3(e.old_logp, e.ref_logp) * e.mask).sum(1).mean(),
        "objective/kl_coef": cfg.ppo.kl.coef,
        "objective/entropy": -(e.old_logp * e.mask).sum(1).mean(),
        "objective/non_score_reward": -cfg.ppo.kl.coef * kl.sum(1).mean(),
        "objective/rlhf_reward": (score - cfg.ppo.kl.coef * kl.sum(1)).mean(),
        "objective/scores": e.score.mean(),
        "objective/scores_std": e.score.std(correction=0),
        "objective/scores_min": e.score.min(),
        "objective/scores_max": e.score.max(),
        "objective/eos_rate": e.ended.mean(),
        "val/num_eos_tokens": e.ended.sum(),
        "val/explained_variance": explained_variance(e.old_values, returns, e.mask),
        "val/value_mean": masked_mean(e.old_values, e.mask),
        "val/return_mean": masked_mean(returns, e.mask),
        "val/return_std": masked_mean((returns - masked_mean(returns, e.mask)) ** 2, e.mask) ** 0.5,
        "tokens/response_mean": length.mean(),
        "tokens/response_max": length.max(),
        "tokens/truncated_frac": 1 - e.ended.mean(),
        "tokens/prompt_mean": e.prompt_mask.sum(1).float().mean(),
    }
    return {key: float(value) for key, value in metrics.items()}
