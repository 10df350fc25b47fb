"""The plan that `train.py` prints, and what the runs then do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import REPO, Demo, composed, train

from rlhf.planning.memory import (
    make_plan,
)


def test_steps_and_tokens(demo: Demo) -> None:
    """What the plan says of the built-in pipeline is what it did."""
    cfg = composed()
    for stage, run in (("sft", demo.sft), ("rm", demo.rm), ("ppo", demo.ppo)):
        steps = len((run / "metrics.jsonl").read_text().splitlines())
        p = make_plan(cfg, stage)
        assert p.steps.number == steps and p.fits
        assert (
            f"{stage}: plan " in demo.stderr
            and f"{steps:,} {'rollouts' if stage == 'ppo' else 'steps'}" in demo.stderr
        )
    tokens = make_plan(cfg, "rm").steps.tokens
    assert tokens == 1125 * 8 * 2 * (48 + 64)


def test_plan_is_printed_without_torch_and_ends_with_2_where_it_does_not_fit(
    tmp_path: Path,
) -> None:
    done = train("stage=ppo", "actor=opt1.3b", "deploy=single_gpu", "plan=true", cwd=tmp_path)
    assert done.returncode == 0 and "fits " in done.stdout and not (tmp_path / "outputs").exists()
    for word in (
        "actor",
        "critic",
        "kv cache",
        "activations",
        "logits",
        "tokens",
        "on disk",
        "32 responses per optimizer step",
    ):
        assert word in done.stdout
    done = train("stage=sft", "actor=llama2-7b", "deploy=single_gpu", "plan=true", cwd=tmp_path)
    assert done.returncode == 2 and "error: sft would not fit into memory, see above" in done.stderr
    assert "Cheapest changes that make it fit:\n    deploy." in done.stdout
    code = "import sys, rlhf.planning.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
