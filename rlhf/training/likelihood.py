"""The likelihood of given texts under a policy: what SFT and DPO learn by, the pretraining loss, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.data.batches import chunks, first_loss_token, pad_right
from rlhf.distributed import collectives

Row = tuple[list[int], list[int]]  # token ids of prompt and answer


def response_nll_stats(
    policy: Any, rows: Sequence[Row], pad_id: int, train_on_prompt: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over all answer tokens (EOS included) of `rows`: -log p (with gradient), number of correct guesses, entropy in nats.

    Args: train_on_prompt: over the prompts' tokens too.
    """
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id, policy.device)
    starts = torch.tensor(
        [first_loss_token(prompt, train_on_prompt) for prompt, _ in rows], device=ids.device
    )
    learnt = (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]) & (mask > 0)
    logp, entropy, correct = policy(ids, mask, learnt)
    return -logp.sum(), correct.sum(), entropy.detach().sum()


def response_logprobs(policy: Any, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    """Log-probability of each whole answer given its prompt, EOS included, (B,), nats."""
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id, policy.device)
    starts = torch.tensor([len(prompt) for prompt, _ in rows], device=ids.device)
    answers = (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]) & (mask > 0)
    return policy(ids, mask, answers)[0].sum(1)


@torch.no_grad()
def perplexity(policy: Any, rows: Sequence[Row], pad_id: int, micro_batch: int) -> float:
    """exp of the mean -log p over all answer tokens of all rows (token ids of prompt and answer); the work is shared by all processes."""
    world = collectives.world_size()
    nothing: Row = (rows[0][0], [])  # so that every process has the same number of rows
    mine = [*rows, *[nothing] * (-len(rows) % world)][collectives.rank() :: world]
    nll = sum(
        float(response_nll_stats(policy, part, pad_id)[0]) for part in chunks(mine, micro_batch)
    )
    total, tokens = collectives.all_reduce_sum(
        [nll, sum(len(answer) for _, answer in mine)], policy.device
    )
    return math.exp(min(total / tokens, 50.0))
