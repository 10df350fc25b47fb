"""Best-of-n: the score and gold reward of the response with the highest score among n."""

from __future__ import annotations

import dataclasses
import math

import torch

from rlhf.config.schema import Config
from rlhf.data import encoding
from rlhf.data.batches import uniforms
from rlhf.data.records import Dataset
from rlhf.evaluation.statistics import best_of_n, sizes
from rlhf.reporting.eval_results import BestOfPoint
from rlhf.rl.experience import Models, Prompts, make_experience
from rlhf.sampling.token_choice import Sampling


def best_of(models: Models, data: Dataset, cfg: Config) -> list[BestOfPoint]:
    """Choose the best of n responses by the first source of the score, for n = 1, 2, 4, ...

    Returns: for each n the score, the gold reward where it is known, and the upper bound
    log n - (n - 1) / n of the KL (Stiennon 2020, arXiv:2009.01325, appendix G.3). Empty without
    eval.best_of, or without rewards.
    """
    node = cfg.eval
    if not node.best_of or models.rewards is None:
        return []
    prompts = data.eval_prompts[: node.best_of_prompts]
    turns = [prompt.turns for prompt in prompts]
    encoded = encoding.encode_prompts(models.tokenizer, turns, cfg.data.max_prompt_tokens)
    asked = [prompt for prompt in prompts for _ in range(node.best_of)]
    ids = [row for row in encoded if row is not None for _ in range(node.best_of)]
    random = uniforms("best of n", range(len(ids)), 0, 0, cfg.rollout.max_new_tokens)
    experience = make_experience(
        dataclasses.replace(models, ref=None),
        Prompts(asked, ids, random, per_prompt=node.best_of),
        Sampling(node.temperature, node.top_p, node.top_k),
        cfg.deploy.eval_micro_batch,
    )
    shape = (len(prompts), node.best_of)
    scores = experience.scores[:, 0].view(shape).cpu()
    scored = ~scores.isnan().any(1)  # prompts to all of whose responses the source applies
    if not scored.any():
        return []
    gold = None
    if data.gold:
        texts = [experience.text(i, models.tokenizer) for i in range(len(asked))]
        gold = torch.tensor([data.gold(p.turns, text) for p, text in zip(asked, texts)]).view(shape)
    return [
        BestOfPoint(
            n,
            score=best_of_n(scores[scored], scores[scored], n),
            kl=math.log(n) - (n - 1) / n,
            gold=None if gold is None else best_of_n(scores[scored], gold[scored], n),
        )
        for n in sizes(node.best_of)
    ]
