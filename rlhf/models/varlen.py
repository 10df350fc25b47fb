"""Attention of a packed row on a GPU: one kernel for sequences of any length (flash attention).

It takes the place of the buckets in packing.py, which pad sequences to similar lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rlhf.data.batches import upload


@dataclass
class Varlen:
    """Sequences as torch's varlen_attn takes them: the queries of one are its fresh tokens, those
    that the row has for it alone, and its keys all its tokens."""

    fresh: Tensor  # (S + 1,) int32, where the fresh tokens of each sequence begin, and the end
    whole: Tensor  # (S + 1,) int32, the same of all its tokens
    most_fresh: int  # of a sequence
    most: int
    key_index: Tensor | None  # (K,) index in the row of the keys; None: the row itself

    def to(self, device: torch.device) -> Varlen:
        """The same on a device."""
        fresh, whole = upload(device, self.fresh, self.whole)
        keys = None if self.key_index is None else upload(device, self.key_index)[0]
        return replace(self, fresh=fresh, whole=whole, key_index=keys)


def varlen_of(
    sequences: np.ndarray,
    lengths: np.ndarray,
    order: Sequence[int],
    fresh: Sequence[np.ndarray],
) -> Varlen:
    """In host memory.

    Args: sequences (B, T): index in the row of each token of each sequence, left-aligned.
        lengths (B,).  order: of the sequences in the row.  fresh: positions of the tokens that the
        row has for each of them, in this order.
    """
    asked = [(row, len(new)) for row, new in zip(order, fresh) if len(new)]  # not twice the same
    keys = np.concatenate([sequences[row, : lengths[row]] for row, _ in asked])
    in_order = len(keys) == sum(count for _, count in asked)

    def starts(counts: Sequence[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)

    whole = [int(lengths[row]) for row, _ in asked]
    return Varlen(
        fresh=starts([count for _, count in asked]),
        whole=starts(whole),
        most_fresh=max(count for _, count in asked),
        most=max(whole),
        key_index=None if in_order else torch.from_numpy(keys),
    )


def has_flash_kernel(query: Tensor) -> bool:
    """Whether flash attention takes queries (1, heads, N, d): on a GPU, in 16 bits."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def varlen_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    varlen: Varlen,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """packed_attention in one kernel: no padding, no copies of keys for their groups of heads.

    Where a sequence has more keys than queries, the last query sees the last key.
    """
    query, key, value = (x[0].transpose(0, 1) for x in qkv)  # (N, heads, d)
    if varlen.key_index is not None:
        key, value = (x.index_select(0, varlen.key_index) for x in (key, value))
    before = -1 if sliding_window is None else sliding_window - 1  # tokens that a query looks back
    output = varlen_attn(
        query,
        key,
        value,
        varlen.fresh,
        varlen.whole,
        varlen.most_fresh,
        varlen.most,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # a tuple only with return_aux
    return output[None]
