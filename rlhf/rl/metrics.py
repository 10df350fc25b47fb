"""Metrics and logged rows of a rollout. Names follow TRL where it has them (docs/wandb.md)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf.config.choices import KlEstimator
from rlhf.data.records import Prompt
from rlhf.rewards.batch import columns_of
from rlhf.rl.advantages import differ, masked_mean
from rlhf.rl.experience import Experience, Prompts
from rlhf.rl.losses import kl_estimate
from rlhf.rl.rewards import Rewards


@dataclass
class Scored:
    """The scores of a rollout on their way to rewards. B responses, R response tokens.

    A response without a score has NaN in `raw`, `score` and its row of `token_rewards`.
    """

    raw: Tensor  # (B,) weighted sum of the sources
    score: Tensor  # (B,) with penalties, scale and clip
    penalty: Tensor  # (B, R) KL penalty that is part of the reward
    token_rewards: Tensor  # (B, R) what advantages are made of


def rollout_metrics(e: Experience, scored: Scored, kl_coef: float) -> dict[str, float]:
    """What the sampled responses are like. KL in nats per response.

    Metrics of scores are of the responses that have one; NaN where none has.
    """
    mask = e.response_mask
    kl = (kl_estimate(e.old_logprobs, e.ref_logprobs, KlEstimator.k1) * mask).sum(1)
    k3 = (kl_estimate(e.old_logprobs, e.ref_logprobs, KlEstimator.k3) * mask).sum(1)
    length = mask.sum(1)
    raw = known(scored.raw)
    metrics: dict[str, Tensor | float] = {
        "objective/kl": kl.mean(),
        "objective/kl_per_token": kl.sum() / length.sum(),
        "objective/kl_k3": k3.mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(e.old_logprobs * mask).sum(1).mean(),
        "objective/non_score_reward": -(scored.penalty * mask).sum(1).mean(),
        "objective/rlhf_reward": known(scored.score - kl_coef * kl).mean(),
        "objective/scores": raw.mean(),
        "objective/scores_std": raw.std(correction=0) if len(raw) else math.nan,
        "objective/scores_min": raw.min() if len(raw) else math.nan,
        "objective/scores_max": raw.max() if len(raw) else math.nan,
        "objective/unscored_frac": scored.raw.isnan().float().mean(),
        "objective/eos_rate": e.finished.mean(),
        "val/num_eos_tokens": e.finished.sum(),
        "val/sampler_logp_diff": masked_mean((e.sampler_logprobs - e.old_logprobs).abs(), mask),
        "tokens/response_mean": length.mean(),
        "tokens/response_max": length.max(),
        "tokens/truncated_frac": 1 - e.finished.mean(),
        "tokens/prompt_mean": e.prompt_mask.sum(1).float().mean(),
    }
    if len(e.returns):
        scored_mask = mask * ~scored.raw.isnan()[:, None]  # others have no return
        mean_return = masked_mean(e.returns, scored_mask)
        metrics |= {
            "val/explained_variance": explained_variance(e.values, e.returns, scored_mask),
            "val/value_mean": masked_mean(e.values, scored_mask),
            "val/return_mean": mean_return,
            "val/return_std": masked_mean((e.returns - mean_return) ** 2, scored_mask) ** 0.5,
        }
    return {name: float(value) for name, value in metrics.items()}


def known(scores: Tensor) -> Tensor:
    """Scores (B,) without NaN."""
    missing = scores.isnan()
    return scores[~missing] if missing.any() else scores


def source_metrics(names: Sequence[str], e: Experience) -> dict[str, float]:
    """Mean and standard deviation of each source's scores, of the responses that it applies to.

    With functions also the share of responses without a score, and that of errors (on_error=skip).
    """
    metrics = {}
    for i, (name, column) in enumerate(zip(names, e.scores.unbind(1))):
        of_responses = known(column)
        metrics[f"reward/{name}/mean"] = float(of_responses.mean())
        deviation = float(of_responses.std(correction=0)) if len(of_responses) else math.nan
        metrics[f"reward/{name}/std"] = deviation
        if len(e.reward_errors):
            metrics[f"reward/{name}/none_rate"] = 1 - len(of_responses) / len(column)
            metrics[f"reward/{name}/error_rate"] = float(e.reward_errors[:, i].mean())
    return metrics


def drawn_metrics(asked: Sequence[Prompts], raw: Tensor, k: int) -> dict[str, float]:
    """Metrics of all prompts that were drawn for a rollout, in it or not.

    Args: raw (B,): scores of the k responses to each prompt; NaN where there is none.
    """
    metrics = {"rollout/prompts_drawn": len(raw) / k}
    if k > 1:
        metrics["frac_reward_zero_std"] = 1 - float(differ(raw, k).float().mean())
    if len(asked) > 1:
        metrics["rollout/scores_drawn"] = float(known(raw).mean())
    return metrics | difficulty_metrics([row for part in asked for row in part.rows], raw)


def difficulty_metrics(prompts: Sequence[Prompt], raw: Tensor) -> dict[str, float]:
    """Mean score by the column `difficulty` of the prompts, where they have one.

    With a score of 0 or 1 this is the pass rate. A column of fractions, which would make a metric
    of almost every prompt, is skipped.

    Args: prompts: of each response.  raw (B,): scores; NaN where there is none.
    """
    levels: dict[str, list[float]] = defaultdict(list)
    for prompt, score in zip(prompts, raw.tolist()):
        level = columns_of(prompt).get("difficulty")
        if isinstance(level, str | int) and not math.isnan(score):
            levels[str(level)].append(score)
    return {f"reward/difficulty/{level}": sum(s) / len(s) for level, s in sorted(levels.items())}


def response_rows(
    e: Experience, scored: Scored, rewards: Rewards, count: int
) -> list[dict[str, Any]]:
    """The first `count` responses of a rollout (-1: all) as rows for rollouts.jsonl.

    Each has its prompt, text and scores, and for every token its log-prob, KL, reward, advantage
    and, with a critic, value and return. `score` is the weighted sum of the sources, `score_used`
    what penalties, scale and clip make of it. What a response does not have is null.
    """
    tokenizer = rewards.tokenizer
    per_token = {
        "logp": e.old_logprobs,
        "kl": e.old_logprobs - e.ref_logprobs,
        "reward": scored.token_rewards,
        "advantage": e.advantages,
    }
    if len(e.returns):
        per_token |= {"value": e.values, "return": e.returns}
    rows = []
    for i in range(len(e.response_mask))[: count if count >= 0 else None]:
        n = int(e.response_mask[i].sum())
        row: dict[str, Any] = {
            "prompt": tokenizer.decode(e.prompt_ids[i][e.prompt_mask[i] > 0]),  # as it was read
            "response": e.text(i, tokenizer),
            "finished": bool(e.finished[i]),
            "score": or_null(rewards.total(e.scores[i])),
            "score_used": or_null(scored.score[i]),
        }
        row |= {f"score_{name}": or_null(value) for name, value in zip(rewards.names, e.scores[i])}
        row["tokens"] = tokenizer.convert_ids_to_tokens(e.response_ids[i, :n].tolist())
        for name, values in per_token.items():
            row[name] = [
                None if math.isnan(x) else round(x, 5) + 0.0 for x in values[i, :n].tolist()
            ]
        rows.append(row)
    return rows


def or_null(value: Tensor) -> float | None:
    """A number as JSON has it: None for NaN."""
    number = float(value)
    return None if math.isnan(number) else number


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over the masked tokens, shapes (B, R).

    0 for a constant value, negative when worse than that; NaN if Var(G) = 0.
    """
    error = returns - values
    residual = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return float(1 - residual / total) if float(total) > 0 else math.nan
