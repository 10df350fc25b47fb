"""GRPO with the verifier learns to calculate: what data=arithmetic promises."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers import runs_in, summary, train


@pytest.mark.full
def test_grpo_reaches_its_promise_on_held_out_problems(tmp_path: Path) -> None:
    """From 20 to 50 % right answers to at least 85 %, and 40 points more."""
    started = time.time()
    done = train("pipeline=grpo", "data=arithmetic", "wandb.mode=disabled", cwd=tmp_path)
    seconds = time.time() - started
    assert done.returncode == 0, done.stderr
    [run] = runs_in(tmp_path)["grpo"]
    metrics = summary(run)["metrics"]
    before, after = metrics["eval/gold_before"], metrics["eval/gold"]
    print(f"pass@1 {before:.2f} -> {after:.2f} in {seconds:.0f} s")
    assert 0.2 <= before <= 0.5
    assert after >= 0.85 and after - before >= 0.4
    assert seconds < 3 * 240  # 4 minutes on 2 idle cores
