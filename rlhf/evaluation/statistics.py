"""Statistics of evaluations: repetition, best-of-n, confidence intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def repetition(ids: list[int], n: int = 3) -> float:
    """Share of a response's n-grams that occur earlier in it: 0 if all differ, near 1 for a loop.

    0 for fewer than n tokens. Source: Welleck 2020, arXiv:1908.04319, seq-rep-n.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """The expected value of the response with the highest score among n; unbiased, from N >= n.

    The i-th lowest of N responses is the highest of n with probability C(i - 1, n - 1) / C(N, n)
    (Nakano 2021, arXiv:2112.09332, appendix I).

    Args: scores, values (P, N): N responses to each of P prompts.  Returns: mean over the prompts.
    """
    total = scores.shape[1]
    chances = torch.tensor(
        [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)], dtype=torch.float64
    )
    in_order = values.double().gather(1, scores.argsort(dim=1, stable=True))
    return float((in_order * chances).sum(1).mean())


def wilson_interval(wins: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, in [0, 1] (Wilson 1927). Args: wins of n; ties count half."""
    z, p = 1.959964, wins / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
