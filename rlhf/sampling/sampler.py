"""The sampling loop: one token at a time for all prompts of a batch, over any causal language model of transformers with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.distributed import collectives
from rlhf.models import packing
from rlhf.models.wrappers import model_inputs
from rlhf.sampling.cpu.fast_path import cpu_fast_path
from rlhf.sampling.kv_cache import PreallocatedCacheLayer, new_cache
from rlhf.sampling.token_choice import Sampling, choose_token, scale_by_temperature

SampledResponses = tuple[
    Tensor, Tensor, Tensor
]  # ids (B, R), EOS behind the end; mask (B, R) float, 1 up to and including EOS; log-probabilities


@torch.no_grad()
def sample(
    policy: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    draws: Tensor,
    eos_id: int,
    sampling: Sampling,
    synced: bool = False,
) -> SampledResponses:
    """Sample answers, by inverting the cumulative sum of the distribution at given random numbers.

    Args:
        policy: models.Policy.  prompt_ids, prompt_mask (B, P), left-padded.
        draws: (B, R) uniform in [0, 1), one per token that may be sampled.
        synced: every process takes as many forwards as the slowest: DeepSpeed talks to all of them in a forward of ZeRO-3, where
            weights are fetched, and where it compares its notes even if nothing is to be fetched.
    Returns: answers, and the log-probabilities (B, R) of the sampled tokens under the full distribution at this temperature.
    """
    hf, device = policy.hf, prompt_ids.device
    n, width = draws.shape
    ids = torch.full((n, width), eos_id, device=device)
    mask, logp = (torch.zeros((n, width), device=device) for _ in range(2))
    alive = torch.arange(n, device=device)
    draws = draws.to(device)
    cache = new_cache(hf, prompt_ids.shape[1] + width)
    plain = policy.supports_packing() and isinstance(cache.layers[0], PreallocatedCacheLayer)
    seen = prompt_mask  # (B, P + t) where there is a token
    if plain:  # a mask of four dimensions is used as it is, added to the scores
        seen = torch.where(prompt_mask > 0, 0.0, -torch.inf).to(
            torch.float32 if device.type == "cpu" else hf.dtype
        )
    one = seen.new_full((n, 1), 0 if plain else 1)
    last = prompt_mask.sum(1, keepdim=True) - 1  # the position of the newest token
    done = False
    with cpu_fast_path(policy, plain) as step:
        logits = read_prompts(hf, prompt_ids, prompt_mask, cache, plain)
        for t in range(width):
            probabilities = scale_by_temperature(logits, sampling).softmax(-1)
            token = choose_token(probabilities, draws[alive, t : t + 1], sampling)
            if not done:
                ids[alive, t], mask[alive, t] = token[:, 0], 1.0
                logp[alive, t] = probabilities.gather(1, token)[:, 0].log()
            going = (token[:, 0] != eos_id) & (not done)
            done = not going.any()
            if t == width - 1 or (
                collectives.all_reduce_max(float(not done), device) == 0 if synced else done
            ):
                break
            if (
                not going.all()
            ):  # finished rows cost nothing more; a process that only waits for others keeps one
                keep = (
                    going.nonzero()[:, 0]
                    if not done
                    else torch.zeros(1, dtype=torch.long, device=device)
                )
                alive, token, seen, last = alive[keep], token[keep], seen[keep], last[keep]
                cache.batch_select_indices(keep)
            seen = torch.cat([seen, one[: len(token)]], 1)
            last = last + 1
            if step:
                logits = hf.get_output_embeddings()(step(token, last, seen, cache))
                continue
            inputs = {"attention_mask": seen[:, None, None] if plain else seen}
            if plain or "position_ids" in model_inputs(hf, token, seen):
                inputs["position_ids"] = last
            logits = hf(
                input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs
            ).logits[:, -1]
    return ids, mask, logp


def read_prompts(hf: Any, ids: Tensor, mask: Tensor, cache: Any, plain: bool) -> Tensor:
    """Fill the cache with the prompts (B, P), left-padded; returns the logits of what follows them, (B, V). A prompt that is there
    several times, or begins as another one, is read once where the model takes that."""
    if not plain:
        return hf(
            **model_inputs(hf, ids, mask), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
    layout = packing.pack(ids, mask)
    for layer in cache.layers:
        layer.layout = layout.gather_index
    inputs = packing.packed_inputs(layout, hf.dtype)
    states = hf.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]
    for layer in cache.layers:
        layer.layout = None
    return hf.get_output_embeddings()(states[layout.gather_index[:, -1]])
