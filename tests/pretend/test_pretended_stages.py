"""Every stage on the pretended GPU: devices are not mixed, and how often the host waits."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "bench"))

import synchronisations

MOST_PER_MICRO_BATCH = 6
MOST_PER_16_TOKENS = 2
TRAINED = {  # by case: the models that take optimizer steps
    "sft": {"policy"},
    "rm": {"scorer"},
    "ppo": {"policy", "scorer"},
    "grpo": {"policy"},
    "dpo": {"policy"},
    "lora": {"policy", "scorer"},
}


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was counted while all stages ran, one after the other."""
    phases = synchronisations.count_stages(tmp_path_factory.mktemp("pretend"))
    print(synchronisations.table_of_stages(phases))
    return phases


def of(phases: list[dict[str, Any]], unit: str) -> list[dict[str, Any]]:
    return [phase for phase in phases if phase["unit"] == unit]


def test_every_stage_runs_through(phases: list[dict[str, Any]]) -> None:
    """Mixed devices raise, and so does `.numpy()`."""
    trained: dict[str, set[str]] = {}
    for phase in of(phases, "micro-batch"):
        trained.setdefault(phase["case"], set()).add(phase["part"].rsplit(" ", 1)[-1])
    assert trained == TRAINED
    sampled = {phase["case"] for phase in of(phases, "token")}
    assert sampled == {"sft", "ppo", "grpo", "dpo", "lora", "eval"}


def test_the_host_waits_at_most_six_times_in_a_micro_batch(phases: list[dict[str, Any]]) -> None:
    for phase in of(phases, "micro-batch"):
        assert phase["units"] >= 6, phase
        assert phase["synchronisations"] <= MOST_PER_MICRO_BATCH * phase["units"], phase


def test_the_host_waits_at_most_twice_in_sixteen_tokens(phases: list[dict[str, Any]]) -> None:
    for phase in of(phases, "token"):
        assert phase["units"] >= 32, phase
        assert phase["synchronisations"] <= MOST_PER_16_TOKENS * phase["units"] / 16, phase


@pytest.mark.full
def test_counts_of_deeper_models() -> None:
    """A layer more costs as many kernels per token as the one before it."""
    two, four, six = synchronisations.kernels_per_token("opt", [2, 4, 6])
    assert 0 < four - two == six - four
