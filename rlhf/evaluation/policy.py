"""Evaluate a policy on held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf.data import template
from rlhf.data.batches import uniforms
from rlhf.data.records import Dataset
from rlhf.evaluation.statistics import repetition
from rlhf.rl.experience import Models, Prompts, make_experience
from rlhf.sampling.token_choice import Sampling

Found = tuple[
    dict[str, float], list[dict[str, Any]]
]  # of an evaluation: means, and a row for each answer


def evaluate_policy(
    models: Models,
    data: Dataset,
    max_prompt_tokens: int,
    max_new_tokens: int,
    sampling: Sampling,
    micro_batch: int,
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
        raise ValueError(
            f"data.max_prompt_tokens={max_prompt_tokens}: all held-out prompts are longer"
        )
    asked, prompts = [turns for turns, _ in kept], [ids for _, ids in kept]
    draws = uniforms("evaluation", range(len(kept)), 0, 0, max_new_tokens)
    batch = Prompts(asked, prompts, draws)
    e = make_experience(replace(models, critic=None), batch, sampling, micro_batch)
    kl = (e.old_logprobs - e.ref_logprobs).sum(1)
    rows: list[dict[str, Any]] = []
    for i, turns in enumerate(asked):
        answer = e.text(i, tokenizer)
        tokens = e.response_ids[i][e.response_mask[i] > 0].tolist()
        row: dict[str, Any] = {"prompt": turns[-1].text, "completion": answer}
        row |= {
            "length": len(tokens),
            "eos_rate": float(e.finished[i]),
            "repetition": repetition(tokens),
        }
        if rewards is not None:
            row["score"] = float(rewards.total(e.scores[i]))
            if len(rewards.sources) > 1:
                row |= {
                    f"score/{name}": float(score) for name, score in zip(rewards.names, e.scores[i])
                }
        row |= {"kl": float(kl[i])} if models.ref is not None else {}
        row |= {"gold": data.gold(turns, answer)} if data.gold else {}
        row |= {"gold_best": data.best_gold(turns)} if data.best_gold else {}
        rows.append(row)
    numbers = [key for key in rows[0] if key not in ("prompt", "completion")]
    return {key: sum(row[key] for row in rows) / len(rows) for key in numbers}, rows


def before_and_after(before: Found, after: Found) -> Found:
    """The metrics of the evaluations at a run's start and end as eval/NAME (_before), and their answers side by side."""
    (old, old_rows), (new, new_rows) = before, after
    metrics = {f"eval/{key}": value for key, value in new.items()}
    metrics |= {
        f"eval/{key}_before": old[key]
        for key in ("score", "gold", "length", "eos_rate", "repetition")
        if key in old
    }
    rows = [
        {"prompt": b["prompt"], "before": a["completion"], "after": b["completion"]}
        | {
            f"{key}_{when}": row[key]
            for key in ("score", "gold")
            if key in b
            for when, row in (("before", a), ("after", b))
        }
        | {"kl": b["kl"], "length": b["length"]}
        for a, b in zip(old_rows, new_rows)
    ]
    return metrics, rows
