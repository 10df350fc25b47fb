"""The likelihood of given texts under a policy: what SFT and DPO learn by, the pretraining loss, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf import comm
from rlhf.data.batches import chunks, pad_right

Row = tuple[list[int], list[int]]  # token ids of prompt and answer


def first_learnt(prompt: Sequence[int], train_on_prompt: bool) -> int:
    """Place of the first token of a demonstration that is learnt; all behind it are learnt too. Never 0: nothing predicts that one."""
    return 1 if train_on_prompt else max(1, len(prompt))


def answer_sums(
    policy: Any, rows: Sequence[Row], pad_id: int, train_on_prompt: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over all answer tokens (EOS included) of `rows`: -log p (with gradient), number of correct guesses, entropy in nats.

    Args: train_on_prompt: over the prompts' tokens too.
    """
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id, policy.device)
    starts = torch.tensor([first_learnt(prompt, train_on_prompt) for prompt, _ in rows], device=ids.device)
    learnt = (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]) & (mask > 0)
    logp, entropy, correct = policy(ids, mask, learnt)
    return -logp.sum(), correct.sum(), entropy.detach().sum()


def answer_logp(policy: Any, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    """Log-probability of each whole answer given its prompt, EOS included, (B,), nats."""
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id, policy.device)
    starts = torch.tensor([len(prompt) for prompt, _ in rows], device=ids.device)
    answers = (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]) & (mask > 0)
    return policy(ids, mask, answers)[0].sum(1)


@torch.no_grad()
def perplexity(policy: Any, rows: Sequence[Row], pad_id: int, micro_batch: int) -> float:
    """exp of the mean -log p over all answer tokens of all rows (token ids of prompt and answer); the work is shared by all processes."""
    world = comm.world_size()
    nothing: Row = (rows[0][0], [])  # so that every process has the same number of rows
    mine = [*rows, *[nothing] * (-len(rows) % world)][comm.rank() :: world]
    nll = sum(float(answer_sums(policy, part, pad_id)[0]) for part in chunks(mine, micro_batch))
    total, tokens = comm.all_sum([nll, sum(len(answer) for _, answer in mine)], policy.device)
    return math.exp(min(total / tokens, 50.0))
