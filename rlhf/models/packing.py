"""Forwards without padding: the real tokens of a batch lie one behind the other in a single row, through any model of transformers whose
attention goes through its interface. Only attention sees sequences; everything else of a model works token by token.

What begins alike is computed once: the answers to one prompt, chosen and rejected of a pair. Measured in docs/performance.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION = "unpadded"  # the name of our attention in transformers
SIMILAR, SHORT = (
    0.8,
    32,
)  # attention pads sequences to those at most 1.25 times as long, and short ones to so many tokens
SHARED = 8  # tokens; a shorter beginning in common is not worth its bookkeeping

# Attention of one new token to a KV cache: query (B, heads, 1, d), key and value (B, kv_heads, T, d),
# the model's mask, the scale of the scores -> (B, 1, heads, d), or None where it does not apply.
DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
# What the sampler sets while it decodes (rlhf/sampling/cpu); None: torch's attention.
decode_attention: ContextVar[DecodeAttention | None] = ContextVar("decode_attention", default=None)


@dataclass
class PackedBatch:
    """Where the tokens of a batch (B, T) are; N of them are in the row. Attention sees sequences of similar length together."""

    ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N) from 0 in each sequence
    place: Tensor  # (B, T) number in the row of each token; at padding that of the last real token before it
    parts: list[
        Tensor
    ]  # (b, w) each: number in the row of the tokens of b sequences, some token behind their ends
    own: Tensor  # (N,) where each token of the row is found in `parts`, as an index of all their elements
    equal: bool  # nothing is shared and all sequences are equally long: the row is the only part


def pack(ids: Tensor, mask: Tensor) -> PackedBatch:
    """Args: ids, mask (B, T), padded on either side, or with holes; every sequence has a token."""
    real, tokens = mask.cpu().numpy() > 0, ids.cpu().numpy().astype(np.int32)
    lengths = real.sum(1)
    n_rows, width = len(real), int(lengths.max())
    if not lengths.all():
        raise ValueError("a sequence without any token")
    left = np.full((n_rows, width), -1, np.int32)
    left[np.arange(width) < lengths[:, None]] = tokens[real]
    starts, cuts = bucket_by_length(lengths)
    sequences = np.zeros((n_rows, width), np.int64)
    order = (
        sorted(range(n_rows), key=lambda row: left[row].tobytes()) if n_rows > 1 else [0]
    )  # those that begin alike are neighbours
    own, position_ids, before, n = [], [], order[0], 0
    for row in order:
        alike = 0
        if row != before:
            differs = left[row] != left[before]
            alike = min(
                int(differs.argmax()) if differs.any() else width,
                int(lengths[row]),
                int(lengths[before]),
            )
            alike = alike if alike >= SHARED else 0
        fresh = np.arange(alike, lengths[row])
        sequences[row, :alike] = sequences[before, :alike]
        sequences[row, fresh] = n + np.arange(len(fresh))
        own.append(starts[row] + fresh)
        position_ids.append(fresh)
        n, before = n + len(fresh), row
    where = np.concatenate(own)
    last = np.maximum(
        real.cumsum(1) - 1, 0
    )  # of a sequence's tokens, the last one that a place has seen
    place = np.take_along_axis(sequences, last, 1)

    def tensor(x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(ids.device)

    parts = [sequences[rows, :w] for rows, w in cuts]
    positions = np.concatenate(position_ids)[None]
    row_ids = np.empty(n, np.int64)
    for row in range(n_rows):
        row_ids[sequences[row, : lengths[row]]] = left[row, : lengths[row]]
    equal = (
        len(parts) == 1 and bool((parts[0].reshape(-1) == np.arange(n)).all())
        if n == n_rows * width
        else False
    )
    return PackedBatch(
        tensor(row_ids[None]),
        tensor(positions),
        tensor(place),
        [tensor(part) for part in parts],
        tensor(where),
        equal,
    )


def bucket_by_length(lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """Parts of sequences of similar length, the padding of which costs little. Args: lengths (B,).
    Returns: where each sequence begins among the elements of all parts; and the sequences of each part with the longest's length."""
    starts, cuts, used = np.zeros(len(lengths), np.int64), [], 0
    rest = np.argsort(lengths, kind="stable")
    while len(rest):
        longest = int(lengths[rest[-1]])
        inside = lengths[rest] >= (SIMILAR * longest if longest > SHORT else 0)
        rows = np.sort(rest[inside])
        starts[rows] = used + longest * np.arange(len(rows))
        cuts.append((rows, longest))
        used, rest = used + longest * len(rows), rest[~inside]
    return starts, cuts


def packed_inputs(layout: PackedBatch, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a model's forward over the row."""
    # a mask of four dimensions is handed on as it is, so that none is made; nobody reads it
    nothing = torch.zeros(1, 1, 1, 1, dtype=dtype, device=layout.ids.device)
    return {
        "input_ids": layout.ids,
        "attention_mask": nothing,
        "position_ids": layout.position_ids,
        "layout": layout,
    }


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: PackedBatch | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (B, heads, T, d) -> (B, T, heads, d); with a layout over the sequences of the row.

    Queries in bf16 may meet a cache in float32 (rlhf/decode.py); the result has the type of the queries.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if layout is None:
        asked = query.to(key.dtype)
        asked = (
            asked if asked.stride(-1) == 1 else asked.contiguous()
        )  # torch's fast path, and ours, wants it so
        plain = (
            not dropout and others.get("position_bias") is None and others.get("softcap") is None
        )
        decode = decode_attention.get() if plain else None
        if decode is not None:
            scale = scaling if scaling is not None else query.shape[-1] ** -0.5
            decoded = decode(asked, key, value, attention_mask, scale)
            if decoded is not None:
                return decoded.to(query.dtype), None
        others |= {"sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, asked, key, value, attention_mask, dropout, scaling, **others
        )[0].to(query.dtype), None
    groups = query.shape[1] // key.shape[1]
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (N, heads, d)
    found = []
    for part in layout.parts:
        taken = rows if layout.equal else [x.index_select(0, part.flatten()) for x in rows]
        q, k, v = (
            x.reshape(*part.shape, *x.shape[1:]).transpose(1, 2) for x in taken
        )  # (b, heads, w, d)
        window, w = None, part.shape[1]
        if sliding_window is not None and sliding_window < w:
            at = torch.arange(w, device=q.device)
            window = (at[:, None] >= at) & (at[:, None] - at < sliding_window)
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling
        )
        found.append(out.transpose(1, 2).flatten(0, 1))
    out = found[0] if len(found) == 1 else torch.cat(found)
    return (out if layout.equal else out.index_select(0, layout.own))[None], None


def use_packed_attention(hf: Any) -> bool:
    """Give a model our attention, where it takes one: through transformers' interface, and told positions. Returns: whether it does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    takes = (
        getattr(hf, "_supports_attention_backend", False)
        and "position_ids" in inspect.signature(hf.base_model.forward).parameters
    )
    if takes and hf.config._attn_implementation == "sdpa":
        hf.config._attn_implementation = ATTENTION
    return hf.config._attn_implementation == ATTENTION
