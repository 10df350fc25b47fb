"""The likelihood of given texts under a policy.

SFT and DPO train on it; it is the pretraining loss, and gives perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.batches import chunks, first_loss_token, pad_right
from rlhf.distributed import collectives
from rlhf.models.wrappers import LogProbModel

Row = tuple[list[int], list[int]]  # token ids of prompt and response


def response_nll_stats(
    policy: LogProbModel, rows: Sequence[Row], pad_id: int, train_on_prompt: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens in the loss, which are the responses with their EOS.

    Args: train_on_prompt: the prompts' tokens are in the loss too.
    Returns: three scalars: -log p (nats, with gradient), the number of tokens that are the
        likeliest, and entropy (nats).
    """
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id)
    starts = [first_loss_token(prompt, train_on_prompt) for prompt, _ in rows]
    stats = policy(ids, mask, mask_from(starts, mask))
    return -stats.logprobs.sum(), stats.is_argmax.sum(), stats.entropy.detach().sum()


def response_logprobs(policy: LogProbModel, rows: Sequence[Row], pad_id: int) -> Tensor:
    """Log-probability of each response given its prompt, EOS included, (B,), nats."""
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_id)
    starts = [len(prompt) for prompt, _ in rows]
    return policy(ids, mask, mask_from(starts, mask))[0].sum(1)


def mask_from(starts: Sequence[int], mask: Tensor) -> Tensor:
    """The real tokens of each row from `starts` (B,) on, (B, T) bool. Args: mask (B, T)."""
    first = torch.tensor(starts)[:, None]
    return (torch.arange(mask.shape[1]) >= first) & (mask > 0)


def rows_of_rank(rows: Sequence[Row]) -> list[Row]:
    """This rank's rows. Some may have no response, so that every rank gets the same number."""
    world = collectives.world_size()
    filler: Row = (rows[0][0], [])
    return [*rows, *[filler] * (-len(rows) % world)][collectives.rank() :: world]


@torch.no_grad()
def perplexity(policy: LogProbModel, rows: Sequence[Row], pad_id: int, micro_batch: int) -> float:
    """exp of the mean -log p over the response tokens of all rows, which ranks share out.

    Args: micro_batch: rows per forward pass.
    """
    mine = rows_of_rank(rows)
    nll = sum(
        float(response_nll_stats(policy, part, pad_id)[0]) for part in chunks(mine, micro_batch)
    )
    tokens = sum(len(answer) for _, answer in mine)
    total, count = collectives.all_reduce_sum([nll, tokens], policy.device)
    return math.exp(min(total / count, 50.0))


@torch.no_grad()
def end_probability(
    policy: LogProbModel, rows: Sequence[Row], eos_id: int, pad_id: int, micro_batch: int
) -> float:
    """Mean probability of the end token after the responses that end with it; 1 without any."""
    whole = [row for row in rows if row[1] and row[1][-1] == eos_id]
    if not whole:
        return 1.0
    total = 0.0
    mine = rows_of_rank(whole)
    for part in chunks(mine, micro_batch):
        ids, mask = pad_right([prompt + answer for prompt, answer in part], pad_id)
        # the last token only; none of a row without a response
        starts = [len(prompt) + max(0, len(answer) - 1) for prompt, answer in part]
        logprobs = policy(ids, mask, mask_from(starts, mask)).logprobs.sum(1).cpu()
        real = torch.tensor([bool(answer) for _, answer in part])
        total += float((logprobs.exp() * real).sum())
    return collectives.all_reduce_sum([total], policy.device)[0] / len(whole)
