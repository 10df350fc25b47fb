"""What the samplers take and return: prompts and responses as tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PromptBatch(NamedTuple):
    """B prompts, left-padded to P tokens, in host memory."""

    ids: Tensor  # (B, P)
    mask: Tensor  # (B, P) 1 on real tokens, 0 on padding


class SampledResponses(NamedTuple):
    """B responses, right-padded with EOS to R tokens, on the policy's device."""

    ids: Tensor  # (B, R)
    mask: Tensor  # (B, R) float, 1 up to and including the first EOS
    # (B, R) of each sampled token under the full distribution at the sampling temperature (nats),
    # 0 where the mask is 0
    logprobs: Tensor
