"""Sample through transformers' generate: rollout.engine=hf, and beam search."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.sampling.sampler import SampledResponses
from rlhf.sampling.token_choice import Sampling, choose_token, scale_by_temperature


@torch.no_grad()
def hf_generate(
    policy: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    draws: Tensor,
    eos_id: int,
    sampling: Sampling,
    synced: bool = False,
) -> SampledResponses:
    """As `sample`, through transformers' `generate`: rollout.engine=hf, and beam search, of which log-probabilities are zero."""
    from transformers import GenerationConfig

    hf, start, (n, width) = policy.hf, prompt_ids.shape[1], draws.shape
    logp = torch.zeros((n, width), device=prompt_ids.device)
    draws = draws.to(prompt_ids.device)

    def chosen(ids: Tensor, logits: Tensor) -> Tensor:
        """Leaves one token to choose from, the one that `sample` would choose."""
        t = ids.shape[1] - start
        probabilities = scale_by_temperature(logits, sampling).softmax(-1)
        token = choose_token(probabilities, draws[:, t : t + 1], sampling)
        logp[:, t] = probabilities.gather(1, token)[:, 0].log()
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

    settings = GenerationConfig(
        max_new_tokens=width,
        num_beams=sampling.beams,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    own, hf.generation_config = (
        hf.generation_config,
        settings,
    )  # else a model's own penalties would be mixed in
    try:
        by_draws = {} if sampling.beams > 1 else {"logits_processor": [chosen]}
        found = hf.generate(prompt_ids, attention_mask=prompt_mask, synced_gpus=synced, **by_draws)[
            :, start:
        ]
    finally:
        hf.generation_config = own
    ids = F.pad(found, (0, width - found.shape[1]), value=eos_id)
    ended_before = ((ids == eos_id).cumsum(1) - (ids == eos_id).long()) > 0
    here = torch.arange(width, device=ids.device) < found.shape[1]
    mask = (~ended_before & here).float()
    return ids, mask, logp * mask
