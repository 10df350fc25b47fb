"""Each preset of online RL, with nothing but its name, at its full default length on the sandbox:
at least 60 % of the gap between the SFT policy and the best responses, at a KL of at most 8.

One seed; bench/presets.py makes the table of docs/algorithms.md over three.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Demo, runs_in, summary, train

from rlhf.config.presets import preset_names

# ppo: test_gold.py; dschat: for comparison only, it need not end well
PRESETS = [name for name in preset_names() if name not in ("ppo", "dschat")]


@pytest.mark.full
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_ends_well_at_its_full_default_length(
    demo: Demo, tmp_path: Path, preset: str
) -> None:
    given = [f"stage={preset}", f"rl.actor={demo.sft}", f"rl.reward={demo.rm}"]
    done = train(*given, "wandb.mode=disabled", "deploy.threads=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)[preset]
    final = summary(run)["metrics"]
    gold, before = final["eval/gold"], final["eval/gold_before"]
    closed = (gold - before) / (final["eval/gold_best"] - before)
    print(f"{preset}: gap {closed:.2f}, gold {gold:.2f}, KL {final['eval/kl']:.2f}")
    assert closed >= 0.60 and final["eval/kl"] <= 8
