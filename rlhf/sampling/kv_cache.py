"""The sampler's KV cache: memory that is allocated once per batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.models import packing


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values of one layer, in memory that is allocated at the first update.

    On a CPU they are in float32 whatever the precision of the model: attention of one token to a
    cache is several times as fast as in bf16 (`packing.attention` handles the mixed precision).
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0  # tokens per row
        self.memory: list[Tensor] = []  # keys and values, (B, heads, capacity, d) each
        # While packed prompts are read: (B, P), index in the packed row of each prompt token.
        self.gather_index: Tensor | None = None
        # While a step is traced: (1,) index of the new token, and () number of tokens to read.
        self.traced_range: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values. Returns: those that the new tokens attend to."""
        new = [key_states, value_states]
        if self.traced_range is not None:
            index, end = self.traced_range
            k, v = (
                memory.index_copy_(2, index, x.to(memory.dtype))[:, :, :end]
                for memory, x in zip(self.memory, new)
            )
            return k, v
        if self.gather_index is not None:  # (1, heads, N, d) -> (B, heads, P, d)
            new = [x[0].transpose(0, 1)[self.gather_index].transpose(1, 2) for x in new]
        if not self.memory:
            self.allocate(new)
        start, self.used = self.used, self.used + new[0].shape[2]
        for memory, x in zip(self.memory, new):
            memory[:, :, start : self.used] = x
        if self.gather_index is not None:  # packed prompts attend in their row, not in the cache
            return key_states, value_states
        k, v = (memory[:, :, : self.used] for memory in self.memory)
        return k, v

    def allocate(self, new: list[Tensor]) -> None:
        """Allocate memory for keys and values of the given shapes, (B, heads, tokens, d)."""
        B, heads, _, _ = new[0].shape
        dtype = torch.float32 if new[0].device.type == "cpu" else new[0].dtype
        self.memory = [x.new_empty(B, heads, self.capacity, x.shape[3], dtype=dtype) for x in new]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Number of tokens of each row."""
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, (b,)."""
        kept = [torch.empty_like(memory[: len(indices)]) for memory in self.memory]
        for memory, old in zip(kept, self.memory):
            memory[:, :, : self.used] = old[indices, :, : self.used]
        self.memory = kept


def new_cache(hf: PreTrainedModel, capacity: int) -> Cache:
    """An empty cache for `capacity` tokens per row.

    It is transformers' own for models with another attention than ours, or with layers that do not
    store all keys and values (sliding windows, state spaces).
    """
    cache = DynamicCache(config=hf.config)
    if hf.config._attn_implementation == packing.ATTENTION and all(
        type(layer) is DynamicLayer for layer in cache.layers
    ):
        cache.layers = [PreallocatedCacheLayer(capacity) for _ in cache.layers]
    return cache
