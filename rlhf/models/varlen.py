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
class VarlenLayout:
    """Arguments of torch's varlen_attn. Queries of a sequence: the tokens that it does not share
    with the one before it. Keys: all its tokens."""

    cu_seqlens_q: Tensor  # (S + 1,) int32, where the queries of each sequence begin, and the end
    cu_seqlens_k: Tensor  # (S + 1,) int32, the same of its keys
    max_seqlen_q: int  # of a sequence
    max_seqlen_k: int
    key_index: Tensor | None  # (K,) index in the row of the keys; None: the row itself

    def to(self, device: torch.device) -> VarlenLayout:
        """The same on a device."""
        cu_seqlens_q, cu_seqlens_k = upload(device, self.cu_seqlens_q, self.cu_seqlens_k)
        keys = None if self.key_index is None else upload(device, self.key_index)[0]
        return replace(self, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, key_index=keys)


def varlen_layout(
    sequences: np.ndarray,
    lengths: np.ndarray,
    order: Sequence[int],
    new_positions: Sequence[np.ndarray],
) -> VarlenLayout:
    """The layout of a packed row, in host memory.

    Args: sequences (B, T): index in the row of each token of each sequence, left-aligned.
        lengths (B,).  order: of the sequences in the row.  new_positions: of the tokens that each
        sequence does not share, in this order.
    """
    queries = ((row, len(new)) for row, new in zip(order, new_positions))
    queried = [(row, count) for row, count in queries if count]  # not those that share all
    keys = np.concatenate([sequences[row, : lengths[row]] for row, _ in queried])
    in_order = len(keys) == sum(count for _, count in queried)

    def starts(counts: Sequence[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)

    key_counts = [int(lengths[row]) for row, _ in queried]
    return VarlenLayout(
        cu_seqlens_q=starts([count for _, count in queried]),
        cu_seqlens_k=starts(key_counts),
        max_seqlen_q=max(count for _, count in queried),
        max_seqlen_k=max(key_counts),
        key_index=None if in_order else torch.from_numpy(keys),
    )


def supports_varlen_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's flash attention takes these, (1, heads, N, d) each: on a GPU of compute
    capability 8 (Ampere) or newer, in 16 bits, unless it is switched off (`deterministic=true`)."""
    dtypes, size = {x.dtype for x in (query, key, value)}, query.shape[-1]
    return (
        query.is_cuda
        and dtypes in ({torch.bfloat16}, {torch.float16})
        and size == value.shape[-1] <= 256
        and size % 8 == 0
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    varlen: VarlenLayout,
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
        varlen.cu_seqlens_q,
        varlen.cu_seqlens_k,
        varlen.max_seqlen_q,
        varlen.max_seqlen_k,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # a tuple only with return_aux
    return output[None]
