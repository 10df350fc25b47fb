"""What the tests of formulas share: random numbers, masks, and the policy loss of one token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEEDS = range(6)
B, R = 6, 5  # rows and columns of `some_batch`
F64 = torch.float64


def shape_of(seed: int) -> tuple[torch.Generator, int, int]:
    """A random number of rows and columns, 1 x 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    b, r = (int(torch.randint(1, 7, (1,), generator=generator)) for _ in range(2))
    return generator, *((1, 1) if seed == 0 else (b, r))


def prefix_mask(generator: torch.Generator, b: int, r: int) -> Tensor:
    """Masks of right-padded rows, of which some have no token at all."""
    lengths = torch.randint(0, r + 1, (b, 1), generator=generator)
    lengths[0] = r
    return (torch.arange(r) < lengths).to(F64)


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64) * scale


def t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def masked(x: Tensor, mask: Tensor) -> list[float]:
    """The values under the mask as a flat list."""
    return [x[i, j].item() for i in range(x.shape[0]) for j in range(x.shape[1]) if mask[i, j] > 0]


def policy_loss_by_token(
    logp: float, old: float, advantage: float, clip_low: float, clip_high: float
) -> tuple[float, float]:
    """Loss of one token and its derivative with respect to log pi."""
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    if -advantage * ratio >= -advantage * clipped:
        return -advantage * ratio, -advantage * ratio
    return -advantage * clipped, 0.0


def some_batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs with gradient, old ones, advantages and the mask; one row has no token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[R], [0], [1], [2], [3], [R]])
    mask = (torch.arange(R) < lengths).to(F64)
    old, advantages, move = (torch.randn(B, R, generator=generator, dtype=F64) for _ in range(3))
    return (old + 0.4 * move).requires_grad_(), old, advantages, mask
