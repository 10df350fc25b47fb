"""Choose the next token from logits: temperature, top-p, top-k, greedy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Training uses the temperature only: the other settings sample from another distribution than
    the one that the log-probabilities are computed from.
    """

    temperature: float = 1.0  # divides the logits, > 0
    top_p: float = 1.0  # sample from the most likely tokens that together have this probability
    top_k: int = 0  # sample from the K most likely tokens; 0 = all
    greedy: bool = False  # take the most likely token
    beams: int = 1  # > 1: the most likely response that a beam search of this width finds
    n: int = 1  # responses to each prompt, in evaluations; online RL repeats its prompts itself


def sample_token(logits: Tensor, random: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability before top-p and top-k, nats.

    Args:
        logits: (B, V) of any precision.
        random: (B, 1) in [0, 1).
    Returns: (B, 1), and (B,) in float32.
    """
    scaled = logits.float()
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    probabilities = scaled.softmax(-1)
    token = choose_token(probabilities, random, sampling)
    return token, probabilities.gather(1, token)[:, 0].log()


def choose_token(probabilities: Tensor, random: Tensor, sampling: Sampling) -> Tensor:
    """One token from each row, (B, 1), by inverse transform sampling.

    Args:
        probabilities: (B, V), each row sums to 1.
        random: (B, 1) in [0, 1).
    """
    if sampling.greedy:
        return probabilities.argmax(-1, keepdim=True)
    # rounding must not lead past the last token that may be chosen
    last = torch.full_like(probabilities[:, :1], probabilities.shape[1] - 1, dtype=torch.long)
    if sampling.top_k or sampling.top_p < 1:
        descending, order = probabilities.double().sort(descending=True, stable=True)
        total = descending.sum(-1, keepdim=True)
        # the token that reaches top_p is kept
        kept = descending.cumsum(-1) - descending < sampling.top_p * total
        if sampling.top_k:
            kept &= torch.arange(kept.shape[1], device=kept.device) < sampling.top_k
        probabilities = torch.zeros_like(descending).scatter(1, order, descending * kept)
        last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    targets = random * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).minimum(last)
