"""What the GPU is asked for: synchronisations, memory, and weights that ZeRO 3 gathers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_ppo
import pytest
import torch
from gpu_device import DEVICE, ON_GPU, TORCH_DEVICE, free_gpu_bytes, placed
from helpers import composed
from random_models import Bench, settings
from rollouts import fetches_while_sampling

from rlhf.config.choices import Precision
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy
from rlhf.planning.memory import make_plan

pytestmark = pytest.mark.gpu

PER_MICRO_BATCH, PER_TOKEN = 6.0, 2 / 16  # synchronisations, at most
PLAN = 0.1  # share by which the plan of the memory may miss the peak of a phase
ALL_WEIGHTS = ["actor.lora.rank=0", "deploy.activation_checkpointing=false"]


def bench(folder: Path, *overrides: str) -> Bench:
    return Bench(settings(DEVICE, overrides), TORCH_DEVICE, folder)


def test_synchronisations_of_a_micro_batch(one_process: None, tmp_path: Path) -> None:
    """Of actor and critic together, in a PPO update."""
    tried = bench(tmp_path)
    found = gpu_ppo.syncs_per_micro_batch(tried, tried.learner())
    print(f"per micro-batch of actor and critic: {found}")
    check_count(sum(found.values()), 2 * PER_MICRO_BATCH)


def test_synchronisations_of_a_token(one_process: None, tmp_path: Path) -> None:
    found = gpu_ppo.syncs_per_token(bench(tmp_path))
    print(f"per sampled token: {found}")
    check_count(sum(found.values()), PER_TOKEN)


def check_count(found: float, most: float) -> None:
    """On a CPU only some of them are seen, and nothing waits."""
    assert found <= most if ON_GPU else found > 0


@pytest.mark.parametrize("overrides", [[], ALL_WEIGHTS], ids=["recipe", "all weights"])
def test_the_plan_of_the_memory(overrides: list[str], one_process: None, tmp_path: Path) -> None:
    """The peak of each phase of PPO on OPT-1.3B's shape, with its recipe and without LoRA."""
    tried = bench(tmp_path, *overrides)
    if (needed := make_plan(tried.cfg, "ppo").peak) > free_gpu_bytes():
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    for phase, (planned, measured) in gpu_ppo.peaks(tried).items():
        print(f"{phase}: planned {planned / 2**30:.2f} GiB, measured {measured / 2**30:.2f}")
        assert planned > 0
        if ON_GPU:
            assert measured == pytest.approx(planned, rel=PLAN), phase


def test_gathered_weights_are_fetched_once(
    one_process: None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 3: sampling with gathered weights fetches none, and samples the same tokens."""
    cfg = composed("stage=ppo", *placed("bf16"), "deploy.zero_stage=3")
    torch.manual_seed(0)
    engine = build_engine(
        lambda: load_policy("builtin:tiny", tokenizer, Precision.bf16), cfg, "actor", tmp_path
    )
    engine.eval()
    alone, alone_fetched = fetches_while_sampling(engine, tokenizer, False, monkeypatch)
    gathered, fetched = fetches_while_sampling(engine, tokenizer, True, monkeypatch)
    assert alone_fetched and not fetched
    for name in ("response_ids", "response_mask", "sampler_logprobs"):
        assert torch.equal(getattr(gathered, name), getattr(alone, name)), name
