"""Shared by the quick tests: a policy in one process, a rollout of it, engines, settings, and a
cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed
from rollouts import Engines, build

from rlhf.config.choices import Precision
from rlhf.config.schema import Config
from rlhf.data.batches import uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.rl.experience import Experience, Models, Prompts, make_experience
from rlhf.sampling.token_choice import Sampling

EOS = 2
PROMPTS = [[5, 6, 7], [8], [300, 301, 302, 303], [9, 9]]


@pytest.fixture(scope="module")
def actor(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cfg = composed("stage=ppo")
    tokenizer = load_tokenizer("builtin:tiny")
    torch.manual_seed(0)
    engine = build_engine(
        lambda: load_policy("builtin:tiny", tokenizer, Precision.fp32),
        cfg,
        "actor",
        tmp_path_factory.mktemp("actor"),
    )
    engine.eval()
    return engine


@pytest.fixture
def experience(actor: Any, tokenizer: Any) -> Experience:
    """A rollout in which one response ends, measured as the first one of a run."""
    noise, turns = uniforms("rollout", range(4), 0, 0, 6), [Prompt([Turn("user", "Hi")])] * 4
    prompts = Prompts(turns, PROMPTS, noise)
    e = make_experience(Models(tokenizer, actor, actor), prompts, Sampling(), 4, rescore=True)
    e.scores = torch.zeros(4, 1)
    e.response_ids[1, 2:], e.finished[1] = EOS, 1.0
    e.response_mask, e.loss_mask = e.response_mask.clone(), e.loss_mask.clone()
    e.response_mask[1, 3:] = e.loss_mask[1, 3:] = 0.0
    return e


@pytest.fixture(scope="module")
def cfg() -> Config:
    """PPO with one step per rollout, at a large and constant rate."""
    rates = ["rl.lr=1e-3", "rl.critic.lr=1e-3", "rl.schedule=constant", "rl.warmup_steps=0"]
    few = ["rl.epochs=1", "rl.minibatches=1", "rl.kl.coef=0.1"]
    return composed("stage=ppo", *few, *rates)


@pytest.fixture(scope="module")
def models_of_ppo(
    cfg: Config, one_process: None, tmp_path_factory: pytest.TempPathFactory
) -> Engines:
    """Actor and reference with the same weights, a reward model and a critic; all untrained."""
    return build(cfg, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlhf"
