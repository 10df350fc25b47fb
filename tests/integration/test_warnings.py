"""Warnings about training that goes wrong reach the console and W&B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import REPO, composed, read_offline_run

from rlhf.config.loading import save_config

ALERT = """
import sys, os
from pathlib import Path
from rlhf.config.loading import load_config
from rlhf.training.tracker import Tracker
cfg = load_config(Path(sys.argv[1]) / "config.yaml")
tracker = Tracker(cfg, Path(sys.argv[1]), 1, [])
tracker.alert("KL blow-up", "raise rl.kl.coef")
tracker.log(1, {"x": 1.0})
tracker.close({})
"""


def test_a_warning_reaches_the_console_and_wandb(tmp_path: Path) -> None:
    run = tmp_path / "ppo-x"
    run.mkdir()
    cfg = composed("stage=ppo", "wandb.mode=offline")
    save_config(cfg, run / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", ALERT, str(run)],
        cwd=REPO,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "KL blow-up: raise rl.kl.coef" in done.stderr, done.stderr
    records = [json.loads(line) for line in read_offline_run(run).splitlines()]
    assert any(
        "KL blow-up" in json.dumps(record) for record in records if record["type"] == "alert"
    )
