"""Metrics and logged rows of a rollout."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rlhf.config.schema import KlEstimator
from rlhf.rl.advantages import masked_mean
from rlhf.rl.experience import Experience
from rlhf.rl.losses import kl_estimate
from rlhf.rl.rewards import Rewards


def rollout_metrics(
    e: Experience,
    raw_score: Tensor,
    score: Tensor,
    penalty: Tensor,
    returns: Tensor | None,
    beta: float,
) -> dict[str, float]:
    """What the sampled answers look like. KL in nats per answer; `score` is what is learnt, with penalties, scale and clip. `returns`
    (B, R): where there is a critic."""
    kl = (kl_estimate(e.old_logp, e.ref_logp, KlEstimator.k1) * e.mask).sum(1)
    k3 = (kl_estimate(e.old_logp, e.ref_logp, KlEstimator.k3) * e.mask).sum(1)
    paid = (penalty * e.mask).sum(1)
    length = e.mask.sum(1)
    metrics: dict[str, Any] = {
        "objective/kl": kl.mean(),
        "objective/kl_per_token": kl.sum() / length.sum(),
        "objective/kl_k3": k3.mean(),
        "objective/kl_coef": beta,
        "objective/entropy": -(e.old_logp * e.mask).sum(1).mean(),
        "objective/non_score_reward": -paid.mean(),
        "objective/rlhf_reward": (score - beta * kl).mean(),
        "objective/scores": raw_score.mean(),
        "objective/scores_std": raw_score.std(correction=0),
        "objective/scores_min": raw_score.min(),
        "objective/scores_max": raw_score.max(),
        "objective/eos_rate": e.ended.mean(),
        "val/num_eos_tokens": e.ended.sum(),
        "val/sampler_logp_diff": masked_mean((e.sampler_logp - e.old_logp).abs(), e.mask),
        "tokens/response_mean": length.mean(),
        "tokens/response_max": length.max(),
        "tokens/truncated_frac": 1 - e.ended.mean(),
        "tokens/prompt_mean": e.prompt_mask.sum(1).float().mean(),
    }
    if returns is not None:
        metrics |= {
            "val/explained_variance": explained_variance(e.old_values, returns, e.mask),
            "val/value_mean": masked_mean(e.old_values, e.mask),
            "val/return_mean": masked_mean(returns, e.mask),
            "val/return_std": masked_mean((returns - masked_mean(returns, e.mask)) ** 2, e.mask)
            ** 0.5,
        }
    return {key: float(value) for key, value in metrics.items()}


def response_rows(
    e: Experience,
    score: Tensor,
    reward: Tensor,
    advantages: Tensor,
    returns: Tensor | None,
    rewards: Rewards,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` of the answers of a rollout (-1: all) as rows for rollouts.jsonl, with what every token was given. `score` is
    the weighted sum of the sources, `score_learnt` what penalties, scale and clip made of it."""
    rows = []
    kl = e.old_logp - e.ref_logp
    per_token = {"logp": e.old_logp, "kl": kl, "reward": reward, "advantage": advantages}
    per_token |= {"value": e.old_values, "return": returns} if returns is not None else {}
    for i in range(len(e.mask))[: count if count >= 0 else None]:
        n = int(e.mask[i].sum())
        prompt = rewards.tokenizer.decode(
            e.prompt_ids[i][e.prompt_mask[i] > 0]
        )  # all turns, as the policy reads them
        row: dict[str, Any] = {
            "prompt": prompt,
            "answer": e.text(i, rewards.tokenizer),
            "ended": bool(e.ended[i]),
        }
        row |= {"score": float(rewards.total(e.scores[i])), "score_learnt": float(score[i])}
        row |= {f"score_{name}": float(value) for name, value in zip(rewards.names, e.scores[i])}
        row["tokens"] = rewards.tokenizer.convert_ids_to_tokens(e.response_ids[i, :n].tolist())
        rows.append(
            row
            | {
                key: [round(x, 5) + 0.0 for x in value[i, :n].tolist()]
                for key, value in per_token.items()
            }
        )
    return rows


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over the masked tokens; 0 for a constant value, negative when worse than that. NaN if Var(G) = 0."""
    error = returns - values
    residual = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return float(1 - residual / total) if float(total) > 0 else math.nan
