"""Attention of one new token to a float32 KV cache through our CPU kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.models import packing
from rlhf.sampling.cpu import kernels


@contextlib.contextmanager
def single_token_attention() -> Iterator[None]:
    """Use our kernel inside the context, in this thread, wherever it applies."""
    token = packing.decode_attention.set(attend)
    try:
        yield
    finally:
        packing.decode_attention.reset(token)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor | None:
    """Attention as `packing.DecodeAttention` defines it; None where the kernel does not apply."""
    if mask is None or not is_single_token_decode(query, key, value, mask):
        return None
    return kernels.attend(query, key, value, mask, scale)


def is_single_token_decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether the kernel applies: one new token, float32 cache on CPU, no gradient, added mask.

    Args:
        query: (B, heads, Q, d).
        key, value: (B, kv_heads, T, d).
        mask: any mask of a model's attention; the kernel takes (B, 1, 1, T), float32.
    """
    if (
        query.shape[2] != 1
        or not key.is_cpu
        or key.dtype != torch.float32
        or torch.is_grad_enabled()
        or key.shape != value.shape
    ):
        return False
    fits = mask.dtype == torch.float32 and mask.shape == (query.shape[0], 1, 1, key.shape[2])
    return fits and key.stride(-1) == value.stride(-1) == mask.stride(-1) == 1 and kernels.load()
