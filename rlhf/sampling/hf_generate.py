"""Sample through transformers' `generate`: rollout.engine=hf, and beam search."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.batches import upload
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.token_choice import Sampling, sample_token


@torch.no_grad()
def hf_generate(
    policy: Policy,
    prompts: PromptBatch,
    random: Tensor,
    eos_id: int,
    sampling: Sampling,
    synced: bool = False,
) -> SampledResponses:
    """Sample the responses that `sampler.sample` samples; same arguments and result.

    With `sampling.beams` > 1 the responses are those of a beam search, without random numbers and
    with log-probabilities of zero.
    """
    from transformers import GenerationConfig

    hf, P, (B, R) = policy.hf, prompts.ids.shape[1], random.shape
    logprobs = torch.zeros((B, R), device=policy.device)
    prompt_ids, prompt_mask, random = upload(policy.device, prompts.ids, prompts.mask, random)

    def leave_chosen_token(ids: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, V) in which only the token that `sample` chooses is possible."""
        t = ids.shape[1] - P
        token, logprobs[:, t] = sample_token(logits, random[:, t : t + 1], sampling)
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

    processors = {} if sampling.beams > 1 else {"logits_processor": [leave_chosen_token]}
    model_settings = hf.generation_config
    # replaced: `generate` would mix in the penalties of a model's own configuration
    hf.generation_config = GenerationConfig(
        max_new_tokens=R,
        num_beams=sampling.beams,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    try:
        generated = hf.generate(
            prompt_ids, attention_mask=prompt_mask, synced_gpus=synced, **processors
        )[:, P:]
    finally:
        hf.generation_config = model_settings
    n_generated = generated.shape[1]
    ids = F.pad(generated, (0, R - n_generated), value=eos_id)
    is_eos = (ids == eos_id).long()
    after_eos = is_eos.cumsum(1) - is_eos > 0
    mask = (~after_eos & (torch.arange(R, device=ids.device) < n_generated)).float()
    return SampledResponses(ids, mask, logprobs * mask)
