"""Evaluate a policy on held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.data import encoding
from rlhf.data.batches import uniforms
from rlhf.data.records import Dataset, Turn
from rlhf.evaluation.statistics import repetition
from rlhf.rl.experience import Experience, Models, Prompts, make_experience
from rlhf.sampling.token_choice import Sampling

PolicyEvaluation = tuple[dict[str, float], list[dict[str, Any]]]  # means; a row per response


def evaluate_policy(
    models: Models,
    data: Dataset,
    max_prompt_tokens: int,
    max_new_tokens: int,
    sampling: Sampling,
    micro_batch: int,
) -> PolicyEvaluation:
    """Sample a response to each held-out prompt, with a fixed random stream per prompt; measure it.

    Returns: the means over the responses, and a row per response with `prompt`, `completion`, where
    it has any the prompt's other `columns`, and the same numbers: `eos_rate`, `length` (tokens),
    `repetition` (statistics.repetition), and where they are known `gold`, `gold_best`, `score`
    (weighted sum), `score/NAME` of each of several sources, `kl` (nats per response: the sum over
    tokens of log pi - log ref).
    Raises: UserError where all prompts are too long.
    """
    turns = [prompt.turns for prompt in data.eval_prompts]
    encoded = encoding.encode_prompts(models.tokenizer, turns, max_prompt_tokens)
    kept = [(prompt, ids) for prompt, ids in zip(data.eval_prompts, encoded) if ids is not None]
    if not kept:
        raise UserError(
            f"all held-out prompts are too long (data.max_prompt_tokens={max_prompt_tokens}): "
            "raise it"
        )
    log.info(f"evaluation: sampling responses to {len(kept):,} held-out prompts")
    random = uniforms("evaluation", range(len(kept)), 0, 0, max_new_tokens)
    prompts = Prompts([prompt for prompt, _ in kept], [ids for _, ids in kept], random)
    experience = make_experience(replace(models, critic=None), prompts, sampling, micro_batch)
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    rows = []
    for i, prompt in enumerate(prompts.rows):
        row = response_row(models, experience, i, prompt.turns)
        if columns := prompt.short_columns():
            row["columns"] = columns
        if models.ref is not None:
            row["kl"] = float(kl[i])
        if data.gold:
            row["gold"] = data.gold(prompt.turns, row["completion"])
        if data.best_gold:
            row["gold_best"] = data.best_gold(prompt.turns)
        rows.append(row)
    metrics = [key for key in rows[0] if key not in ("prompt", "completion", "columns")]
    return {key: sum(row[key] for row in rows) / len(rows) for key in metrics}, rows


def response_row(
    models: Models, experience: Experience, i: int, turns: list[Turn]
) -> dict[str, Any]:
    """Text, length and scores of row `i`. Args: turns: its prompt."""
    tokens = experience.response_ids[i][experience.response_mask[i] > 0].tolist()
    row: dict[str, Any] = {
        "prompt": turns[-1].text,
        "completion": experience.text(i, models.tokenizer),
        "length": len(tokens),
        "eos_rate": float(experience.finished[i]),
        "repetition": repetition(tokens),
    }
    if models.rewards is not None:
        scores = experience.scores[i]
        row["score"] = float(models.rewards.total(scores))
        if len(models.rewards.sources) > 1:
            names = models.rewards.names
            row |= {f"score/{name}": float(score) for name, score in zip(names, scores)}
    return row


def before_and_after(before: PolicyEvaluation, after: PolicyEvaluation) -> PolicyEvaluation:
    """Put the evaluations at the start and at the end of a run beside each other.

    Returns: metrics as eval/NAME and eval/NAME_before; rows for samples.jsonl.
    """
    (old, old_rows), (new, new_rows) = before, after
    metrics = {f"eval/{key}": value for key, value in new.items()}
    metrics |= {
        f"eval/{key}_before": old[key]
        for key in ("score", "gold", "length", "eos_rate", "repetition")
        if key in old
    }
    rows = []
    for a, b in zip(old_rows, new_rows):
        row = {"prompt": b["prompt"], "before": a["completion"], "after": b["completion"]}
        for key in ("score", "gold"):
            if key in b:
                row |= {f"{key}_before": a[key], f"{key}_after": b[key]}
        row |= {"kl": b["kl"], "length": b["length"]}
        rows.append(row | ({"columns": b["columns"]} if "columns" in b else {}))
    return metrics, rows
