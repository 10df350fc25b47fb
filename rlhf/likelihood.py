"""The likelihood of given texts under a policy: what SFT learns by, and PPO's pretraining loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.data.batches import pad_right
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
