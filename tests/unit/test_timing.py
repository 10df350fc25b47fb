"""The time of a step, from earlier runs of the same size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import composed

from rlhf.config.loading import save_config
from rlhf.planning.memory import make_plan
from rlhf.planning.summary import time_text
from rlhf.runs.timing import measure_step


def made(root: Path, name: str, times: list[float], *overrides: str) -> Path:
    """A run directory with these times of its steps."""
    run = root / "outputs" / name
    run.mkdir(parents=True)
    stage = f"stage={name.split('-')[0]}"
    save_config(composed(f"root={root}", *overrides, stage), run / "config.yaml")
    rows = [json.dumps({"step": i + 1, "time": time}) + "\n" for i, time in enumerate(times)]
    (run / "metrics.jsonl").write_text("".join(rows))
    return run


def test_the_time_of_a_step_is_that_of_a_run_of_the_same_size(tmp_path: Path) -> None:
    run = made(tmp_path, "ppo-one-00000000", [0, 2, 4, 90, 92], "rl.kl.coef=0.5", "rl.max_steps=5")
    found = measure_step(composed(f"root={tmp_path}", "rl.lr=1e-6"), "ppo")
    assert found == (pytest.approx(2), run), "a pause of 86 s is no step"


@pytest.mark.parametrize(
    "other",
    ["rl.batch_size=32", "deploy.micro_batch=2", "rollout.max_new_tokens=8", "actor=opt125m"],
)
def test_runs_of_another_size_say_nothing(tmp_path: Path, other: str) -> None:
    made(tmp_path, "ppo-one-00000000", [0, 2, 4], other)
    assert measure_step(composed(f"root={tmp_path}"), "ppo") is None


def test_two_steps_are_too_few_and_broken_runs_are_passed_over(tmp_path: Path) -> None:
    made(tmp_path, "sft-short-00000000", [0, 2])
    broken = made(tmp_path, "sft-broken-00000000", [0, 2, 4])
    (broken / "config.yaml").write_text("no: configuration\n")
    assert measure_step(composed(f"root={tmp_path}"), "sft") is None
    good = made(tmp_path, "sft-good-00000000", [0, 1, 2], "sft.epochs=9")
    assert measure_step(composed(f"root={tmp_path}"), "sft") == (pytest.approx(1), good)


def test_the_plan_says_how_long_the_steps_take(tmp_path: Path) -> None:
    cfg = composed(f"root={tmp_path}", "stage=sft")
    unknown = "unknown before a run of this size; a short one measures it: sft.max_steps=5"
    assert time_text(make_plan(cfg, "sft"), cfg) == unknown
    run = made(tmp_path, "sft-short-00000000", [0, 2, 4, 6], "sft.max_steps=4")
    steps = make_plan(cfg, "sft").steps.number
    assert steps == 500
    assert time_text(make_plan(cfg, "sft"), cfg) == f"0:16:40 (h:mm:ss), at 2 s per step in {run}"
