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
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy


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
