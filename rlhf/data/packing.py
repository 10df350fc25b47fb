"""Demonstrations one behind the other in a single row, without padding: the same losses and gradients as those of padded rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_learnt(prompt: Sequence[int], train_on_prompt: bool) -> int:
    """Place of the first token of a demonstration that is learnt; all behind it are learnt too. Never 0: nothing predicts that one."""
    return 1 if train_on_prompt else max(1, len(prompt))


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], train_on_prompt: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Put demonstrations into one row, T tokens in all.

    Args: rows: ids of prompt and answer.
    Returns: ids and position_ids (1, T), the latter from 0 in each demonstration; and where the learnt tokens are, bool (1, T).
        The token in front of a learnt one is always of the same demonstration.
    """
    ids: list[int] = []
    position_ids: list[int] = []
    learnt: list[bool] = []
    for prompt, answer in rows:
        length = len(prompt) + len(answer)
        first = first_learnt(prompt, train_on_prompt)
        ids += [*prompt, *answer]
        position_ids += range(length)
        learnt += [place >= first for place in range(length)]
    return torch.tensor([ids], device=device), torch.tensor([position_ids], device=device), torch.tensor([learnt], device=device)


@torch.no_grad()
def can_pack(policy: Any) -> bool:
    """Whether a model keeps the demonstrations of a packed row apart. It is tried: random tokens behind others in one row must get
    the logits that they get in a row of their own. Models with an attention of their own (BLOOM, GPT-Neo, ...) are not tried.

    Args: policy: the engine of a models.Policy. All processes call this: it takes two forwards or none, the same on each.
    """
    module = policy.module
    through_interface = getattr(module.hf, "_supports_attention_backend", False)  # transformers' word for it; some others would raise
    if not through_interface or "position_ids" not in inspect.signature(module.hf.forward).parameters:
        return False
    vocabulary = module.hf.get_input_embeddings().num_embeddings
    random = torch.randint(vocabulary, (1, 24 + 13), generator=torch.Generator().manual_seed(0)).to(policy.device)
    position_ids = torch.tensor([[*range(24), *range(13)]], device=policy.device)
    other, text = random[:, :24], random[:, 24:]
    changed = torch.cat([other[:, :6], text[:, 6:]], 1)
    training = module.training
    policy.eval()  # without the dropout of an adapter
    alone, moved = policy(torch.cat([text, changed]), torch.ones_like(text).expand(2, -1), 12).float()
    packed = policy(random, None, 12, position_ids)[0].float()
    policy.train(training)
    # What counts as a difference: how far the logits move when the text begins with other tokens. Tokens that see the text before
    # their own move at least 0.97 times as far, the rounding of bf16 at most 0.05 times (7 families, random weights, 2 to 12 layers).
    error, effect = (packed - alone).abs().mean(-1).max(), (moved - alone)[6:].abs().mean()
    return bool(error < 0.25 * effect)
