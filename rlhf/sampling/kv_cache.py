"""The KV cache of the sampler: memory allocated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.models import packing


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values of one layer, in memory that is taken once. On CPU in float32 whatever the model is in: attention of one token to
    many is several times as fast as in bf16 there (rlhf/unpadded.py reads it so)."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0
        self.memory: list[Tensor] = []  # keys and values (B, heads, capacity, d)
        self.layout: Tensor | None = (
            None  # (B, P) while prompts without padding are read: where each of their tokens is in the row
        )
        self.at: tuple[Tensor, Tensor] | None = (
            None  # within a trace: where a token is written, and up to where is read
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = [key_states, value_states]
        if self.at is not None:
            place, end = self.at
            k, v = (
                memory.index_copy_(2, place, x.to(memory.dtype))[:, :, :end]
                for memory, x in zip(self.memory, new)
            )
            return k, v
        if self.layout is not None:
            new = [
                x[0].transpose(0, 1)[self.layout].transpose(1, 2) for x in new
            ]  # (1, heads, N, d) -> (B, heads, P, d)
        if not self.memory:
            b, heads, _, d = new[0].shape
            dtype = torch.float32 if new[0].device.type == "cpu" else new[0].dtype
            self.memory = [
                x.new_empty(b, heads, self.capacity, x.shape[3], dtype=dtype) for x in new
            ]
            self.is_initialized = True
        start, self.used = self.used, self.used + new[0].shape[2]
        for memory, x in zip(self.memory, new):
            memory[:, :, start : self.used] = x
        k, v = (memory[:, :, : self.used] for memory in self.memory)
        return (key_states, value_states) if self.layout is not None else (k, v)

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = [torch.empty_like(memory[: len(indices)]) for memory in self.memory]
        for memory, old in zip(kept, self.memory):
            memory[:, :, : self.used] = old[indices, :, : self.used]
        self.memory = kept


def new_cache(hf: Any, capacity: int) -> Any:
    """A cache for `capacity` tokens per row; of models that keep something else than all keys and values, transformers' own."""
    cache = DynamicCache(config=hf.config)
    if hf.config._attn_implementation == packing.ATTENTION and all(
        type(layer) is DynamicLayer for layer in cache.layers
    ):
        cache.layers = [PreallocatedCacheLayer(capacity) for _ in cache.layers]
    return cache
