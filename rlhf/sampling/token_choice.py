"""Choose the next token from logits: temperature, top-p, top-k, greedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Only the first is for training: the others change the distribution that the log-probabilities are of."""

    temperature: float = 1.0  # divides the logits, > 0
    top_p: float = 1.0  # from the likeliest tokens that together have this probability
    top_k: int = 0  # from so many of the likeliest; 0 = all
    greedy: bool = False  # the likeliest
    beams: int = 1  # more: the likeliest answer that a beam search of this width finds


def scale_by_temperature(logits: Tensor, sampling: Sampling) -> Tensor:
    return logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature


def choose_token(probabilities: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """One token (B, 1) from each row of probabilities (B, V), by a number in [0, 1) each, draws (B, 1)."""
    last: Any = probabilities.shape[1] - 1  # which rounding must not lead past
    if sampling.greedy:
        return probabilities.argmax(-1, keepdim=True)
    if sampling.top_k or sampling.top_p < 1:
        falling, order = probabilities.double().sort(descending=True, stable=True)
        kept = falling.cumsum(-1) - falling < sampling.top_p * falling.sum(
            -1, keepdim=True
        )  # the one that reaches top_p is in
        if sampling.top_k:
            kept &= torch.arange(kept.shape[1], device=kept.device) < sampling.top_k
        probabilities = torch.zeros_like(falling).scatter(1, order, falling * kept)
        last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=last)
