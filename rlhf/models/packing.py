"""Packed (padding-free) forward: all real tokens of a batch in one row.

It works for any model of transformers whose attention goes through its interface: only attention
sees sequences, everything else of a model works token by token. A common prefix of sequences is
computed once: the responses to one prompt, chosen and rejected of a pair. docs/performance.md has
the measurements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.data.batches import upload
from rlhf.models.varlen import (
    VarlenLayout,
    supports_varlen_attention,
    varlen_attention,
    varlen_layout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "unpadded"  # the name of our attention in transformers
# A bucket takes the sequences that are at least this share of its longest, or all up to this many
# tokens; attention pads them to the longest.
SIMILAR_LENGTH, SHORT = 0.8, 32
MIN_PREFIX = 8  # tokens; sharing a shorter prefix costs more than it saves

# Attention of one new token to a KV cache: query (B, heads, 1, d), key and value
# (B, kv_heads, T, d), the model's mask, the scale of the scores -> (B, 1, heads, d), or None where
# it does not apply.
DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
# What the sampler sets while it decodes (rlhf/sampling/cpu); None: torch's attention.
decode_attention: ContextVar[DecodeAttention | None] = ContextVar("decode_attention", default=None)


@dataclass
class PackedBatch:
    """The tokens of a batch (B, T) in one row of N tokens, and how attention sees them.

    Attention works on buckets of sequences of similar length. A shared prefix is once in the row
    and in the bucket entries of every sequence that begins with it.
    """

    ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), from 0 in each sequence
    gather_index: Tensor  # (B, T) index in the row of each token; at padding of the last before it
    buckets: list[Tensor]  # (b, w) each: index in the row of the tokens of b sequences; any at pads
    scatter_index: Tensor  # (N,) index of each row token among the elements of all buckets
    is_dense: bool  # nothing is shared, all sequences are equally long: the row is the only bucket
    varlen: VarlenLayout  # what the attention of a GPU takes in place of the buckets

    def to(self, device: torch.device) -> PackedBatch:
        """The same on a device."""
        ids, position_ids, gather_index, scatter_index, *buckets = upload(
            device,
            self.ids,
            self.position_ids,
            self.gather_index,
            self.scatter_index,
            *self.buckets,
        )
        varlen = self.varlen.to(device)
        return PackedBatch(
            ids, position_ids, gather_index, buckets, scatter_index, self.is_dense, varlen
        )


def pack(ids: Tensor, mask: Tensor) -> PackedBatch:
    """Pack a batch, in host memory. Args: ids, mask (B, T), padded on either side or with holes.

    Raises: ValueError for a sequence without any token.
    """
    real, tokens = mask.numpy() > 0, ids.numpy().astype(np.int32)
    lengths = real.sum(1)
    n_rows, width = len(real), int(lengths.max())
    if not lengths.all():
        raise ValueError("a sequence without any token")
    left = np.full((n_rows, width), -1, np.int32)  # the sequences, left-aligned
    left[np.arange(width) < lengths[:, None]] = tokens[real]
    offsets, members = bucket_by_length(lengths)

    # lay the sequences one behind the other, each without the prefix that it shares with the one
    # before; sorted, so that sequences with a common prefix are neighbours
    order = sorted(range(n_rows), key=lambda row: left[row].tobytes()) if n_rows > 1 else [0]
    sequences = np.zeros((n_rows, width), np.int64)  # index in the packed row of each token
    scatter_index, position_ids, before, n = [], [], order[0], 0
    for row in order:
        shared = 0 if row == before else common_prefix(left, lengths, row, before)
        new = np.arange(shared, lengths[row])
        sequences[row, :shared] = sequences[before, :shared]
        sequences[row, new] = n + np.arange(len(new))
        scatter_index.append(offsets[row] + new)
        position_ids.append(new)
        n, before = n + len(new), row

    # the token of its sequence that each place of the batch has reached: padding repeats the last
    reached = np.maximum(real.cumsum(1) - 1, 0)
    packed_ids = np.empty(n, np.int64)
    for row in range(n_rows):
        packed_ids[sequences[row, : lengths[row]]] = left[row, : lengths[row]]
    buckets = [sequences[rows, :w] for rows, w in members]
    is_dense = n == n_rows * width and len(buckets) == 1
    is_dense = is_dense and bool((buckets[0].reshape(-1) == np.arange(n)).all())

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x))

    return PackedBatch(
        ids=tensor(packed_ids[None]),
        position_ids=tensor(np.concatenate(position_ids)[None]),
        gather_index=tensor(np.take_along_axis(sequences, reached, 1)),
        buckets=[tensor(bucket) for bucket in buckets],
        scatter_index=tensor(np.concatenate(scatter_index)),
        is_dense=is_dense,
        varlen=varlen_layout(sequences, lengths, order, position_ids),
    )


def common_prefix(left: np.ndarray, lengths: np.ndarray, row: int, other: int) -> int:
    """Tokens of the common prefix of two sequences, 0 where it is too short to be shared.

    Args: left (B, T): the sequences, left-aligned, -1 behind their ends.  lengths (B,).
    """
    differs = left[row] != left[other]
    first = int(differs.argmax()) if differs.any() else left.shape[1]
    prefix = min(first, int(lengths[row]), int(lengths[other]))
    return prefix if prefix >= MIN_PREFIX else 0


def bucket_by_length(lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """Buckets of sequences of similar length, which need little padding. Args: lengths (B,).

    Returns: (B,) where each sequence begins among the elements of all buckets; and the sequences
        of each bucket with the length of its longest.
    """
    offsets, members, used = np.zeros(len(lengths), np.int64), [], 0
    rest = np.argsort(lengths, kind="stable")
    while len(rest):
        longest = int(lengths[rest[-1]])
        inside = lengths[rest] >= (SIMILAR_LENGTH * longest if longest > SHORT else 0)
        rows = np.sort(rest[inside])
        offsets[rows] = used + longest * np.arange(len(rows))
        members.append((rows, longest))
        used, rest = used + longest * len(rows), rest[~inside]
    return offsets, members


def packed_inputs(packed: PackedBatch, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a model's forward over the row."""
    # transformers passes a mask of four dimensions on unchanged, so it builds none; attention
    # ignores this one
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=dtype, device=packed.ids.device)
    return {
        "input_ids": packed.ids,
        "attention_mask": unused_mask,
        "position_ids": packed.position_ids,
        "packed": packed,
    }


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: PackedBatch | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (B, heads, T, d) -> (B, T, heads, d).

    The signature is that of transformers.AttentionInterface; `packed` comes from `packed_inputs`.
    Queries in bf16 may meet a cache in float32 (sampling/kv_cache.py); the result has the dtype of
    the queries.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed is not None:
        if others.get("softcap") is not None:
            raise ValueError("packed attention has no soft-capping of scores")
        qkv = (query, key, value)
        return packed_attention(qkv, packed, dropout, scaling, sliding_window), None
    cast = query.to(key.dtype)
    # torch's fast path, and ours, needs contiguous rows
    cast = cast if cast.stride(-1) == 1 else cast.contiguous()
    plain = not dropout and others.get("position_bias") is None and others.get("softcap") is None
    decode = decode_attention.get() if plain else None
    if decode is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        decoded = decode(cast, key, value, attention_mask, scale)
        if decoded is not None:
            return decoded.to(query.dtype), None
    others |= {"sliding_window": sliding_window}
    output, _ = sdpa_attention_forward(
        module, cast, key, value, attention_mask, dropout, scaling, **others
    )
    return output.to(query.dtype), None


