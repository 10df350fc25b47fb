"""Numbers in 16 bits on the GPU: sampler against training, updates, log-probs, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerator import has_flash_kernel, kernel_names
from gpu_device import ON_GPU, TORCH_DEVICE, ZERO_STAGES, placed
from helpers import composed
from precision import Case, measure
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.data.batches import pad_right, uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy
from rlhf.models.logprobs import target_logp
from rlhf.models.wrappers import Policy
from rlhf.rl.experience import Models, Prompts, make_experience
from rlhf.rl.guards import logprob_difference
from rlhf.sampling.token_choice import Sampling

pytestmark = pytest.mark.gpu

FAMILIES = ("opt", "llama", "qwen2", "gemma3_text")
SAMPLER_GAP = 0.05  # nats, mean over tokens
# bench/precision.py: shares by which 16 bits may differ from fp32
FIRST_UPDATE, SUMMED, NORMS = 0.05, 0.006, 0.05
PRECISIONS = ("fp32", "bf16", "autocast", "fp16")


# ------------------------------------------------------------------------ sampler, and updates


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_training_agree_in_bf16(
    family: str, one_process: None, base: Callable[[str], str], tokenizer: Any, tmp_path: Path
) -> None:
    cfg = composed("stage=ppo", *placed("bf16"))
    engine = build_engine(
        lambda: load_policy(base(family), tokenizer, Precision.bf16), cfg, "actor", tmp_path
    )
    engine.eval()
    rows = 16
    noise = uniforms("rollout", range(rows), 0, 0, 24)
    ids = [[*range(20, 30 + i)] for i in range(rows)]
    prompts = Prompts([Prompt([Turn("user", "Hi")])] * rows, ids, noise)
    e = make_experience(Models(tokenizer, engine), prompts, Sampling(), 8, rescore=True)
    mean, worst = logprob_difference(e.sampler_logprobs, e.old_logprobs, e.response_mask)
    print(f"{family}: sampler and training differ by {mean:.3g} nats, at most {worst:.3g}")
    assert e.response_mask.sum() > 100 and 0 < mean < SAMPLER_GAP


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_update_is_that_of_fp32(precision: str, one_process: None) -> None:
    """Whatever ZeRO stage; and 16 micro-batches give the gradient of a single one."""
    cases = [Case(precision, zero, 1) for zero in ZERO_STAGES]
    for row in measure(cases):
        print({key: value for key, value in row.items() if key != "lora"})
        assert row["early_steps"] == 0, row
        assert row["its difference"] < FIRST_UPDATE and row["norms"] < NORMS, row
        assert row["summed"] < (1e-4 if precision == "fp32" else SUMMED), row


# -------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_log_probs_and_their_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Against float64, from the same rounded inputs."""
    tokens, width, vocabulary = (2000, 256, 50_272) if ON_GPU else (300, 16, 9000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 2 * width**-0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(TORCH_DEVICE)
    slopes = torch.randn(2, tokens, generator=generator).to(TORCH_DEVICE)
    given = [x.to(TORCH_DEVICE, dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in given]
    found = target_logp(given[0], given[1], None, targets)[:2]
    logp = F.linear(*exact).log_softmax(-1)
    expected = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    for one, other in zip(found, expected):
        assert float((one - other).detach().abs().mean()) < tolerance
    got = torch.autograd.grad((slopes * torch.stack(found)).sum(), given)
    wanted = torch.autograd.grad((slopes * torch.stack(expected)).sum(), exact)
    for one, other in zip(got, wanted):
        assert float((one.double() - other).norm() / other.norm()) < tolerance


# -------------------------------------------------------------------------------- attention

BEGINNING = [*range(20, 52)]
# A shared prefix, short and long rows; most are longer than the sliding window of gemma3 (8). With
# one key head for two of queries, llama, qwen2 and gemma3 have grouped queries.
ROWS = [
    [*BEGINNING, *range(60, 90)],
    [8, 9],
    [*BEGINNING, 300, 301, 302],
    [*range(100, 140)],
    [*BEGINNING, *range(60, 75), 400],
    [*range(200, 227)],
]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, and the tokens to score: all but the first of each row."""
    ids, mask = pad_right(ROWS, 0)
    return ids, mask, (mask > 0) & (mask.cumsum(1) > 1)


def outputs(policy: Policy, packed: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows, and the gradient of all weights, in float64."""
    policy.can_pack = packed
    policy.zero_grad()
    ids, mask, wanted = batch()
    logp = policy(ids, mask, wanted).logprobs
    (logp.sum() / wanted.sum()).backward()
    gradient = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return logp.detach()[wanted].double(), torch.cat(gradient).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_attention_is_that_of_padded_batches(
    family: str, base: Callable[[str], str], tokenizer: Any
) -> None:
    """In bf16, packed rows are as near to fp32 as padded ones."""
    policies = {
        precision: load_policy(base(family), tokenizer, precision).to(TORCH_DEVICE).train()
        for precision in (Precision.fp32, Precision.bf16)
    }
    for weight, rounded in zip(*(p.parameters() for p in policies.values())):
        weight.data.copy_(rounded.data)
    assert policies[Precision.bf16].supports_packing()
    exact = outputs(policies[Precision.fp32], packed=False)
    errors = {}
    for packed in (True, False):
        found = outputs(policies[Precision.bf16], packed)
        errors[packed] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact)]
    print(f"{family}: errors of log-probs and gradient, packed and padded: {errors}")
    for packed, padded in zip(errors[True], errors[False]):
        assert packed < 1.5 * padded + 1e-3, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_attention_runs_in_a_flash_kernel(
    family: str, base: Callable[[str], str], tokenizer: Any
) -> None:
    policy = load_policy(base(family), tokenizer, Precision.bf16).to(TORCH_DEVICE).eval()
    assert policy.supports_packing()
    with torch.no_grad():
        work = partial(policy, *batch())
        work()
        names = kernel_names(TORCH_DEVICE, work)
    assert has_flash_kernel(names), sorted(names)
