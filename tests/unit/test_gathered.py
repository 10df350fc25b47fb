"""ZeRO 3: weights that are gathered for sampling stay whole for all of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed
from rollouts import fetches_while_sampling

from rlhf.config.choices import Precision
from rlhf.config.schema import Lora
from rlhf.data.batches import uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.distributed.engine import build_engine, gather_parameters
from rlhf.models import lora, token_rows
from rlhf.models.loading import load_policy
from rlhf.models.wrappers import Policy
from rlhf.rl.experience import Models, Prompts, policy_logprobs, sample_responses
from rlhf.sampling.token_choice import Sampling

IDS = [[5, 6, 7], [8], [300, 301, 302, 303], [9, 5]]  # of prompts


def test_sampling_fetches_no_weight_and_training_goes_on(
    one_process: None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # a persistence threshold of 0: DeepSpeed would keep such small weights whole anyway
    load = partial(load_policy, "builtin:tiny", tokenizer, Precision.fp32)
    cfg = composed("stage=ppo", "deploy.zero_stage=3")
    torch.manual_seed(0)
    engine = build_engine(load, cfg, "actor", tmp_path)
    engine.eval()
    sampled = {}
    for gather in (False, True):
        sampled[gather], fetched = fetches_while_sampling(engine, tokenizer, gather, monkeypatch)
        assert bool(fetched) != gather
    for name in ("response_ids", "response_mask", "sampler_logprobs"):
        assert torch.equal(getattr(sampled[True], name), getattr(sampled[False], name)), name
    assert any(p.ds_status != ZeroParamStatus.AVAILABLE for p in engine.module.parameters())
    # the hooks are back: a forward pass of the engine fetches its weights and can be trained
    assert fetches_while_sampling(engine, tokenizer, False, monkeypatch)[1]
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    engine.train()
    loss = -engine(ids, mask, mask).logprobs.sum()
    engine.backward(loss)
    engine.step()
    assert torch.isfinite(loss)


def policy_with_rows(tokenizer: Any, settings: Lora) -> Policy:
    """An adapter, and trained rows that are far from those of the base model."""
    torch.manual_seed(0)
    policy = load_policy("builtin:tiny", tokenizer, Precision.fp32)
    lora.add_adapter(policy.hf, settings, "actor.lora", [5, 6, 7])
    rows = {layer.trained_rows for _, layer in token_rows.layers_with_rows(policy.hf)}
    with gather_parameters(rows, modify=True), torch.no_grad():
        for one in rows:
            one.add_(torch.randn_like(one))
    return policy


def test_rows_of_new_tokens_take_part_in_sampling(
    one_process: None, tokenizer: Any, tmp_path: Path
) -> None:
    """They are put in place by hooks of ours, which stay when DeepSpeed's are off."""
    sampled = {}
    for zero_stage in (0, 3):
        cfg = composed("stage=ppo", f"deploy.zero_stage={zero_stage}", "actor.lora.rank=2")
        load = partial(policy_with_rows, tokenizer, cfg.actor.lora)
        engine = build_engine(load, cfg, "actor", tmp_path)
        engine.eval()
        noise = uniforms("rollout", range(4), 0, 0, 6)
        prompts = Prompts([Prompt([Turn("user", "Hi")])] * 4, IDS, noise)
        models = Models(tokenizer, engine, gather=True)
        e = sampled[zero_stage] = sample_responses(models, prompts, range(4), Sampling(), 4)
        with torch.no_grad():
            measured = policy_logprobs(engine, e, 1.0)
        assert float((measured - e.sampler_logprobs).abs().max()) < 1e-4
    assert torch.equal(sampled[0].response_ids, sampled[3].response_ids)
