"""The rows that are still being decoded, and one eager decoding step for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf.data.batches import upload
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch
from rlhf.sampling.kv_cache import PreallocatedCacheLayer, new_cache


@dataclass
class DecodeState:
    """The b of B rows that are still being decoded, at their newest token t."""

    rows: Tensor  # (b,) their indices in the batch
    positions: Tensor  # (b, 1) position of the newest token, counting real tokens from 0
    # (b, P + t), prompt and response: 1 or 0; if packed 0 or -inf, which is added to the scores
    attention_mask: Tensor
    cache: Cache  # keys and values of the b rows
    packed: bool  # the prompts are read without padding, into preallocated memory

    @classmethod
    def before_prompts(cls, policy: Policy, prompts: PromptBatch, max_new: int) -> DecodeState:
        """All rows of a batch, with an empty cache for P + `max_new` tokens."""
        (mask,) = upload(policy.device, prompts.mask)
        cache = new_cache(policy.hf, mask.shape[1] + max_new)
        packed = policy.supports_packing() and isinstance(cache.layers[0], PreallocatedCacheLayer)
        positions = mask.sum(1, keepdim=True) - 1
        if packed:  # transformers adds a mask of four dimensions to the scores as it is
            dtype = torch.float32 if mask.device.type == "cpu" else policy.hf.dtype
            mask = torch.where(mask > 0, 0.0, -torch.inf).to(dtype)
        rows = torch.arange(len(mask), device=mask.device)
        return cls(rows, positions, mask, cache, packed)

    def keep(self, index: Tensor) -> None:
        """Drop all rows but those at `index`, (b',) of 0..b-1."""
        self.rows, self.positions = self.rows[index], self.positions[index]
        self.attention_mask = self.attention_mask[index]
        self.cache.batch_select_indices(index)

    def add_token(self) -> None:
        """Make room in the mask for one more token of each row, and advance its position."""
        visible = self.attention_mask.new_full((len(self.rows), 1), 0 if self.packed else 1)
        self.attention_mask = torch.cat([self.attention_mask, visible], 1)
        self.positions = self.positions + 1


# The newest token of each row (b, 1) -> logits of the next one (b, V); it fills the cache.
DecodeStep = Callable[[Tensor, DecodeState], Tensor]


def eager_step(hf: PreTrainedModel) -> DecodeStep:
    """The step of a model through its own forward."""
    takes_positions = "position_ids" in inspect.signature(hf.forward).parameters

    def step(token: Tensor, state: DecodeState) -> Tensor:
        mask = state.attention_mask
        inputs = {"attention_mask": mask[:, None, None] if state.packed else mask}
        if state.packed or takes_positions:
            inputs["position_ids"] = state.positions
        output = hf(
            input_ids=token,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        return output.logits[:, -1]

    return step
