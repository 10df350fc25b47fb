"""rollout.engine=continuous: the policy's distribution, and nothing of it left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from rlhf.base.errors import UserError
from rlhf.config.choices import Precision
from rlhf.data.batches import pad_left, uniforms
from rlhf.models.loading import load_policy
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch
from rlhf.sampling.continuous import continuous_generate
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling

EOS = 2
PROMPTS = [[5, 6, 7], [8, 9], [*range(20, 34)], [300]]


def batch_of(prompts: list[list[int]]) -> PromptBatch:
    return PromptBatch(*pad_left(prompts, 0))


def policy_of(base: Any, tokenizer: Any, family: str) -> Policy:
    torch.manual_seed(0)
    return load_policy(base(family), tokenizer, Precision.fp32).eval()


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "gemma3_text"])
def test_the_likeliest_tokens_are_those_of_the_native_loop(
    base: Any, tokenizer: Any, family: str
) -> None:
    policy, noise = policy_of(base, tokenizer, family), uniforms("x", range(4), 0, 0, 12)
    batch, greedy = batch_of(PROMPTS), Sampling(greedy=True)
    expected = sample(policy, batch, noise, EOS, greedy)
    found = continuous_generate(policy, batch, noise, EOS, greedy)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_behind(base: Any, tokenizer: Any) -> None:
    """Mode, attention and random state are restored: what comes after is bit for bit the same."""
    policy, noise = policy_of(base, tokenizer, "llama"), uniforms("x", range(4), 0, 0, 12)
    policy.train()
    batch = batch_of(PROMPTS)
    expected = sample(policy, batch, noise, EOS, Sampling())
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    attention = policy.hf.config._attn_implementation
    continuous_generate(policy, batch, noise, EOS, Sampling(temperature=0.7))
    assert torch.equal(torch.rand(3), drawn)
    assert all(module.training for module in policy.modules())
    assert policy.hf.config._attn_implementation == attention
    again = sample(policy, batch, noise, EOS, Sampling())
    assert all(torch.equal(one, other) for one, other in zip(again, expected))


def test_samples_follow_the_distribution(base: Any, tokenizer: Any) -> None:
    """2,000 first tokens after one prompt, at temperature 0.5, in 20 groups of about equal
    probability; and their log-probabilities, at that temperature."""
    policy, n = policy_of(base, tokenizer, "opt"), 2000
    batch = batch_of([[5, 6, 7]] * n)
    sampling = Sampling(temperature=0.5)
    found = continuous_generate(policy, batch, torch.full((n, 1), 0.3), EOS, sampling)
    with torch.no_grad():
        logp = (policy.hf(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).log_softmax(-1)
    torch.testing.assert_close(found.logprobs[:, 0], logp[found.ids[:, 0]], atol=1e-4, rtol=1e-4)
    order = logp.argsort(descending=True)
    groups = torch.zeros(len(logp), dtype=torch.long)
    groups[order] = (logp[order].exp().cumsum(0) * 20).long().clamp(max=19)
    expected = torch.zeros(20).index_add_(0, groups, logp.exp()) * n
    seen = torch.bincount(groups[found.ids[:, 0]], minlength=20)
    filled = expected > 5
    statistic = ((seen - expected) ** 2 / expected)[filled].sum()
    assert stats.chi2.sf(float(statistic), int(filled.sum()) - 1) > 1e-3


def test_a_seed_gives_its_samples_again(base: Any, tokenizer: Any) -> None:
    policy, batch = policy_of(base, tokenizer, "opt"), batch_of(PROMPTS)

    def sampled(seed: int) -> torch.Tensor:
        noise = uniforms("x", range(4), seed, 0, 12)
        return continuous_generate(policy, batch, noise, EOS, Sampling()).ids

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))


def test_partitioned_weights_are_refused(base: Any, tokenizer: Any) -> None:
    policy = policy_of(base, tokenizer, "opt")
    with pytest.raises(UserError, match="deploy.gather_for_rollout=true"):
        continuous_generate(
            policy, batch_of(PROMPTS), torch.zeros(4, 3), EOS, Sampling(), synced=True
        )
