"""Forwards without padding: the real tokens of a batch lie one behind the other in a single row, through any model of transformers whose
attention goes through its interface. Only attention sees sequences; everything else of a model works token by token.

What begins alike is computed once: the answers to one prompt, chosen and rejected of a pair. Measured in docs/performance.md.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION = "unpadded"  # the name of our attention in transformers
SHARED = 8  # tokens; a shorter beginning in common is not worth its bookkeeping


@dataclass
class Layout:
    """Where the tokens of a batch (B, T) are. N tokens in the row, W tokens in the longest sequence."""

    ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N) from 0 in each sequence
    place: Tensor  # (B, T) number in the row of each token; at padding that of the last real token before it
    sequences: Tensor  # (B, W) number in the row of each sequence's tokens, some token behind its end
    own: Tensor  # (N,) where each token of the row is found in `sequences`, as an index of its B x W elements
    lengths: list[int]  # tokens of each sequence
    equal: bool  # nothing is shared and all sequences are equally long: the row is `sequences`


def lay_out(ids: Tensor, mask: Tensor) -> Layout:
    """Args: ids, mask (B, T), padded on either side, or with holes; every sequence has a token."""
    real, tokens = mask.cpu().numpy() > 0, ids.cpu().numpy().astype(np.int32)
    lengths = real.sum(1)
    n_rows, width = len(real), int(lengths.max())
    if not lengths.all():
        raise ValueError("a sequence without any token")
    left = np.full((n_rows, width), -1, np.int32)
    left[np.arange(width) < lengths[:, None]] = tokens[real]
    sequences = np.zeros((n_rows, width), np.int64)
    order = sorted(range(n_rows), key=lambda row: left[row].tobytes()) if n_rows > 1 else [0]  # those that begin alike are neighbours
    own, position_ids, before, n = [], [], order[0], 0
    for row in order:
        alike = 0
        if row != before:
            differs = left[row] != left[before]
            alike = min(int(differs.argmax()) if differs.any() else width, int(lengths[row]), int(lengths[before]))
            alike = alike if alike >= SHARED else 0
        fresh = np.arange(alike, lengths[row])
        sequences[row, :alike] = sequences[before, :alike]
        sequences[row, fresh] = n + np.arange(len(fresh))
        own.append(row * width + fresh)
        position_ids.append(fresh)
        n, before = n + len(fresh), row
    where = np.concatenate(own)
    last = np.maximum(real.cumsum(1) - 1, 0)  # of a sequence's tokens, the last one that a place has seen
    place = np.take_along_axis(sequences, last, 1)

    def tensor(x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(ids.device)

    row_ids = left.reshape(-1)[where].astype(np.int64)[None]
    equal = n == n_rows * width and order == list(range(n_rows))
    positions = np.concatenate(position_ids)[None]
    return Layout(tensor(row_ids), tensor(positions), tensor(place), tensor(sequences), tensor(where), lengths.tolist(), equal)


def inputs_of(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a model's forward over the row."""
    # a mask of four dimensions is handed on as it is, so that none is made; nobody reads it
    nothing = torch.zeros(1, 1, 1, 1, dtype=dtype, device=layout.ids.device)
    return {"input_ids": layout.ids, "attention_mask": nothing, "position_ids": layout.position_ids, "layout": layout}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (B, heads, T, d) -> (B, T, heads, d); with a layout over the sequences of the row.

    Queries in bf16 may meet a cache in float32 (rlhf/decode.py); the result has the type of the queries.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if layout is None:
        asked = query.to(key.dtype)
        others |= {"sliding_window": sliding_window}
        return sdpa_attention_forward(module, asked, key, value, attention_mask, dropout, scaling, **others)[0].to(query.dtype), None
    groups = query.shape[1] // key.shape[1]
    sequences, width = layout.sequences, layout.sequences.shape[1]

    def padded(x: Tensor) -> Tensor:  # (1, heads, N, d) -> (B, heads, W, d)
        x = x[0].transpose(0, 1)
        x = x if layout.equal else x.index_select(0, sequences.flatten())
        return x.reshape(*sequences.shape, *x.shape[1:]).transpose(1, 2)

    q, k, v = padded(query), repeat_kv(padded(key), groups), repeat_kv(padded(value), groups)
    window = None
    if sliding_window is not None and sliding_window < width:
        at = torch.arange(width, device=q.device)
        window = (at[:, None] >= at) & (at[:, None] - at < sliding_window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling)
    out = out.transpose(1, 2).reshape(sequences.numel(), *out.shape[1::2])
    return (out if layout.equal else out.index_select(0, layout.own))[None], None


def install(hf: Any) -> bool:
    """Give a model our attention, where it takes one: through transformers' interface, and told positions. Returns: whether it does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    takes = getattr(hf, "_supports_attention_backend", False) and "position_ids" in inspect.signature(hf.base_model.forward).parameters
    if takes and hf.config._attn_implementation == "sdpa":
        hf.config._attn_implementation = ATTENTION
    return hf.config._attn_implementation == ATTENTION
