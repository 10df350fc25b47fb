"""The likelihood of given texts under a policy: what SFT and DPO learn by, the pretraining loss, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf import comm
from rlhf.data.batches import chunks, pad_left, pad_right
from rlhf.data.packing import first_learnt, pack
from rlhf.objectives import token_logp


def answer_sums(
    policy: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int, train_on_prompt: bool = False, packed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over all answer tokens (EOS included) of `rows`: -log p (with gradient), number of correct guesses, entropy in nats.

    Args: train_on_prompt: over the prompts' tokens too.  packed: put several into one row, which takes a policy that can_pack.
    """
    if packed:
        ids, position_ids, learnt = pack(rows, pad_id, train_on_prompt, policy.device)
        logits = policy(ids, None, ids.shape[1] - 1, position_ids)
    else:
        ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id, policy.device)
        learnt = torch.zeros_like(ids, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            learnt[i, first_learnt(prompt, train_on_prompt) : len(prompt) + len(answer)] = True
        logits = policy(ids, mask, ids.shape[1] - 1)
    chosen = learnt[:, 1:]
    logits, targets = logits[chosen], ids[:, 1:][chosen]
    logp, entropy = token_logp(logits, targets)
    return -logp.sum(), (logits.argmax(-1) == targets).sum(), entropy.detach().sum()


def answer_logp(policy: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> torch.Tensor:
    """Log-probability of each whole answer given its prompt, EOS included, (B,), nats. Args: rows: token ids of prompt and answer."""
    prompt_ids, prompt_mask = pad_left([prompt for prompt, _ in rows], pad_id, policy.device)
    answer_ids, answer_mask = pad_right([answer for _, answer in rows], pad_id, policy.device)
    ids, mask = torch.cat([prompt_ids, answer_ids], 1), torch.cat([prompt_mask, answer_mask], 1)
    return (token_logp(policy(ids, mask, answer_ids.shape[1]), answer_ids)[0] * answer_mask).sum(1)


@torch.no_grad()
def perplexity(policy: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int, micro_batch: int) -> float:
    """exp of the mean -log p over all answer tokens of all rows (token ids of prompt and answer); the work is shared by all processes."""
    world = comm.world_size()
    nothing: tuple[list[int], list[int]] = (rows[0][0], [])  # so that every process has the same number of rows
    mine = [*rows, *[nothing] * (-len(rows) % world)][comm.rank() :: world]
    nll = sum(float(answer_sums(policy, part, pad_id)[0]) for part in chunks(mine, micro_batch))
    total, tokens = comm.all_sum([nll, sum(len(answer) for _, answer in mine)], policy.device)
    return math.exp(min(total / tokens, 50.0))
