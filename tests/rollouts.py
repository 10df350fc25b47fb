"""What the tests of rollouts and updates share: draws for given tokens, experience, engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.config.schema import Config
from rlhf.data import encoding
from rlhf.data.batches import pad_left, uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer
from rlhf.models.wrappers import Policy
from rlhf.rl import experience as experience_module
from rlhf.rl.experience import Prompts
from rlhf.rl.rewards import Rewards, Source
from rlhf.sampling.token_choice import Sampling

PAD, EOS = 0, 2
FEW = 12  # tokens of the small vocabulary, so that EOS is drawn often
QUESTIONS = [
    "My cat looks sad. What now?",
    "Hi",
    "Is it hard to look after the oven? Keep it short. No small talk.",
    "a b",
]
ANSWERS = [
    "Happy to help! First, fill the bowl.",
    "It needs a little care.",
    "Work it out yourself. Then, wash it cold. Finally, fold it flat.",
]


@torch.no_grad()
def next_probabilities(policy: Policy, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Distribution of the token after `ids`: the model itself, no batch, no padding, no cache."""
    return (
        policy.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double()
        / temperature
    ).softmax(-1)


def draws_for(
    policy: Policy,
    prompt: Sequence[int],
    tokens: Sequence[int],
    width: int,
    temperature: float = 1.0,
) -> list[float]:
    """Random numbers with which exactly `tokens` are sampled; behind them any number will do."""
    ids, draws = list(prompt), []
    for token in tokens:
        p = next_probabilities(policy, ids, temperature)
        draws.append(float(p[:token].sum() + 0.5 * p[token]))
        ids.append(token)
    return draws + [0.7] * (width - len(tokens))


def experience_of(
    prompts: Sequence[Sequence[int]], response: Tensor, mask: Tensor
) -> experience_module.Experience:
    zeros = torch.zeros_like(mask)
    prompt_ids, prompt_mask = pad_left(prompts, PAD)
    return experience_module.Experience(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response,
        response_mask=mask,
        loss_mask=mask,
        sampler_logprobs=zeros,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=zeros[:, :1],
        finished=((response == EOS) * mask).amax(1),
    )


@dataclasses.dataclass
class Engines:
    tokenizer: Any
    actor: Any
    ref: Any
    reward: Any
    critic: Any

    @property
    def rewards(self) -> Rewards:
        return Rewards([Source("model", 1.0, self.reward)], self.tokenizer)

    @property
    def models(self) -> experience.Models:
        return experience_module.Models(
            self.tokenizer, self.actor, self.ref, self.rewards, self.critic
        )

    def experience(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Tensor,
        temperature: float = 1.0,
        micro_batch: int = 2,
        **switches: bool,
    ) -> experience.Experience:
        asked = [
            Prompt([Turn("user", f"{i}")]) for i in range(len(prompts))
        ]  # a reward model with the policy's tokenizer reads ids
        return experience_module.make_experience(
            self.models,
            Prompts(asked, prompts, draws),
            Sampling(temperature),
            micro_batch,
            **switches,
        )


def build(cfg: Config, run_dir: Path, policy: str = "builtin:tiny") -> Engines:
    tokenizer = load_tokenizer("builtin:tiny")
    parts = []
    for role, load, path, seed in (
        ("actor", load_policy, policy, 0),
        ("ref", load_policy, policy, 0),
        ("reward", load_scorer, "builtin:tiny", 1),
        ("critic", load_scorer, "builtin:tiny", 2),
    ):
        torch.manual_seed(seed)
        module = load(path, tokenizer, Precision.fp32)
        module.hf.config.score_mean, module.hf.config.score_std = 0.3, 1.7
        parts.append(build_engine(lambda module=module: module, cfg, role, run_dir))
    return Engines(tokenizer, *parts)


def some_rollout(m: Engines) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """Prompts of several lengths, the tokens that shall be sampled, and the draws for them.

    The responses are whole sentences, and one without an end.
    """
    prompts = [
        ids
        for ids in encoding.encode_prompts(
            m.tokenizer, [[Turn("user", text)] for text in QUESTIONS], 99
        )
        if ids
    ]
    answers = encoding.encode_responses(m.tokenizer, ANSWERS, 99)
    width = max(map(len, answers))
    answers.append([9, 8, PAD, *range(100, 100 + width - 3)])
    draws = torch.tensor(
        [
            draws_for(m.actor.module, prompt, answer, width)
            for prompt, answer in zip(prompts, answers)
        ]
    )
    return prompts, answers, draws


def fetches_while_sampling(
    engine: Any, tokenizer: Any, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[experience_module.Experience, int]:
    """Responses of a ZeRO-3 engine, and how often DeepSpeed looked for the weights of a layer."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetched = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(*args: Any, **kwargs: Any) -> Any:
        fetched.append(1)
        return fetch(*args, **kwargs)

    noise = uniforms("rollout", range(4), 0, 0, 6)
    ids = [[5, 6, 7], [8], [300, 301, 302, 303], [9, 9]]
    prompts = Prompts([Prompt([Turn("user", "Hi")])] * 4, ids, noise)
    models = experience_module.Models(tokenizer, engine, gather=gather)
    with monkeypatch.context() as patch:
        patch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", counted)
        made = experience_module.sample_responses(models, prompts, range(4), Sampling(), 4)
    return made, len(fetched)
