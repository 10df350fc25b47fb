"""ZeRO 3: weights that are gathered for sampling stay whole for all of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed

from rlhf.config.choices import Precision
from rlhf.data.batches import uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy
from rlhf.rl.experience import Models, Prompts, sample_responses
from rlhf.sampling.token_choice import Sampling

PROMPTS = [[5, 6, 7], [8], [300, 301, 302, 303], [9, 9]]


def test_sampling_fetches_no_weight_and_training_goes_on(
    one_process: None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # a persistence threshold of 0: DeepSpeed would keep such small weights whole anyway
    load = partial(load_policy, "builtin:tiny", tokenizer, Precision.fp32)
    cfg = composed("stage=ppo", "deploy.zero_stage=3")
    torch.manual_seed(0)
    engine = build_engine(load, cfg, "actor", tmp_path)
    engine.eval()
    fetched = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(*args: Any, **kwargs: Any) -> Any:
        fetched.append(1)
        return fetch(*args, **kwargs)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", counted)
    noise = uniforms("rollout", range(4), 0, 0, 6)
    prompts = Prompts([Prompt([Turn("user", "Hi")])] * 4, PROMPTS, noise)
    sampled = {}
    for gather in (False, True):
        fetched.clear()
        models = Models(tokenizer, engine, gather=gather)
        sampled[gather] = sample_responses(models, prompts, range(4), Sampling(), 4)
        assert bool(fetched) != gather
    for name in ("response_ids", "response_mask", "sampler_logprobs"):
        assert torch.equal(getattr(sampled[True], name), getattr(sampled[False], name)), name
    assert any(p.ds_status != ZeroParamStatus.AVAILABLE for p in engine.module.parameters())
    # the hooks are back: a forward pass of the engine fetches its weights and can be trained
    ids = torch.tensor(PROMPTS[:1])
    mask = torch.ones_like(ids)
    fetched.clear()
    engine.train()
    loss = -engine(ids, mask, mask).logprobs.sum()
    engine.backward(loss)
    engine.step()
    assert fetched and torch.isfinite(loss)
