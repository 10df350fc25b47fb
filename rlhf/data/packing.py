"""Short demonstrations share a row, where padding would be: the same losses and gradients as those of padded rows.

A row is as long as the longest demonstration of its micro-batch, so this gains where others are at most half as long. 64
demonstrations, padded against packed (builtin:tiny, one core, forward and backward, medians of 5 in turns, micro-batches of 16 made as
training makes them, by length; in brackets all 64 in one):

    190 to 210 tokens                       0.44 s    0.44 s    1.0 times as fast  (1.0)
    20 to 400 tokens                        0.62 s    0.62 s    1.0                (1.9)
    30, 60, 120 or 400 tokens               0.34 s    0.27 s    1.3                (3.7)
    30 to 60 tokens, one of 16 has 400      0.31 s    0.14 s    2.2                (7.5)

All of a micro-batch in one row would take 1.5 to 4.5 times as long as padding: attention costs the square of a row's length.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def first_learnt(prompt: Sequence[int], train_on_prompt: bool) -> int:
    """Place of the first token of a demonstration that is learnt; all behind it are learnt too. Never 0: nothing predicts that one."""
    return 1 if train_on_prompt else max(1, len(prompt))


def pack(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, train_on_prompt: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Put demonstrations one behind the other into R rows of W tokens; the longest demonstration alone has W.

    Args: rows: ids of prompt and answer.
    Returns: ids and position_ids (R, W), the latter from 0 in each demonstration; and where the learnt tokens are, bool (R, W).
        The token in front of a learnt one is always of the same demonstration. What a row lacks is filled with `pad_id`: one more
        sequence, with positions from 0, of which nothing is learnt.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    bins = fitted([len(prompt) + len(answer) for prompt, answer in rows], width)
    ids = np.full((len(bins), width), pad_id, dtype=np.int64)
    position_ids = np.zeros((len(bins), width), dtype=np.int64)
    learnt = np.zeros((len(bins), width), dtype=bool)
    for row, members in enumerate(bins):
        start = 0
        for prompt, answer in (rows[i] for i in members):
            end = start + len(prompt) + len(answer)
            ids[row, start:end] = [*prompt, *answer]
            position_ids[row, start:end] = np.arange(end - start)
            learnt[row, start + first_learnt(prompt, train_on_prompt) : end] = True
            start = end
        position_ids[row, start:] = np.arange(width - start)
    return torch.from_numpy(ids).to(device), torch.from_numpy(position_ids).to(device), torch.from_numpy(learnt).to(device)


def fitted(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of the sequences of each row: the longest first, each into the first row with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(room) if lengths[i] <= free), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(width)
        bins[row].append(i)
        room[row] -= lengths[i]
    return bins


@torch.no_grad()
def can_pack(policy: Any) -> bool:
    """Whether a model keeps the demonstrations of packed rows apart. It is tried: random tokens behind others, in both of two rows,
    must get the logits that they get in a row of their own. Models with an attention of their own (BLOOM, GPT-Neo, ...) are not
    tried; flash attention keeps them apart in a single row only.

    Args: policy: the engine of a models.Policy. All processes call this: it takes two forwards or none, the same on each.
    """
    module = policy.module
    through_interface = getattr(module.hf, "_supports_attention_backend", False)  # transformers' word for it; some others would raise
    if not through_interface or "position_ids" not in inspect.signature(module.hf.forward).parameters:
        return False
    vocabulary = module.hf.get_input_embeddings().num_embeddings
    random = torch.randint(vocabulary, (1, 24 + 13), generator=torch.Generator().manual_seed(0)).to(policy.device)
    other, text = random[:, :24], random[:, 24:]
    changed = torch.cat([other[:, :6], text[:, 6:]], 1)
    two_rows = torch.cat([random, torch.cat([other[:, :11], text, other[:, 11:]], 1)])  # the text at 24, and at 11
    position_ids = torch.tensor([[*range(24), *range(13)], [*range(11), *range(13), *range(13)]], device=policy.device)
    training = module.training
    policy.eval()  # without the dropout of an adapter
    alone, moved = policy(torch.cat([text, changed]), torch.ones_like(text).expand(2, -1), 12).float()
    logits = policy(two_rows, None, 24 + 12, position_ids).float()
    packed = torch.stack([logits[0, 24:], logits[1, 11 : 11 + 12]])
    policy.train(training)
    # What counts as a difference: how far the logits move when the text begins with other tokens. Tokens that see the text before
    # their own move at least 0.97 times as far, the rounding of bf16 at most 0.05 times (7 families, random weights, 2 to 12 layers).
    error, effect = (packed - alone).abs().mean(-1).max(), (moved - alone)[6:].abs().mean()
    return bool(error < 0.25 * effect)
