"""Evaluate a policy on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.data import encoding
from rlhf.data.batches import uniforms
from rlhf.data.records import Dataset, Turn
from rlhf.evaluation.statistics import repetition
from rlhf.rl.experience import Experience, Models, Prompts, make_experience
from rlhf.rl.rewards import check_finite
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

    With sampling.n > 1 several, side by side; the first ones are those of sampling.n = 1.

    Returns: the means over the responses, and a row per response with `prompt`, `completion`, where
    it has any the prompt's other `columns`, and the same numbers: `eos_rate`, `length` (tokens),
    `repetition` (statistics.repetition), and where they are known `gold`, `gold_best`, `score`
    (weighted sum), `score/NAME` of each of several sources, `kl` (nats per response: the sum over
    tokens of log pi - log ref). A score is None where no source applies to the response; it is not
    in the mean.
    Raises: UserError where all prompts are too long, or a reward model's score is not finite.
    """
    turns = [prompt.turns for prompt in data.eval_prompts]
    encoded = encoding.encode_prompts(models.tokenizer, turns, max_prompt_tokens)
    kept = [(prompt, ids) for prompt, ids in zip(data.eval_prompts, encoded) if ids is not None]
    if not kept:
        raise UserError(
            f"all held-out prompts are too long (data.max_prompt_tokens={max_prompt_tokens}): "
            "raise it"
        )
    n = sampling.n
    each = f"{n} responses to each of" if n > 1 else "responses to"
    log.info(f"evaluation: sampling {each} {len(kept):,} held-out prompts")
    streams = [uniforms("evaluation", range(len(kept)), 0, i, max_new_tokens) for i in range(n)]
    random = torch.stack(streams, 1).flatten(0, 1)
    repeated = [row for row in kept for _ in range(n)]
    prompts = Prompts([prompt for prompt, _ in repeated], [ids for _, ids in repeated], random, n)
    experience = make_experience(replace(models, critic=None), prompts, sampling, micro_batch)
    for k, source in enumerate(models.rewards.sources if models.rewards else ()):
        if source.engine:  # of a function NaN means that it does not apply
            check_finite(f"the reward model {source.name}", experience.scores[:, k])
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
    return means(rows), rows


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number over the rows that have it; one that no row has is left out."""
    keys = [key for key in rows[0] if key not in ("prompt", "completion", "columns")]
    known = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    if unscored := len(rows) - len(known.get("score", rows)):
        log.info(
            f"{unscored:,} of {len(rows):,} responses have no score: no source applies to them"
        )
    return {key: sum(values) / len(values) for key, values in known.items() if values}


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
        row["score"] = number(models.rewards.total(scores))
        if len(models.rewards.sources) > 1:
            names = models.rewards.names
            row |= {f"score/{name}": number(score) for name, score in zip(names, scores)}
    return row


def number(score: Tensor) -> float | None:
    """A score as a number; None where it is NaN, which means that no source applies."""
    value = float(score)
    return None if math.isnan(value) else value


def before_and_after(before: PolicyEvaluation, after: PolicyEvaluation) -> PolicyEvaluation:
    """Put the evaluations at the start and at the end of a run beside each other.

    Returns: metrics as eval/NAME and eval/NAME_before; rows for samples.jsonl.
    """
    (old, old_rows), (new, new_rows) = before, after
    metrics = {f"eval/{key}": value for key, value in new.items()}
    metrics |= {
        f"eval/{key}_before": value
        for key, value in old.items()
        if key.partition("/")[0] in ("score", "gold", "length", "eos_rate", "repetition")
    }
    rows = []
    for a, b in zip(old_rows, new_rows):
        row = {"prompt": b["prompt"], "before": a["completion"], "after": b["completion"]}
        for key in ("score", "gold"):
            if key in b:
                row |= {f"{key}_before": a[key], f"{key}_after": b[key]}
        row |= {key: b[key] for key in ("kl", "length", "columns") if key in b}
        rows.append(row)
    return metrics, rows
