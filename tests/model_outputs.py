"""What models say of a row, alone or padded: logits, log-probabilities and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, PAD
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.models.wrappers import Policy, Scorer, last_token_score

FP32 = Precision.fp32
ROWS = [[5, 6, 7], [300, 301, 302, 303, 304, 305], [9, 10, 11, 12]]
each_family = pytest.mark.parametrize("family", FAMILIES)


def padded(row: list[int], left: int, right: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[PAD] * left + row + [PAD] * right])
    mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
    return ids, mask


def all_but_the_first(mask: Tensor) -> Tensor:
    """The tokens whose log-probabilities are asked: all but the first of each row."""
    return (mask > 0) & (mask.cumsum(1) > 1)


@torch.no_grad()
def logp_of(policy: Policy, row: list[int], left: int = 0, right: int = 0) -> Tensor:
    """Log-probabilities of all tokens of a row but the first."""
    ids, mask = padded(row, left, right)
    logp = policy(ids, mask, all_but_the_first(mask))[0]
    assert logp.shape == ids.shape and (logp != 0).equal(all_but_the_first(mask))
    return logp[0, left + 1 : left + len(row)]


@torch.no_grad()
def logits_of(hf: Any, row: list[int]) -> Tensor:
    """What the model itself says of a row alone: the logits of each token but the first."""
    return hf(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]


@torch.no_grad()
def score_of(scorer: Scorer, row: list[int], left: int = 0, right: int = 0) -> float:
    ids, mask = padded(row, left, right)
    return float(last_token_score(scorer(ids, mask), mask))
