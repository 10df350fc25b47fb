"""What is measured of a policy: on held-out prompts, and of each rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from rlhf.config import KlEstimator
from rlhf.data import template
from rlhf.data.batches import uniforms
from rlhf.data.records import Dataset
from rlhf.decode import Sampling
from rlhf.objectives import explained_variance, kl_estimate, masked_mean, repetition
from rlhf.rewards import Rewards
from rlhf.rollout import Experience, Models, make_experience

Found = tuple[dict[str, float], list[dict[str, Any]]]  # of an evaluation: means, and a row for each answer


def evaluate_policy(
    models: Models, data: Dataset, max_prompt_tokens: int, max_new_tokens: int, sampling: Sampling, micro_batch: int
) -> Found:
    """Sample one answer to each held-out prompt, with a fixed random stream per prompt, and measure.

    Returns: means over the answers, `eos_rate`, `length` (tokens), `repetition` (objectives.repetition), and where they are known
        `gold`, `gold_best`, `score` (weighted sum), `score/NAME` of each of several sources, `kl` (nats per answer, the sum over
        tokens of log pi - log ref); and one row per answer for the tables.
    """
    tokenizer, rewards = models.tokenizer, models.rewards
    encoded = template.encode_prompts(tokenizer, data.eval_prompts, max_prompt_tokens)
    kept = [(turns, ids) for turns, ids in zip(data.eval_prompts, encoded) if ids is not None]
    if not kept:
        raise ValueError(f"data.max_prompt_tokens={max_prompt_tokens}: all held-out prompts are longer")
    asked, prompts = [turns for turns, _ in kept], [ids for _, ids in kept]
    draws = uniforms("evaluation", range(len(kept)), 0, 0, max_new_tokens)
    e = make_experience(replace(models, critic=None), prompts, asked, draws, sampling, micro_batch)
    kl = (e.old_logp - e.ref_logp).sum(1)
    rows: list[dict[str, Any]] = []
    for i, turns in enumerate(asked):
        answer = e.text(i, tokenizer)
        tokens = e.response_ids[i][e.mask[i] > 0].tolist()
        row: dict[str, Any] = {"prompt": turns[-1].text, "completion": answer}
        row |= {"length": len(tokens), "eos_rate": float(e.ended[i]), "repetition": repetition(tokens)}
        if rewards is not None:
            row["score"] = float(rewards.total(e.scores[i]))
            if len(rewards.sources) > 1:
                row |= {f"score/{name}": float(score) for name, score in zip(rewards.names, e.scores[i])}
        row |= {"kl": float(kl[i])} if models.ref is not None else {}
        row |= {"gold": data.gold(turns, answer)} if data.gold else {}
        row |= {"gold_best": data.best_gold(turns)} if data.best_gold else {}
        rows.append(row)
    numbers = [key for key in rows[0] if key not in ("prompt", "completion")]
    return {key: sum(row[key] for row in rows) / len(rows) for key in numbers}, rows


def rollout_metrics(
    e: Experience, raw_score: Tensor, score: Tensor, penalty: Tensor, returns: Tensor | None, beta: float
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
            "val/return_std": masked_mean((returns - masked_mean(returns, e.mask)) ** 2, e.mask) ** 0.5,
        }
    return {key: float(value) for key, value in metrics.items()}


def before_and_after(before: Found, after: Found) -> Found:
    """The metrics of the evaluations at a run's start and end as eval/NAME (_before), and their answers side by side."""
    (old, old_rows), (new, new_rows) = before, after
    metrics = {f"eval/{key}": value for key, value in new.items()}
    metrics |= {f"eval/{key}_before": old[key] for key in ("score", "gold", "length", "eos_rate", "repetition") if key in old}
    rows = [
        {"prompt": b["prompt"], "before": a["completion"], "after": b["completion"]}
        | {f"{key}_{when}": row[key] for key in ("score", "gold") if key in b for when, row in (("before", a), ("after", b))}
        | {"kl": b["kl"], "length": b["length"]}
        for a, b in zip(old_rows, new_rows)
    ]
    return metrics, rows


def answer_rows(
    e: Experience, score: Tensor, reward: Tensor, advantages: Tensor, returns: Tensor | None, rewards: Rewards, count: int
) -> list[dict[str, Any]]:
    """The first `count` of the answers of a rollout (-1: all) as rows for rollouts.jsonl, with what every token was given. `score` is
    the weighted sum of the sources, `score_learnt` what penalties, scale and clip made of it."""
    rows = []
    kl = e.old_logp - e.ref_logp
    per_token = {"logp": e.old_logp, "kl": kl, "reward": reward, "advantage": advantages}
    per_token |= {"value": e.old_values, "return": returns} if returns is not None else {}
    for i in range(len(e.mask))[: count if count >= 0 else None]:
        n = int(e.mask[i].sum())
        prompt = rewards.tokenizer.decode(e.prompt_ids[i][e.prompt_mask[i] > 0])  # all turns, as the policy reads them
        row: dict[str, Any] = {"prompt": prompt, "answer": e.text(i, rewards.tokenizer), "ended": bool(e.ended[i])}
        row |= {"score": float(rewards.total(e.scores[i])), "score_learnt": float(score[i])}
        row |= {f"score_{name}": float(value) for name, value in zip(rewards.names, e.scores[i])}
        row["tokens"] = rewards.tokenizer.convert_ids_to_tokens(e.response_ids[i, :n].tolist())
        rows.append(row | {key: [round(x, 5) + 0.0 for x in value[i, :n].tolist()] for key, value in per_token.items()})
    return rows
