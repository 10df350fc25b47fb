"""The sampling loop: one token at a time for all prompts of a batch.

It runs any causal language model of transformers that has a KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.base import watchdog
from rlhf.data.batches import upload
from rlhf.distributed import collectives
from rlhf.models import packing
from rlhf.models.wrappers import Policy, model_inputs
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.cpu.fast_path import cpu_fast_path
from rlhf.sampling.decode_state import DecodeState, eager_step
from rlhf.sampling.token_choice import Sampling, sample_token

# Tokens after which a GPU is asked which rows are finished; the answer makes the host wait until
# all that was launched is done.
CHECK_EVERY = 16


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: PromptBatch,
    random: Tensor,
    eos_id: int,
    sampling: Sampling,
    synced: bool = False,
) -> SampledResponses:
    """Sample a response to each prompt, by inverse transform sampling from given random numbers.

    Args:
        random: (B, R) uniform in [0, 1), one number per token that may be sampled.
        synced: every rank runs as many forwards as the slowest one. ZeRO-3 needs this: ranks
            communicate in every forward, also where no weight has to be fetched.
    """
    device, (B, R) = policy.device, random.shape
    (random,) = upload(device, random)
    ids = torch.full((B, R), eos_id, device=device)
    mask, logprobs = (torch.zeros((B, R), device=device) for _ in range(2))
    state = DecodeState.before_prompts(policy, prompts, R)
    finished = torch.zeros(B, dtype=torch.bool, device=device)  # which rows of the state
    check_every = 1 if device.type == "cpu" else CHECK_EVERY
    with cpu_fast_path(policy, state.packed) as fast_step:
        step = fast_step or eager_step(policy.hf)
        logits = read_prompts(policy.hf, prompts, state)
        for t in range(R):
            watchdog.progress()
            token, logprob = sample_token(logits, random[state.rows, t : t + 1], sampling)
            # finished rows write padding until they are dropped
            ids[state.rows, t] = token[:, 0].masked_fill(finished, eos_id)
            mask[state.rows, t] = (~finished).float()
            logprobs[state.rows, t] = logprob.masked_fill(finished, 0.0)
            finished = finished | (token[:, 0] == eos_id)
            if t == R - 1:
                break
            if (t + 1) % check_every == 0:
                kept = (~finished).nonzero()[:, 0]
                if all_finished(not len(kept), synced, device):
                    break
                if not len(kept):  # this rank only waits for the others, with one row
                    kept = torch.zeros(1, dtype=torch.long, device=device)
                if len(kept) < len(finished):  # a finished row costs no further forward
                    token, finished = token[kept], finished[kept]
                    state.keep(kept)
            state.add_token()
            logits = step(token, state)
    return SampledResponses(ids, mask, logprobs)


def all_finished(finished: bool, synced: bool, device: torch.device) -> bool:
    """Whether this rank, or with `synced` every rank, has finished all of its responses."""
    if not synced:
        return finished
    return collectives.all_reduce_max(float(not finished), device) == 0


def read_prompts(hf: PreTrainedModel, prompts: PromptBatch, state: DecodeState) -> Tensor:
    """Fill the cache with the prompts. Returns: logits of the first response token, (B, V).

    A packed policy reads identical prompts, and beginnings that prompts share, only once.
    """
    cache = state.cache
    if not state.packed:
        inputs = model_inputs(hf, prompts.ids, prompts.mask)
        output = hf(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]
    packed = packing.pack(prompts.ids, prompts.mask).to(state.rows.device)
    for layer in cache.layers:
        layer.gather_index = packed.gather_index
    inputs = packing.packed_inputs(packed, hf.dtype)
    states = hf.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]
    for layer in cache.layers:
        layer.gather_index = None
    return hf.get_output_embeddings()(states[packed.gather_index[:, -1]])
