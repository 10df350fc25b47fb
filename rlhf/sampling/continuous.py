"""Sample through transformers' continuous batching: rollout.engine=continuous.

A paged KV cache in which responses of any length start and end at any time; on GPUs with CUDA
graphs and flash attention. It works on the training weights themselves. Its random numbers do not
belong to a response as ours do, so samples depend on the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.token_choice import Sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

PAGE = 32  # tokens of a page of the cache on CPU; on a GPU the library chooses


@torch.no_grad()
def continuous_generate(
    policy: Policy,
    prompts: PromptBatch,
    random: Tensor,
    eos_id: int,
    sampling: Sampling,
    synced: bool = False,
) -> SampledResponses:
    """Sample responses from the distribution that `sampler.sample` samples from.

    Args: as `sampler.sample`.  random: its first number is the seed; only its shape counts besides.
        synced: refused, as a process does not take as many steps as another.
    Raises: UserError with `synced`; RuntimeError where the engine fails.
    """
    if synced:
        raise UserError(
            "rollout.engine=continuous: it needs all weights in each process, and ZeRO 3 does not "
            "gather them: set deploy.gather_for_rollout=true, or rollout.engine=native"
        )
    hf, device, (B, R) = policy.hf, policy.device, random.shape
    questions = [ids[mask > 0].tolist() for ids, mask in zip(prompts.ids, prompts.mask)]
    with as_before(hf):
        answers = hf.generate_batch(
            questions,
            generation_config=generation_config(sampling, eos_id, R),
            continuous_batching_config=batching_config(
                device, sum(map(len, questions)) + B * R, int(2**31 * float(random[0, 0]))
            ),
        )
    responses = list(answers.values())
    broken = next((one.error for one in responses if one.error), None)
    if broken or len(responses) < B:
        raise RuntimeError(f"rollout.engine=continuous: {broken or 'responses are missing'}")
    ids = torch.full((B, R), eos_id)
    mask, logprobs = torch.zeros(B, R), torch.zeros(B, R)
    for row, response in enumerate(responses):
        n = len(response.generated_tokens)
        ids[row, :n] = torch.tensor(response.generated_tokens)
        mask[row, :n] = 1
        logprobs[row, :n] = torch.tensor(response.logprobs)
    return SampledResponses(ids.to(device), mask.to(device), logprobs.to(device))


def generation_config(sampling: Sampling, eos_id: int, most: int) -> GenerationConfig:
    """The settings of `generate_batch`; a model's own are not mixed in."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=most,
        do_sample=not sampling.greedy,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or None,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )


def batching_config(device: torch.device, tokens: int, seed: int) -> object:
    """How the engine divides memory. Args: tokens: prompts and responses have at most."""
    from transformers import ContinuousBatchingConfig

    if device.type != "cpu":
        return ContinuousBatchingConfig(return_logprobs=True, seed=seed)
    # the library measures the memory of GPUs only
    return ContinuousBatchingConfig(
        return_logprobs=True,
        seed=seed,
        page_size=PAGE,
        num_blocks=2 * tokens // PAGE + 64,
        max_batch_tokens=512,
    )


@contextlib.contextmanager
def as_before(hf: PreTrainedModel) -> Iterator[None]:
    """Restore what the engine changes: training mode, attention, and the random state."""
    modes = [(module, module.training) for module in hf.modules()]
    attention = hf.config._attn_implementation
    cuda = [hf.device] if hf.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        hf.config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            hf.config._attn_implementation = attention
            for module, training in modes:
                module.training = training
