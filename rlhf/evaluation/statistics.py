"""Statistics of evaluations: repetition, best-of-n, pass@k, maj@k, confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    import torch  # not needed by the page, which shows intervals

    total = scores.shape[1]
    chances = torch.tensor(
        [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)], dtype=torch.float64
    )
    in_order = values.double().gather(1, scores.argsort(dim=1, stable=True))
    return float((in_order * chances).sum(1).mean())


def sizes(largest: int) -> list[int]:
    """The powers of two up to `largest`, and `largest`."""
    powers = [2**k for k in range(20) if 2**k <= largest]
    return powers if largest in powers else [*powers, largest]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of k responses to a prompt passes; unbiased, from samples >= k.

    1 - C(samples - passed, k) / C(samples, k) (Chen 2021, arXiv:2107.03374, equation 1). The
    binomials are exact integers, so no number of samples overflows.

    Args: samples: responses to the prompt.  passed: how many of them pass.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str | None], passed: Sequence[bool], k: int) -> float:
    """How often the majority answer of k responses to a prompt is right (maj@k).

    The responses vote in groups of k, in order; the last group is dropped where it is smaller.
    Source: self-consistency (Wang 2022, arXiv:2203.11171).

    Args: answers: the final answer of each response, None without one.  passed: whether it passes.
    Returns: the mean of `vote` over the groups, in [0, 1].
    """
    starts = range(0, len(answers) - k + 1, k)
    return sum(vote(answers[i : i + k], passed[i : i + k]) for i in starts) / len(starts)


def vote(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    """Whether the most frequent final answer is right: the share of its responses that pass.

    Answers with equally many votes share: the mean over them. Responses without a final answer do
    not vote; 0 where no response has one. Args: as `majority_at_k`.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = Counter(answer for answer, passes in zip(answers, passed) if passes)
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] / most for answer in winners) / len(winners)


def wilson_interval(wins: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, in [0, 1] (Wilson 1927).

    Args: wins of n; ties count half. Also the sum of n shares: the interval is then too wide, not
        too narrow, as shares vary less than zeros and ones with the same mean.
    """
    z, p = 1.959964, wins / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
