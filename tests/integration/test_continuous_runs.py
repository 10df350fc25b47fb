"""Whole runs with rollout.engine=continuous: LoRA, ZeRO 3, several processes, and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import lines, metrics
from worker_runs import kill_when, prepare, same, work

CONTINUOUS = [
    "rollout.engine=continuous",
    "rl.batch_size=16",
    "rl.responses_per_prompt=4",
    "rl.max_steps=4",
]


def assert_sampled_from_the_policy(run: Path) -> None:
    """Its log-probs are those of the forward pass that trains, in every rollout."""
    rows = [row for row in metrics(run) if "sampler/ratio_max" in row]
    assert len(rows) >= 3
    for row in rows:
        assert row["val/sampler_logp_diff"] < 1e-4
        assert row["sampler/ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert row["sampler/ratio_max"] == pytest.approx(1, abs=1e-2)
        assert row["sampler/capped"] == 0


@pytest.mark.full
def test_an_adapter(inputs: dict[str, str], tmp_path: Path) -> None:
    more = [*CONTINUOUS, "actor.lora.rank=4", "rl.lr=1e-2"]
    run = prepare(tmp_path, "lora", "grpo", inputs, more)
    work([run], 1)
    assert_sampled_from_the_policy(run)
    assert metrics(run)[-1]["objective/kl"] != 0, "the adapter that samples is the trained one"


@pytest.mark.full
@pytest.mark.parametrize("adapter", [[], ["actor.lora.rank=4", "rl.lr=1e-2"]], ids=["full", "lora"])
def test_gathered_weights_of_two_processes(
    inputs: dict[str, str], tmp_path: Path, adapter: list[str]
) -> None:
    more = [*CONTINUOUS, *adapter]
    run = prepare(tmp_path, "two", "grpo", inputs, more, processes_per_node=2, zero_stage=3)
    work([run], 2)
    assert_sampled_from_the_policy(run)


@pytest.mark.full
def test_a_resume_from_between_two_rollouts_is_bit_for_bit(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    """The engine's seed is drawn from the rollout's number, and on a CPU it repeats itself."""
    more = [*CONTINUOUS, "checkpoint.every_steps=2"]
    whole, killed = (prepare(tmp_path, name, "grpo", inputs, more) for name in ("whole", "killed"))
    work([whole], 1)
    kill_when(killed, 1, lambda: lines(killed / "metrics.jsonl") >= 3)
    work([killed], 1)
    same(whole, killed)