def packed_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    packed: PackedBatch,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention within each sequence of a packed row.

    Args:
        qkv: query, key and value, (1, heads, N, d) each.
        scaling: of the scores; None = 1 / sqrt(d).
        sliding_window: tokens that a query sees, itself included; None = all before it.
    Returns: (1, N, heads, d).
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    if not dropout and supports_varlen_attention(*qkv):
        return varlen_attention(qkv, packed.varlen, scaling, sliding_window)
    groups = qkv[0].shape[1] // qkv[1].shape[1]
    rows = [x[0].transpose(0, 1) for x in qkv]  # (N, heads, d)
    outputs = []
    for bucket in packed.buckets:
        picked = rows if packed.is_dense else [x.index_select(0, bucket.flatten()) for x in rows]
        # (b, heads, w, d)
        q, k, v = (x.reshape(*bucket.shape, *x.shape[1:]).transpose(1, 2) for x in picked)
        window, w = None, bucket.shape[1]
        if sliding_window is not None and sliding_window < w:
            at = torch.arange(w, device=q.device)
            window = (at[:, None] >= at) & (at[:, None] - at < sliding_window)
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (output if packed.is_dense else output.index_select(0, packed.scatter_index))[None]


def use_packed_attention(hf: PreTrainedModel) -> bool:
    """Give a model our attention, where its architecture allows that.

    It must take attention through transformers' interface, and position ids.
    Returns: whether it does.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    takes_positions = "position_ids" in inspect.signature(hf.base_model.forward).parameters
    fits = getattr(hf, "_supports_attention_backend", False) and takes_positions
    if fits and hf.config._attn_implementation == "sdpa":
        hf.config._attn_implementation = ATTENTION
    return hf.config._attn_implementation == ATTENTION
