"""How far a reward model agrees with preference pairs: accuracy as a whole, by source and by length, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.data import template
from rlhf.data.records import Pair
from rlhf.rl.rewards import score_rows

# by how much chosen is longer than rejected, as a share of the longer one, in tokens
LENGTHS = [
    ("chosen much shorter", -1.0, -0.5),
    ("chosen shorter", -0.5, -0.1),
    ("alike (within 10 %)", -0.1, 0.1),
    ("chosen longer", 0.1, 0.5),
    ("chosen much longer", 0.5, 1.0),
]
BINS = 10  # of the reliability table


def score_pairs(
    scorer: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    max_prompt: int,
    max_response: int,
    micro_batch: int,
) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected answers, (B,) each, float64, in the scorer's unit; the work is shared by all processes.

    Args: pairs: none with too long a prompt.  max_prompt, max_response: tokens."""
    encoded = template.encode_pairs(tokenizer, pairs, max_prompt, max_response)
    flat = score_rows(
        scorer,
        [prompt + answer for prompt, *both in encoded for answer in both],
        tokenizer,
        micro_batch,
    )
    return torch.tensor(flat[::2], dtype=torch.float64), torch.tensor(
        flat[1::2], dtype=torch.float64
    )


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs whose chosen answer scores higher; a tie counts half. Shapes (B,)."""
    return float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())


def accuracy_gold(pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor) -> float | None:
    """Share of pairs in the order of the truth, whatever their labels say; None where a pair's truth is not known. Shapes (B,)."""
    if any(pair.gold_margin is None for pair in pairs):
        return None
    signs = torch.tensor([pair.gold_margin or 0.0 for pair in pairs]).sign()
    return pairwise_accuracy((chosen - rejected) * signs, torch.zeros(len(pairs)))


def accuracy_by(
    groups: Sequence[str], chosen: Tensor, rejected: Tensor
) -> dict[str, tuple[int, float]]:
    """Number of pairs and accuracy of each group, in order of appearance. Args: groups: one name per pair.  chosen, rejected (B,)."""
    places = {
        name: torch.tensor([i for i, group in enumerate(groups) if group == name])
        for name in dict.fromkeys(groups)
    }
    return {
        name: (len(index), pairwise_accuracy(chosen[index], rejected[index]))
        for name, index in places.items()
    }


def length_group(chosen: int, rejected: int) -> str:
    """The name in LENGTHS for answers of so many tokens."""
    longer_by = (chosen - rejected) / max(chosen, rejected, 1)
    return next(
        name for name, low, high in LENGTHS if low <= longer_by < high or longer_by == high == 1.0
    )


def calibration(margins: Tensor) -> tuple[float, list[dict[str, float]]]:
    """Whether the model is right as often as it says: by Bradley-Terry it prefers one answer with probability sigmoid(|margin|).

    Args: margins (B,): raw score of chosen minus that of rejected, in the unit it was trained in.
    Returns: the expected calibration error, sum over bins of (share of pairs in it) x |accuracy - mean probability| (Guo 2017,
        arXiv:1706.04599, eq. 3); and the bins of equal width from 0.5 to 1 that are not empty: `low`, `high`, `pairs`, `probability`
        (mean), `accuracy`.
    """
    said = torch.sigmoid(margins.double().abs())
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((said - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins, error = [], 0.0
    for i in range(BINS):
        some = place == i
        if some.any():
            probability, accuracy = float(said[some].mean()), float(right[some].mean())
            error += int(some.sum()) / len(margins) * abs(accuracy - probability)
            edges = {"low": 0.5 + i / (2 * BINS), "high": 0.5 + (i + 1) / (2 * BINS)}
            bins.append(
                {
                    **edges,
                    "pairs": int(some.sum()),
                    "probability": probability,
                    "accuracy": accuracy,
                }
            )
    return error, bins
